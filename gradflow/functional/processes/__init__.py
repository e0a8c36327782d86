"""The processes that an analysis runs on, and the way between them: what splits the batch, one gated
line, and the stages of a pipeline.

May import `torch_private` and its like, the records and the errors.
"""
