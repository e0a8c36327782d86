"""Callbacks of training libraries and trackers of experiments; each file needs the extra that it names.

`gradflow.integrations.lightning`, `.transformers`, `.stable_baselines3` and `.trackers`. None is imported
before it is asked for. May import from every part above this one in the layout.
"""
