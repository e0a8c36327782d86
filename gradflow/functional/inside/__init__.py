"""Looks from inside a training: its own passes are measured while they run, at the cost of listening.

May import the rooms above it and `run/`, whose rows and records it fills.
"""
