"""Linear maps and fields at a held point: Jacobians, per-sample gradients, gradient fields.

May import: `measurement`, `reverse`, `tap`, `model`; neither `run` nor the special measurements beside it.
"""
