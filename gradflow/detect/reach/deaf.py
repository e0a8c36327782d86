"""UNSTABLE: functions with a backward pass of their own that leaves out the gradient it is handed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gradflow.detect.view import flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import DeafRecord, Evidence, FlowRecord, Issue, IssueSeverity, IssueType

_SAME = 1e-3  # of the largest: numbers that differ by less are one weight


def deaf_functions() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of functions whose backward pass does not heed what comes in.

    Measured: what the backward pass of each `torch.autograd.Function` in the graph gives for the gradient of
    a step, for minus that, and for three times it.

    Why this is evidence: the chain rule multiplies. What a function gives for minus a gradient is minus what
    it gives for it, and one that clips gradients or brings them to unit length keeps the sign. Where all
    three are equal to the bit and not zero, the gradient of what follows is left out, with all its signs,
    weights and means: a term that is subtracted is descended as if it were added, and the loss climbs.

    Looks alike and is not: estimators that hand a gradient straight on, reverse it, clip it or make it of
    unit length; a function that returns zeros or nothing on purpose; one that adds a term of its own to what
    comes in; a function that is the loss itself, for which the gradient that comes in is 1. Where one and the
    same positive weight stands between all its uses and the loss, that weight alone is lost: LOW.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        by_name: dict[str, list[DeafRecord]] = {}
        for one in record.reach.deaf if record.reach is not None else ():
            by_name.setdefault(one.name, []).append(one)
        for several in by_name.values():
            least, largest = min(d.least for d in several), max(d.largest for d in several)
            size = max(abs(least), abs(largest))
            uniform = largest - least <= _SAME * size
            if uniform and abs(largest - 1) <= _SAME:
                continue
            severity = IssueSeverity.LOW if uniform and least > 0 else IssueSeverity.MEDIUM
            yield _issue(record, several, IssueSeverity.HIGH if least < 0 else severity, least, largest)

    return detector


def _issue(
    record: FlowRecord, several: Sequence[DeafRecord], severity: IssueSeverity, least: float, largest: float
) -> Issue:
    name = several[0].name
    layer = flow_of(record).layers.get(node_name(several[0].layer_at))
    uses = "" if len(several) == 1 else f" in {len(several)} uses"
    uphill = (
        " Where that is negative, a step of the optimizer goes uphill: what should fall is made to rise."
        if least < 0
        else ""
    )
    return Issue(
        layer=several[0].layer_at,
        layer_type=layer.type if layer is not None else record.provenance.model or "model",
        issue_type=IssueType.UNSTABLE,
        severity=severity,
        description=f"The backward pass of {name}, which takes its output, leaves out the gradient that it "
        f"is handed{uses}: it gives the same to the bit for that gradient, for minus that and for three "
        f"times it. What it was handed runs from {least:.3g} to {largest:.3g}, so every sign, weight and "
        f"mean between {name} and the loss is lost on all layers before it.{uphill}",
        magnitude=float(len(several)),
        recommended_actions=(
            f"Multiply what {name}.backward returns by the gradient it is handed, in the output's shape: "
            "`return grad_output.unsqueeze(-1) * slope`, one factor for each number that forward returned.",
            f"Check it in double precision: `torch.autograd.gradcheck({name}.apply, inputs)`.",
        ),
        metrics={"function": name, "least": least, "largest": largest},
        evidence=Evidence(op=name),
    )
