"""Detectors of what differs between the processes of a run, and of what none of them does.

May import from the rooms above: `wiring` to `actions`.
"""
