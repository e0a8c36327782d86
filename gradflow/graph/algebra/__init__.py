"""The mathematics: a solver for graph Laplacians, and the discrete Hodge decomposition that uses it.

May import, of `graph/`: `table.py`, and nothing else.
"""
