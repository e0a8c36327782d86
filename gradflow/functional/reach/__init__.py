"""The account of reach: at which numbers gradient has arrived over a run, and why not at the others.

May import: `measurement`, `reverse`, `tap`, `model`; not the run that it serves.
"""
