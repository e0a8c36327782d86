"""The user's objects as pure values: model, loss, batches and optimizer, held still, copied and put back.

May import: `gradflow.errors`, `gradflow.records`.
"""
