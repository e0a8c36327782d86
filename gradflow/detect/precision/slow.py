"""NUMERICAL, of time: subnormal numbers, which take many processors ten to a hundred times as long."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.records import (
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    RecurrenceRecord,
    Role,
    SubnormalRecord,
)
from gradflow.records.formats import FORMATS

_SERIOUS = 0.25  # of all numbers: then nearly all of the time is spent on them


def crawling(share: float = 0.01) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of gradients among the smallest numbers of their format, which are slow.

    Measured: of the numbers that operations are handed in the reverse pass on a CPU, the share that is
    subnormal (float32: below 1.2e-38, and not zero). Of a recurrent layer that is one fused operation, the
    share of time steps whose gradient is so small (`RecurrenceRecord.subnormal_share`).

    Why this is evidence: many processors hand an operation on such a number to microcode. How long that
    takes depends on the processor; on all of them the numbers are too small to change a weight.

    Looks alike and is not: exact zeros, which are as fast as any number; subnormal numbers of float16, which
    a CPU computes with in float32; a processor that is set to flush them.

    Args:
        share: of the numbers, from which on it is told: LOW, and MEDIUM from 0.25 on. A hundredth, of which
            each takes a hundred times as long, doubles the time.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        known = record.precision
        if record.provenance.device != "cpu":
            return
        told = set()
        if known is not None and not known.flushes and (found := known.subnormals):
            total = sum(part.num_elements for part in found)
            slow = sum(part.num_subnormal for part in found)
            if slow >= share * total > 0:
                worst = max(found, key=lambda part: part.num_subnormal)
                told.add(worst.layer)
                yield _issue(record, worst, slow / total)
        for recurrence in record.recurrences:
            slow_steps = recurrence.subnormal_share
            of_steps = float(slow_steps[-1]) if len(slow_steps) else 0.0
            if of_steps >= share and recurrence.name not in told:
                yield _recurrent_issue(recurrence, of_steps)

    return detector


def _issue(record: FlowRecord, worst: SubnormalRecord, share: float) -> Issue:
    layer = next((layer for layer in record.layers if layer.name == worst.layer), None)
    smallest = f"{2.0 ** FORMATS[worst.dtype].least:.1e}"
    return _told(
        worst.layer,
        layer.type if layer is not None else record.provenance.model,
        IssueSeverity.MEDIUM if share >= _SERIOUS else IssueSeverity.LOW,
        share,
        f"{share:.2g} of the numbers in the reverse pass are subnormal (below {smallest} in {worst.dtype}), "
        "most of them here",
    )


def _recurrent_issue(recurrence: RecurrenceRecord, share: float) -> Issue:
    return _told(
        recurrence.name,
        recurrence.type,
        IssueSeverity.LOW,
        share,
        f"Over {share:.2g} of its time steps the gradient is subnormal (below 1.2e-38)",
        pays=f", its reverse pass up to {1 + 99 * share:.2g} times",
    )


def _told(layer: str, kind: str, severity: IssueSeverity, share: float, what: str, pays: str = "") -> Issue:
    return Issue(
        layer=layer,
        layer_type=kind,
        issue_type=IssueType.NUMERICAL,
        severity=severity,
        description=f"{what}: too small to change a weight, and many processors take ten to a hundred times "
        f"as long for them{pays}.",
        magnitude=share,
        recommended_actions=(
            "Call torch.set_flush_denormal(True) before training, in the thread that trains: such numbers "
            "become zero, and the reverse pass takes its usual time.",
            "End the decay that makes them: see the verdict on the gradient itself, or cut the sequence "
            "where nothing comes back any more.",
        ),
        metrics={"share": share},
        evidence=Evidence(roles=Role.SUBNORMAL),
    )
