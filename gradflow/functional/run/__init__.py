"""Steps into a record: the loop over batches, its numbers on the host, and their assembly.

May import: `measurement`, `reverse`, `tap`, `model`; none of the special measurements beside it.
"""
