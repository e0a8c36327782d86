"""What is noted while a model runs forward: layer calls, probes on their outputs, functional operations.

May import: `model`, and what `model` may.
"""
