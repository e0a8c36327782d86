"""Recurrent layers and loops over cells: gradients, states and gates through time.

May import: `measurement`, `reverse`, `tap`, `model`; neither `run` nor the special measurements beside it.
"""
