"""`compare`: what changed between two records of a model, in numbers, in the graph and in the verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np

from gradflow.detect import detect
from gradflow.diagnosis import detectors_of
from gradflow.errors import RecordInputError
from gradflow.graph import GraphChange
from gradflow.records import FlowRecord, Issue, every_scalar, float_field
from gradflow.report import Report
from gradflow.report.text.comparison import comparison_text

_WHOLE_SHARE = math.log(100)  # a share that goes from 0 to 1 counts as much as a factor of a hundred
_SHARES = frozenset({
    "output_zero_share", "output_variation", "fired_share", "saturated_share", "never_fired",
    "always_saturated", "gradient_zero_share", "attention_entropy_share", "attention_max_weight",
    "attention_residual", "attention_slope", "attention_head_diversity", "policy_entropy_share",
    "policy_max_prob", "policy_mixture_share", "loss_share_left",
})  # fmt: skip
_GRADIENTS = frozenset({"gradient_rms", "weight_gradient_rms"})


@attrs.frozen(kw_only=True)
class NumberChange:
    """How a number changed.

    Args:
        name: what it is, as `every_scalar` calls it: `gradient_rms/encoder.0`.
        before, after: its values.
        size: |ln(after / before)|, for gradients less the shift that all share; of a share the difference
            times ln 100. Infinite where one of the two is exactly zero or not finite.
    """

    name: str
    before: float = float_field()
    after: float = float_field()
    size: float = float_field()

    @property
    def where(self) -> str:
        """The layer, parameter or activation it is about; "" for the whole model."""
        return self.name.partition("/")[2]


@attrs.frozen(kw_only=True)
class Comparison:
    """What changed from one record to another. `print(comparison)` tells it in words.

    Args:
        numbers: what both have, largest change first.
        common_shift: median ln(after / before) over the gradients of all layers: a change that all share,
            such as a smaller loss.
        begun: issues that are only there after.
        ended: issues that were only there before.
        lasting: issues that are there in both: as they were, and as they are.
        layers_before: layer calls that are only there before.
        layers_after: layer calls that are only there after.
        graph: what changed in the layer graph; None where either record has none.
    """

    numbers: tuple[NumberChange, ...]
    common_shift: float = float_field()
    begun: tuple[Issue, ...] = ()
    ended: tuple[Issue, ...] = ()
    lasting: tuple[tuple[Issue, Issue], ...] = ()
    layers_before: tuple[str, ...] = ()
    layers_after: tuple[str, ...] = ()
    graph: GraphChange | None = None

    def __str__(self) -> str:
        return comparison_text(self)


def compare(before: FlowRecord | Report, after: FlowRecord | Report, *, pipeline: Any = None) -> Comparison:
    """Return what changed from one record of a model to another: two checkpoints, two settings, two seeds.

    Args:
        before: a record, or a report, whose issues are then those that are compared.
        after: the same, of the same model or one much like it: layers are matched by name.
        pipeline: judges records; as for `gradflow.diagnose`.

    Raises:
        RecordInputError: if either is something else.
        PipelineError: if `pipeline` cannot be used as one.

    >>> import torch
    >>> from torch import nn
    >>> from gradflow.functional.analyze import analyze
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(16, 4)
    >>> before = analyze(model, [x], lambda y: y.square().mean())
    >>> _ = nn.init.normal_(model[2].weight, std=50.0)
    >>> change = compare(before, analyze(model, [x], lambda y: y.square().mean()))
    >>> next(number.where for number in change.numbers if number.where)
    '2.weight'
    """
    (one, issues_before), (two, issues_after) = (
        _read(side, value, pipeline) for side, value in (("before", before), ("after", after))
    )
    numbers, shift = _numbers(every_scalar(one), every_scalar(two))
    was, now = ({(i.layer, i.issue_type): i for i in issues} for issues in (issues_before, issues_after))
    names_before, names_after = ([layer.name for layer in record] for record in (one, two))
    both_graphs = one.graph_record is not None and two.graph_record is not None
    return Comparison(
        numbers=numbers,
        common_shift=shift,
        begun=tuple(issue for key, issue in now.items() if key not in was),
        ended=tuple(issue for key, issue in was.items() if key not in now),
        lasting=tuple((was[key], issue) for key, issue in now.items() if key in was),
        layers_before=tuple(name for name in names_before if name not in set(names_after)),
        layers_after=tuple(name for name in names_after if name not in set(names_before)),
        graph=one.graph.compare(two.graph) if both_graphs else None,
    )


def _read(side: str, value: Any, pipeline: Any) -> tuple[FlowRecord, Iterable[Issue]]:
    if isinstance(value, Report):
        return value.record, value.issues
    if isinstance(value, FlowRecord):
        return value, detect(value, detectors_of(pipeline, "compare"))
    raise RecordInputError(
        f"compare: {side} is a {type(value).__name__}; pass a FlowRecord or a Report: "
        "`gradflow.analyze` and `gradflow.diagnose` return them, `from_json` reads them."
    )


def _numbers(before: dict[str, float], after: dict[str, float]) -> tuple[tuple[NumberChange, ...], float]:
    """Return the changes of the numbers in both, largest first, and the shift that gradients share."""
    names = [name for name in before if name in after]
    ratios = {name: _log_ratio(before[name], after[name]) for name in names}
    shifts = [ratios[n] for n in names if n.partition("/")[0] in _GRADIENTS and math.isfinite(ratios[n])]
    shift = float(np.median(shifts)) if shifts else 0.0
    changes = []
    for name in names:
        quantity = name.partition("/")[0]
        if quantity in _SHARES:
            size = _WHOLE_SHARE * abs(after[name] - before[name])
        else:
            size = abs(ratios[name] - (shift if quantity in _GRADIENTS else 0.0))
        changes.append(NumberChange(name=name, before=before[name], after=after[name], size=size))
    known = [change for change in changes if not math.isnan(change.size)]
    return tuple(sorted(known, key=lambda change: -change.size)), shift


def _log_ratio(before: float, after: float) -> float:
    """Return ln(after / before) of magnitudes: 0 where they are equal, infinite where one of them is zero."""
    if before == after:
        return 0.0
    low, high = abs(before), abs(after)
    if math.isinf(low) or math.isinf(high) or (before < 0) != (after < 0):
        return math.inf
    if low == 0 or high == 0:
        return math.inf if high else -math.inf
    return math.log(high / low)
