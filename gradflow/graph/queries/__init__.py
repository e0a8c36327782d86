"""The queries: each file holds one, and the frozen record that it returns.

Every query is a function of `GraphData`; `LayerGraph` has it as a method. May import: `table.py`, `flow.py`,
`data.py`, `values.py`, `algebra/` and `coarse/`.
"""
