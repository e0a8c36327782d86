"""Units that are copies of one another, and that no step tells apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.detect.parts.peers import type_of
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType, ParameterRecord, TwinsRecord


def copied_units(alike: float = 1e-4, *, severe: float = 0.25) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of units that start as copies and stay copies.

    Measured: rows and columns of every trainable parameter that are equal to the bit in the first step, where
    they are at least half; and how far the gradients of equal ones are apart.

    Why this is evidence: units with the same weights and the same gradient take the same step, and are the
    same unit for ever. That is told by the first step, whatever the optimizer: what shows later is rounding,
    which an adaptive optimizer blows up to something that only looks like learning.

    Looks alike and is not: copies whose gradients differ, since what reads them tells them apart: one step
    ends that, so it is not told; slices of zeros, and those that no gradient reaches, which are other
    detectors' matter.

    Args:
        alike: distance of two gradients over the larger, below which they are the same but for rounding.
        severe: share of different slices below which it is HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        by_name = {p.name: p for p in record.parameters}
        told: set[str] = set()
        for twins in sorted(record.parts.twins, key=lambda t: t.axis):
            parameter = by_name.get(twins.name)
            if parameter is None or parameter.layer in told or not twins.gradient_apart <= alike:
                continue
            if parameter.trainable and parameter.optimized:
                told.add(parameter.layer)
                yield _issue(parameter, twins, type_of(record, parameter.layer), severe)

    return detector


def _issue(parameter: ParameterRecord, twins: TwinsRecord, kind: str, severe: float) -> Issue:
    share = twins.num_different / twins.num_slices
    slices = "rows" if twins.axis == 0 else "columns"
    short = parameter.name.rpartition(".")[2]
    return Issue(
        layer=parameter.layer,
        layer_type=kind,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if share <= severe else IssueSeverity.MEDIUM,
        description=f"Of the {twins.num_slices} {slices} of its {short} only {twins.num_different} "
        f"differ: the others are copies, equal to the bit, and their gradients are the same to "
        f"{twins.gradient_apart:.0e}. Every step leaves them copies, and they do the work of "
        f"{twins.num_different}.",
        magnitude=share,
        recommended_actions=(
            f"Draw {parameter.name} at random (nn.init.xavier_uniform_, kaiming_normal_): constant or "
            "repeated values give units that can never differ.",
            "If units were copied to make the layer wider, add noise to the copies.",
        ),
        metrics={
            "parameter": parameter.name,
            "axis": twins.axis,
            "slices": twins.num_slices,
            "different": twins.num_different,
        },
    )
