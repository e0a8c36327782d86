"""The mathematics: a solver for graph Laplacians, and the discrete Hodge decomposition that uses it.

May import: `table.py`, and nothing else of this part.
"""
