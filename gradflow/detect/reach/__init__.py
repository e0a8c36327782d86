"""Judgements by the account of reach, which the detector DEAD makes its own.

May import: what all detectors share, `wiring` to `actions`.
"""
