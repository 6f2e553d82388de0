"""Studies: a question put to a model, both stages run on it, answered with numbers, intervals and controls.

The modules here are what any study needs. Each study is a folder with its own questions: `multiplication` is the first.
"""
