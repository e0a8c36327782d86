"""Detectors over what was measured through time.

May import: `flow`, and what `flow` may.
"""
