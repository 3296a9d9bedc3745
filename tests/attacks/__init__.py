"""Attacks: random walks over all verbs, mutated folders, processes that are killed while they save.

`make test` runs a few of each, always the same ones; `make soak` many, and writes the counts to docs/security.md.
"""
