"""What is learned of and in the reverse pass: the autograd graph, gradients, flow, cuts, births of NaN.

May import: `tap`, `model`, and what those may.
"""
