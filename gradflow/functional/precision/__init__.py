"""What number formats hold of gradients and activations: exponents, counted in one pass over a tensor.

May import: `measurement`, `reverse`, `tap`, `model`; neither `run` nor the special measurements beside it.
"""
