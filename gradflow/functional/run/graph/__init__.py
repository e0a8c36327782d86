"""What the steps of a run show of the model's graph, and the plain data it becomes.

Files import from `model`, `tap`, `reverse` and, of the run itself, from `history` and `step`.
"""
