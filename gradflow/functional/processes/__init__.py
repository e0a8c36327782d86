"""The processes that an analysis runs on, and the way between them: what splits the batch, and one gated
line.

May import `torch_private`, the records and the errors.
"""
