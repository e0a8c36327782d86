"""Trials: copies that belong together, batches that are handed out again, runs, and what they say.

May import all other rooms of `remedies/`, and everything down to `diagnosis`.
"""
