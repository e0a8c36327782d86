"""gradflow tells why a PyTorch model does not train: which layer, of what, how sure, what to change.

import gradflow as gf

report = gf.diagnose(model, batches, loss_fn)
print(report)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradflow import errors as errors
    from gradflow import functional as functional
    from gradflow import graph as graph
    from gradflow import pipelines as pipelines
    from gradflow import records as records
    from gradflow import remedies as remedies
    from gradflow import report as report
    from gradflow.analyzers import (
        FlowAnalyzer,
        GradientFlowAnalyzer,
        RecurrentAnalyzer,
        RLPolicyAnalyzer,
        TransformerAnalyzer,
    )
    from gradflow.comparing import Comparison, compare
    from gradflow.detect import (
        Rule,
        all_of,
        bottleneck,
        dead,
        default_detectors,
        detect,
        exploding,
        find_causes,
        numerical,
        only,
        remap,
        saturation,
        unstable,
        vanishing,
        without,
    )
    from gradflow.diagnosis import diagnose, diagnose_custom, layer_graph
    from gradflow.errors import GradflowError
    from gradflow.functional.analyze import analyze, analyze_custom
    from gradflow.functional.attention.measurement import attention_weights
    from gradflow.functional.jacobian.gradient_field import field_jacobian, vector_field
    from gradflow.functional.jacobian.layer_jacobian import (
        jacobian_between,
        layer_function,
        layer_gain,
        layer_jvp,
        layer_spectrum,
        layer_vjp,
    )
    from gradflow.functional.jacobian.per_sample import gradient_noise, per_sample_gradients
    from gradflow.functional.jacobian.sample_losses import sample_losses
    from gradflow.functional.measurement import Measurement, Session
    from gradflow.functional.outline import outline
    from gradflow.functional.policy.gradients import head_gradients
    from gradflow.functional.policy.statistics import action_entropy
    from gradflow.functional.processes.group import OnRank
    from gradflow.functional.recurrent.unroll import hidden_gradients
    from gradflow.functional.scale import GradientScale, gradient_scale
    from gradflow.pipelines import Pipeline, automatic, flow
    from gradflow.records import (
        AttentionStats,
        Cause,
        EventRecord,
        Evidence,
        FlowRecord,
        HistoryRecord,
        Issue,
        IssueSeverity,
        IssueType,
        OwnIssueType,
        PolicyDistributionStats,
        ReachAccount,
        ReachRecord,
        Reason,
        ReservoirDynamics,
        Role,
        TrialRecord,
        TrialsRecord,
        TrialVerdict,
        issue_type,
        register_record,
    )
    from gradflow.records import Issue as GradientIssue
    from gradflow.remedies import Remedy, try_remedies
    from gradflow.report import Report
    from gradflow.watching import Monitor, Observer, ObserverState, observer, read_history

# NOTE [Names loaded on first use]
# `gradflow --version`, `gradflow --help` and reading a saved record need no torch, which takes seconds to
# import. So the public names are loaded when they are first asked for, from the places below.
# One name needs more: `gradflow.detect` is the function, yet importing the subpackage of the same name
# makes Python set the package's attribute to the subpackage. A property on the module's class comes before
# the module's own attributes, so the function wins whoever imports what first; the subpackage itself is
# reached by `from gradflow.detect import ...` as always (`import gradflow.detect.x as y` cannot work).

_PLACES = {
    "gradflow.analyzers": (
        "FlowAnalyzer",
        "GradientFlowAnalyzer",
        "RLPolicyAnalyzer",
        "RecurrentAnalyzer",
        "TransformerAnalyzer",
    ),
    "gradflow.detect": (
        "Rule",
        "all_of",
        "bottleneck",
        "dead",
        "default_detectors",
        "exploding",
        "find_causes",
        "numerical",
        "only",
        "remap",
        "saturation",
        "unstable",
        "vanishing",
        "without",
    ),
    "gradflow.comparing": ("Comparison", "compare"),
    "gradflow.diagnosis": ("diagnose", "diagnose_custom", "layer_graph"),
    "gradflow.errors": ("GradflowError",),
    "gradflow.functional.analyze": ("analyze", "analyze_custom"),
    "gradflow.functional.attention.measurement": ("attention_weights",),
    "gradflow.functional.jacobian.gradient_field": ("field_jacobian", "vector_field"),
    "gradflow.functional.jacobian.layer_jacobian": (
        "jacobian_between",
        "layer_function",
        "layer_gain",
        "layer_jvp",
        "layer_spectrum",
        "layer_vjp",
    ),
    "gradflow.functional.jacobian.per_sample": ("gradient_noise", "per_sample_gradients"),
    "gradflow.functional.jacobian.sample_losses": ("sample_losses",),
    "gradflow.functional.measurement": ("Measurement", "Session"),
    "gradflow.functional.outline": ("outline",),
    "gradflow.functional.policy.gradients": ("head_gradients",),
    "gradflow.functional.policy.statistics": ("action_entropy",),
    "gradflow.functional.processes.group": ("OnRank",),
    "gradflow.functional.scale": ("GradientScale", "gradient_scale"),
    "gradflow.functional.recurrent.unroll": ("hidden_gradients",),
    "gradflow.pipelines": ("Pipeline", "automatic", "flow"),
    "gradflow.records": (
        "AttentionStats",
        "Cause",
        "EventRecord",
        "Evidence",
        "FlowRecord",
        "HistoryRecord",
        "Issue",
        "IssueSeverity",
        "IssueType",
        "OwnIssueType",
        "PolicyDistributionStats",
        "ReachAccount",
        "ReachRecord",
        "Reason",
        "ReservoirDynamics",
        "Role",
        "TrialRecord",
        "TrialVerdict",
        "TrialsRecord",
        "issue_type",
        "register_record",
    ),
    "gradflow.remedies": ("Remedy", "try_remedies"),
    "gradflow.report": ("Report",),
    "gradflow.watching": ("Monitor", "Observer", "ObserverState", "observer", "read_history"),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
_ALIASES = {"GradientIssue": "Issue"}
_SUBMODULES = ("errors", "functional", "graph", "pipelines", "records", "remedies", "report")

try:
    __version__ = importlib.metadata.version("gradient-flow")
except importlib.metadata.PackageNotFoundError:  # run from a copy of the source that was not installed
    __version__ = "0+unknown"


class _Package(types.ModuleType):
    """This package's module; see NOTE [Names loaded on first use]."""

    def __getattr__(self, name: str) -> Any:
        if name in _SUBMODULES:
            return importlib.import_module(f"gradflow.{name}")
        source = _ALIASES.get(name, name)
        if source not in _PLACE_OF:
            raise AttributeError(f"module 'gradflow' has no attribute {name!r}")
        value = getattr(importlib.import_module(_PLACE_OF[source]), source)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__, *_SUBMODULES})

    @property
    def detect(self) -> Any:
        """The function `gradflow.detect.detect`."""
        return importlib.import_module("gradflow.detect").detect

    @detect.setter
    def detect(self, subpackage: types.ModuleType) -> None:
        """Ignore what the import of the subpackage sets."""


sys.modules[__name__].__class__ = _Package

__all__ = [
    "AttentionStats",
    "Cause",
    "Comparison",
    "EventRecord",
    "Evidence",
    "FlowAnalyzer",
    "FlowRecord",
    "GradflowError",
    "GradientFlowAnalyzer",
    "GradientIssue",
    "GradientScale",
    "HistoryRecord",
    "Issue",
    "IssueSeverity",
    "IssueType",
    "Measurement",
    "Monitor",
    "Observer",
    "ObserverState",
    "OnRank",
    "OwnIssueType",
    "Pipeline",
    "PolicyDistributionStats",
    "RLPolicyAnalyzer",
    "ReachAccount",
    "ReachRecord",
    "Reason",
    "RecurrentAnalyzer",
    "Remedy",
    "Report",
    "ReservoirDynamics",
    "Role",
    "Rule",
    "Session",
    "TransformerAnalyzer",
    "TrialRecord",
    "TrialVerdict",
    "TrialsRecord",
    "__version__",
    "action_entropy",
    "all_of",
    "analyze",
    "analyze_custom",
    "attention_weights",
    "automatic",
    "bottleneck",
    "compare",
    "dead",
    "default_detectors",
    "detect",
    "diagnose",
    "diagnose_custom",
    "exploding",
    "field_jacobian",
    "find_causes",
    "flow",
    "gradient_noise",
    "gradient_scale",
    "head_gradients",
    "hidden_gradients",
    "issue_type",
    "jacobian_between",
    "layer_function",
    "layer_gain",
    "layer_graph",
    "layer_jvp",
    "layer_spectrum",
    "layer_vjp",
    "numerical",
    "observer",
    "only",
    "outline",
    "per_sample_gradients",
    "read_history",
    "register_record",
    "remap",
    "sample_losses",
    "saturation",
    "try_remedies",
    "unstable",
    "vanishing",
    "vector_field",
    "without",
]
