"""Detectors that hold a part of a model against its like: blocks, norm layers, rows of a matrix.

May import: `flow`, and what `flow` may.
"""
