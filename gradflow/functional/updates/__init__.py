"""What an optimizer's step did: updates as applied, what its state tells, and how the loss bends along them.

Pure functions of tensors and optimizers, for a run and for a monitor alike. May import: `measurement`.
"""
