"""Policies: action distributions, and the gradients through the heads of policy and value.

May import: `measurement`, `reverse`, `tap`, `model`; neither `run` nor the special measurements beside it.
"""
