"""Studies: each asks a question of a model, runs both stages, and answers with numbers, intervals and controls.

The modules here serve every study. Each study is a folder with its own questions: `multiplication` is the first.
"""
