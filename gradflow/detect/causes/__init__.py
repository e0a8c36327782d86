"""From issues to causes: which issue explains which, read off the flow from the loss back.

May import: `evidence`, `wiring` of `gradflow.detect`, and what that may; no detector.
"""
