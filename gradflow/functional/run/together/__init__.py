"""What a run on several processes does together: gradients averaged, numbers combined, records joined.

Files import from `processes`, `model`, `tap`, `reverse` and, of the run itself, from `history`, `step`,
`run`.
"""
