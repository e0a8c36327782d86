"""What several detectors of the flow read off a record: falls, zeros, recurrent weights. No verdicts.

May import: `detect.evidence` and what that may.
"""
