"""Verdicts on the signal on its way forward: where it begins to grow, where it is rounded to a constant.

May import: `detect.evidence` and what that may.
"""
