"""The questions: each file holds one, its answer as a frozen record, and the function that finds it.

Every question is a function of `GraphData`; `LayerGraph` has it as a method. May import: `table.py`,
`flow.py`, `data.py`, `algebra/` and `coarse/`.
"""
