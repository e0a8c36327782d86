"""Detectors over what was measured of attention.

May import: `flow`, and what `flow` may.
"""
