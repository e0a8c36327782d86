"""DEAD: parameters that get a gradient and that no optimizer holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gradflow.detect.evidence import last_layers
from gradflow.detect.knowledge import came_knowing
from gradflow.detect.updates.readings import layer_of
from gradflow.detect.view import flow_of
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType, ParameterRecord


def unheld_parameters() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of parameters that get a gradient and that the optimizer does not hold.

    Measured: which parameters the optimizer holds, which of them belong to no module, and which of the
    others get a gradient.

    Why this is evidence: such a parameter stays what it is for ever. Where the optimizer also holds tensors
    that no module has, it was built before a part of the model was replaced: a new head, a converted layer.
    So it is HIGH then. Of parts of one stack (`blocks.0`, `blocks.1`, ...) it is MEDIUM for one behind a part
    that is held: whoever trains a part of a stack trains its end. And for the one layer of several outputs
    that the loss sets against each sample's own target (class prototypes, a classifier), where all before it
    is held and the model did not come knowing: its rows stay as random as they started, and the rest is bent
    to them.

    Looks alike and is not: one player of a game while the other one is trained (a judge gives one number, has
    layers of its own, and is asked the same of all samples), a head that is trained alone on features that
    stay, a head that came trained, a network that only measures (a perceptual loss): told as LOW.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if record.updates is None:
            return []
        left = [p for p in record.parameters if p.trainable and not p.optimized and _gets_gradient(p)]
        if not left:
            return []
        stale = record.updates.stale
        behind, answers = _behind_its_like(record, left), _gives_the_answers(record, left)
        severity = IssueSeverity.MEDIUM if behind or answers else IssueSeverity.LOW
        severity = IssueSeverity.HIGH if stale else severity
        return [_issue(record, behind or left, left, severity, answers=answers and not stale)]

    return detector


def _gets_gradient(parameter: ParameterRecord) -> bool:
    return bool(np.nanmax(np.nan_to_num(parameter.grad_norm), initial=0.0) > 0)


def _stack_of(name: str) -> tuple[str, int] | None:
    """Return the stack that a parameter's owner is a part of, and which: blocks.3.fc.weight → (blocks, 3)."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def _behind_its_like(record: FlowRecord, left: Sequence[ParameterRecord]) -> list[ParameterRecord]:
    """Return those left out of a stack whole, while a part before them is held."""
    first: dict[str, int] = {}
    some: set[tuple[str, int]] = set()
    for parameter in record.parameters:
        if parameter.optimized and parameter.trainable and (place := _stack_of(parameter.name)):
            first[place[0]] = min(place[1], first.get(place[0], place[1]))
            some.add(place)
    places = [(parameter, _stack_of(parameter.name)) for parameter in left]
    return [p for p, at in places if at and at not in some and at[0] in first and at[1] > first[at[0]]]


def _gives_the_answers(record: FlowRecord, left: Sequence[ParameterRecord]) -> bool:
    """Whether all that is left out is the one layer that gives the answers, and knows nothing of them."""
    (owner, *others) = {p.layer for p in left}
    matrices = [p for p in left if len(p.shape) == 2]
    held = [p for p in record.parameters if p.trainable and p.optimized]
    if others or not held or not any(min(p.shape) >= 2 for p in matrices) or came_knowing(record):
        return False
    flow = flow_of(record)
    ends = [node for node in last_layers(flow) if flow.layers[node].module == owner]
    before = {owned.name for n in ends for b in flow.wiring.upstream(n) & flow.layers.keys()
              for owned in flow.parameters_of(b)}  # fmt: skip
    return bool(ends) and before >= {p.name for p in held} and _has_targets(record)


def _has_targets(record: FlowRecord) -> bool:
    """Whether the loss asks each sample for something of its own: another's outputs cost something else."""
    known = record.knowledge
    return known is not None and abs(known.shuffled - known.loss) > 1e-3 * abs(known.loss)


def _issue(
    record: FlowRecord,
    worst: Sequence[ParameterRecord],
    left: Sequence[ParameterRecord],
    severity: IssueSeverity,
    *,
    answers: bool,
) -> Issue:
    stale = record.updates.stale if record.updates is not None else ()
    layer, kind = layer_of(record, worst[0].name)
    number = sum(p.num_elements for p in left)
    names = ", ".join(p.name for p in left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    also = (
        f" It does hold {len(stale)} tensor(s) that no module has ({stale[0]}): it was built before a part "
        "of the model was replaced."
        if stale
        else ""
    )
    random = (
        " It is what the loss sets against the targets: it stays as it was drawn, and all that is held before"
        " it can but bend to that."
    )
    return Issue(
        layer=layer,
        layer_type=kind,
        issue_type=IssueType.DEAD,
        severity=severity,
        description=f"{names}: a gradient arrives, and {record.provenance.optimizer} does not hold them, so "
        f"{number:,} numbers stay what they are.{also}{random if answers else ''}",
        magnitude=float(number),
        recommended_actions=(
            "Build the optimizer on the whole model, after its last change: "
            f"torch.optim.{record.provenance.optimizer.partition(',')[0]}(model.parameters(), ...).",
            "If they are meant to stay, freeze them: requires_grad_(False). If another optimizer holds them, "
            "pass both.",
        ),
        metrics={"parameters": tuple(p.name for p in left), "elements": number, "stale": len(stale)},
    )
