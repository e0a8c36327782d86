"""Coarser graphs: without the operations between layers, or with whole modules as one node; and parts.

May import: `table.py`, `flow.py`, `data.py`.
"""
