"""Coarser graphs: without the operations between layers, or with whole modules as one node.

May import: `table.py`, `flow.py`, `data.py`.
"""
