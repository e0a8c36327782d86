"""The immutable records that every part of gradflow hands to the next, and the two enums.

A record holds numbers and names, never a tensor and never a verdict, with two exceptions that are
verdicts by definition: `Issue` and `Cause`. Arrays are read-only NumPy arrays whose first axis is the
step; a value that was not measured at a step is NaN. Nothing here imports torch.
"""

from gradflow.records.attention import (
    AttentionGradients,
    AttentionRecord,
    AttentionScores,
    AttentionStats,
    BranchRecord,
    TransformerRecord,
)
from gradflow.records.fields import NAN, Bools, Floats, Ints, array_field, float_field, mapping_field
from gradflow.records.flow import FlowRecord, Provenance
from gradflow.records.graph import EdgeRecord, GraphRecord, NodeRecord
from gradflow.records.issues import Cause, Issue, IssueSeverity, IssueType
from gradflow.records.measured import ActivationRecord, LayerRecord, NumericalRecord, ParameterRecord
from gradflow.records.plain import FORMAT_VERSION, from_plain, to_plain
from gradflow.records.policy import ActionDeviation, ActionDistribution, PolicyDistributionStats, PolicyRecord
from gradflow.records.recurrent import (
    GateRecord,
    RecurrenceRecord,
    RecurrentLevelRecord,
    ReservoirDynamics,
    decay_rate,
    depth,
    mean_profile,
)

__all__ = [
    "FORMAT_VERSION",
    "NAN",
    "ActionDeviation",
    "ActionDistribution",
    "ActivationRecord",
    "AttentionGradients",
    "AttentionRecord",
    "AttentionScores",
    "AttentionStats",
    "Bools",
    "BranchRecord",
    "Cause",
    "EdgeRecord",
    "Floats",
    "FlowRecord",
    "GateRecord",
    "GraphRecord",
    "Ints",
    "Issue",
    "IssueSeverity",
    "IssueType",
    "LayerRecord",
    "NodeRecord",
    "NumericalRecord",
    "ParameterRecord",
    "PolicyDistributionStats",
    "PolicyRecord",
    "Provenance",
    "RecurrenceRecord",
    "RecurrentLevelRecord",
    "ReservoirDynamics",
    "TransformerRecord",
    "array_field",
    "decay_rate",
    "depth",
    "float_field",
    "from_plain",
    "mapping_field",
    "mean_profile",
    "to_plain",
]
