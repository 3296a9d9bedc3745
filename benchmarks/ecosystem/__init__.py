"""Which libraries patched models work with: a row per library and use, a column per method.

A row is a function that takes the name of a model, takes a few real steps with it, and raises an error where something
is wrong; its docstring stands in the table. `frameworks.py`, `vision.py`, `counters.py` and `deployment.py` have the
rows, `rows.py` what these share.
"""
