"""Detectors of what a number format cannot hold: underflow, overflow, slow numbers, a scaler that is stuck.

May import: `flow`, and what `flow` may.
"""
