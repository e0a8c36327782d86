"""Attention of any model: weights, statistics by head, gradients at queries, keys and values.

May import: `measurement`, `reverse`, `tap`, `model`; neither `run` nor the special measurements beside it.
"""
