"""Verdicts on the signal on its way forward: where it begins to grow, where it is rounded to a constant,
where it is squashed before the loss squashes it, where samples compete.

May import: `detect.evidence` and what that may.
"""
