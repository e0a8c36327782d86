"""Detectors over what was measured of policies.

May import: `flow`, and what `flow` may.
"""
