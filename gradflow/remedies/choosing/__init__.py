"""Which remedies a cause calls for, and at which layers.

May import `kinds/` and what stands above it in `remedies/`, and the detectors.
"""
