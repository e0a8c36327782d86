"""What the optimizer's steps tell: rates too high or too low, steps without effect, parameters left out.

May import: `wiring` to `knowledge`, and nothing of the other detectors.
"""
