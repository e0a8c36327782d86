"""The base detectors: what the flow of the gradient through layers shows in any model.

May import: `evidence`, `wiring`, `actions` of `gradflow.detect`, and what that may.
"""
