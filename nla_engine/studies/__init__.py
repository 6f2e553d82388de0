"""Studies: a question put to a model, both stages run on it, answered with numbers, intervals and controls.

`multiplication` is the pattern: problems, rows of interest, measures beside their controls, tables, figures, a reading.
"""
