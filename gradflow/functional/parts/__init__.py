"""Parts of a model that can be held against each other: blocks that repeat, rows of a matrix, norm layers.

May import: `measurement`, `reverse`, `tap`, `model`; neither `run` nor the special measurements beside it.
"""
