"""The immutable records that every part of gradflow hands to the next, and the enums.

A record holds numbers and names, never a tensor and never a verdict, with two exceptions that are
verdicts by definition: `Issue` and `Cause`. Arrays are read-only NumPy arrays whose first axis is the
step; a value that was not measured at a step is NaN. Nothing here imports torch.
"""

import attrs

from gradflow.records.attention import (
    AttentionGradients,
    AttentionRecord,
    AttentionScores,
    AttentionStats,
    BranchRecord,
    TransformerRecord,
)
from gradflow.records.evidence import Evidence, Role
from gradflow.records.fields import (
    NAN,
    Bools,
    Floats,
    Ints,
    array_field,
    float_field,
    mapping_field,
    text_lines,
)
from gradflow.records.flow import FlowRecord, Provenance, check_record, read
from gradflow.records.graph import EdgeRecord, GraphRecord, NodeRecord
from gradflow.records.history import EventRecord, HistoryRecord
from gradflow.records.issues import (
    AnyIssueType,
    Cause,
    Issue,
    IssueSeverity,
    IssueType,
    OwnIssueType,
    check_causes,
    check_issues,
    issue_type,
    type_place,
)
from gradflow.records.knowledge import KnowledgeRecord
from gradflow.records.measured import (
    ActivationRecord,
    LayerRecord,
    NumericalRecord,
    ParameterRecord,
    num_last,
)
from gradflow.records.parts import (
    AnswersRecord,
    BlockRecord,
    ChoiceRecord,
    DrawRecord,
    DropoutRecord,
    EndsRecord,
    MatrixRecord,
    NormRecord,
    PartsRecord,
    QuotientRecord,
    RowsRecord,
    SamplesRecord,
    ScanRecord,
    SightRecord,
    TurnsRecord,
    TwinsRecord,
)
from gradflow.records.policy import ActionDeviation, ActionDistribution, PolicyDistributionStats, PolicyRecord
from gradflow.records.precision import (
    ExponentHistogram,
    LayerPrecision,
    ParameterPrecision,
    PrecisionRecord,
    ScalerRecord,
    SubnormalRecord,
)
from gradflow.records.processes import (
    DifferenceRecord,
    ExchangeRecord,
    ProcessesRecord,
    SharesRecord,
)
from gradflow.records.reach import DeafRecord, OutsideRecord, ReachAccount, ReachRecord, Reason, TermRecord
from gradflow.records.recurrent import (
    GateRecord,
    RecurrenceRecord,
    RecurrentLevelRecord,
    ReservoirDynamics,
    decay_rate,
    depth,
    mean_profile,
)
from gradflow.records.remedies import FINAL_SHARE, TrialRecord, TrialsRecord, TrialVerdict, final_losses
from gradflow.records.saving.plain import FORMAT_VERSION, from_plain, to_plain, write
from gradflow.records.saving.registered import register_record
from gradflow.records.scalars import every_scalar, few_scalars
from gradflow.records.updates import CurvatureRecord, UpdateRecord, UpdatesRecord
from gradflow.records.values import ReadOnlyMapping, frozen, unkept

for _cls in [value for value in globals().values() if isinstance(value, type) and attrs.has(value)]:
    register_record(_cls)

__all__ = [
    "FINAL_SHARE",
    "FORMAT_VERSION",
    "NAN",
    "ActionDeviation",
    "ActionDistribution",
    "ActivationRecord",
    "AnswersRecord",
    "AnyIssueType",
    "AttentionGradients",
    "AttentionRecord",
    "AttentionScores",
    "AttentionStats",
    "BlockRecord",
    "Bools",
    "BranchRecord",
    "Cause",
    "ChoiceRecord",
    "CurvatureRecord",
    "DeafRecord",
    "DifferenceRecord",
    "DrawRecord",
    "DropoutRecord",
    "EdgeRecord",
    "EndsRecord",
    "EventRecord",
    "Evidence",
    "ExchangeRecord",
    "ExponentHistogram",
    "Floats",
    "FlowRecord",
    "GateRecord",
    "GraphRecord",
    "HistoryRecord",
    "Ints",
    "Issue",
    "IssueSeverity",
    "IssueType",
    "KnowledgeRecord",
    "LayerPrecision",
    "LayerRecord",
    "MatrixRecord",
    "NodeRecord",
    "NormRecord",
    "NumericalRecord",
    "OutsideRecord",
    "OwnIssueType",
    "ParameterPrecision",
    "ParameterRecord",
    "PartsRecord",
    "PolicyDistributionStats",
    "PolicyRecord",
    "PrecisionRecord",
    "ProcessesRecord",
    "Provenance",
    "QuotientRecord",
    "ReachAccount",
    "ReachRecord",
    "ReadOnlyMapping",
    "Reason",
    "RecurrenceRecord",
    "RecurrentLevelRecord",
    "ReservoirDynamics",
    "Role",
    "RowsRecord",
    "SamplesRecord",
    "ScalerRecord",
    "ScanRecord",
    "SharesRecord",
    "SightRecord",
    "SubnormalRecord",
    "TermRecord",
    "TransformerRecord",
    "TrialRecord",
    "TrialVerdict",
    "TrialsRecord",
    "TurnsRecord",
    "TwinsRecord",
    "UpdateRecord",
    "UpdatesRecord",
    "array_field",
    "check_causes",
    "check_issues",
    "check_record",
    "decay_rate",
    "depth",
    "every_scalar",
    "few_scalars",
    "final_losses",
    "float_field",
    "from_plain",
    "frozen",
    "issue_type",
    "mapping_field",
    "mean_profile",
    "num_last",
    "read",
    "register_record",
    "text_lines",
    "to_plain",
    "type_place",
    "unkept",
    "write",
]
