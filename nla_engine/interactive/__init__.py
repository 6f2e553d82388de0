"""The package in a Python session or a notebook: capture activations, explain vectors, show the page.

Each call takes what a program has at hand (texts, records, arrays, plain strings) and runs the stages as commands do.
"""
