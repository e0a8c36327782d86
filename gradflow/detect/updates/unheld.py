"""DEAD: parameters that get a gradient and that no optimizer holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gradflow.detect.evidence import last_layers, late
from gradflow.detect.knowledge import came_knowing
from gradflow.detect.updates.readings import layer_of
from gradflow.detect.view import flow_of
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType, ParameterRecord

_HEARD = 1e-3  # of the usual gradient of a number that is held: what gets less is asked for nothing
_ANSWERS = (
    " That is what the loss sets against the targets: it stays as it was drawn, and all that is held before"
    " it can but bend to that."
)
_BESIDE = (
    " Every layer with a matrix is held: an optimizer that is gathered from layers of some kinds does not"
    " find what a module owns beside the layers inside it."
)


def unheld_parameters() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of parameters that get a gradient and that the optimizer does not hold.

    Measured: which parameters the optimizer holds, which of them belong to no module, and which of the
    others get a gradient.

    Why this is evidence: such a parameter stays what it is for ever. Where the optimizer also holds tensors
    that no module has, it was built before a part of the model was replaced: a new head, a converted layer.
    So it is HIGH then. Of parts of one stack (`blocks.0`, `blocks.1`, ...) it is MEDIUM for one behind a part
    that is held: whoever trains a part of a stack trains its end. And for the one layer of several outputs
    that the loss sets against each sample's own target (class prototypes, a classifier), or all of several
    heads beside one another, where all before them is held and the model did not come knowing: their rows
    stay as random as they started, and the rest is bent to them.

    Where every layer is held whole, or not at all and has no matrix, and what is left are parameters that
    modules own beside the layers inside them (weights of a fusion, gains, a table of positions), the
    optimizer was gathered from layers of some kinds, and those were forgotten: MEDIUM, if they get a gradient
    that counts and stay what they are.

    Looks alike and is not: one player of a game while the other one is trained (a judge gives one number, has
    layers of its own, and is asked the same of all samples), a head that is trained alone on features that
    stay, all matrices in an optimizer of their own, normalisations that stay, a head that came trained, a
    network that only measures (a perceptual loss): told as LOW.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if record.updates is None:
            return []
        left = [p for p in record.parameters if p.trainable and not p.optimized and _gets_gradient(p)]
        if not left:
            return []
        stale = record.updates.stale
        behind, answers = _behind_its_like(record, left), _gives_the_answers(record, left)
        beside = [] if behind or answers else _beside_what_is_held(record, left)
        severity = IssueSeverity.MEDIUM if behind or answers or beside else IssueSeverity.LOW
        severity = IssueSeverity.HIGH if stale else severity
        why = "" if stale else _ANSWERS if answers else _BESIDE if beside else ""
        return [_issue(record, behind or beside or left, left, severity, why)]

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


def _beside_what_is_held(record: FlowRecord, left: Sequence[ParameterRecord]) -> list[ParameterRecord]:
    """Return those that modules own beside held layers inside them, if what is held was gathered by layers.

    So it looks where every layer that has no parts is held whole, or is left whole and has no matrix, as a
    norm. Not what is written to otherwise (a running mean), nor what hardly gets a gradient beside the rest,
    nor in a model that came knowing.
    """
    by_owner: dict[str, list[ParameterRecord]] = {}
    for p in record.parameters:
        if p.trainable:
            by_owner.setdefault(p.name.rpartition(".")[0], []).append(p)
    holders = {owner[:i] for owner in by_owner for i, letter in enumerate(owner) if letter == "."}
    holders |= {""} if any(by_owner) else set()
    for owner, own in by_owner.items():
        held = [p for p in own if p.optimized]
        if owner not in holders and len(held) < len(own) and (held or any(len(p.shape) > 1 for p in own)):
            return []
    usual = np.median([_per_number(p) for own in by_owner.values() for p in own if p.optimized] or [math.inf])
    names = {p.name for p in left}
    beside = [p for owner in holders & by_owner.keys() for p in by_owner[owner] if p.name in names]
    told = [
        p for p in beside
        if _per_number(p) >= _HEARD * usual and np.ptp(p.norm) == 0 and _holds_inside(record, p)
    ]  # fmt: skip
    place = {p.name: i for i, p in enumerate(record.parameters)}
    return [] if came_knowing(record) else sorted(told, key=lambda p: place[p.name])


def _per_number(parameter: ParameterRecord) -> float:
    return late(parameter.grad_norm) / math.sqrt(max(parameter.num_elements, 1))


def _holds_inside(record: FlowRecord, parameter: ParameterRecord) -> bool:
    """Whether the module that owns a parameter has parts of which the optimizer holds some."""
    owner = parameter.name.rpartition(".")[0]
    start = f"{owner}." if owner else ""
    inside = (p for p in record.parameters if p.name.startswith(start) and "." in p.name[len(start) :])
    return any(p.optimized for p in inside)


def _gives_the_answers(record: FlowRecord, left: Sequence[ParameterRecord]) -> bool:
    """Whether all that is left out are the layers that give the answers, and they know nothing of them.

    One layer that stands at the end; or several ends, whose layers before them, if any, serve no other end: a
    trunk that they share may be another player's, or a network that only measures.
    """
    owners = {p.layer for p in left}
    held = {p.name for p in record.parameters if p.trainable and p.optimized}
    if not held or came_knowing(record):
        return False
    flow = flow_of(record)
    ends = [node for node in last_layers(flow) if flow.layers[node].module in owners]
    answers = {flow.layers[node].module for node in ends}
    if not any(p.layer in answers and _is_wide(p) for p in left):  # a judge gives one number
        return False
    before = {n: [b for b in flow.wiring.upstream(n) if b in flow.layers] for n in ends}
    feeds = {owned.name for each in before.values() for b in each for owned in flow.parameters_of(b)}
    own = {n: {flow.layers[b].module for b in (n, *each)} & owners for n, each in before.items()}
    shared = sum(map(len, own.values())) > len(set().union(*own.values()))
    if shared or set().union(*own.values()) < owners or (len(ends) == 1 and len(owners) > 1):
        return False
    return feeds >= held and _has_targets(record)


def _is_wide(parameter: ParameterRecord) -> bool:
    """Whether a parameter is a matrix that makes several numbers of several."""
    shape = parameter.shape
    return len(shape) >= 2 and min(shape[0], math.prod(shape[1:])) >= 2


def _has_targets(record: FlowRecord) -> bool:
    """Whether the loss asks each sample for something of its own: another's outputs cost something else."""
    known = record.knowledge
    return known is not None and abs(known.shuffled - known.loss) > 1e-3 * abs(known.loss)


def _issue(
    record: FlowRecord,
    worst: Sequence[ParameterRecord],
    left: Sequence[ParameterRecord],
    severity: IssueSeverity,
    why: str,
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
    return Issue(
        layer=layer,
        layer_type=kind,
        issue_type=IssueType.DEAD,
        severity=severity,
        description=f"{names}: a gradient arrives, and {record.provenance.optimizer} does not hold them, so "
        f"{number:,} numbers stay what they are.{also}{why}",
        magnitude=float(number),
        recommended_actions=(
            "Build the optimizer on the whole model, after its last change: "
            f"torch.optim.{record.provenance.optimizer.partition(',')[0]}(model.parameters(), ...).",
            "If they are meant to stay, freeze them: requires_grad_(False). If another optimizer holds them, "
            "pass both.",
        ),
        metrics={"parameters": tuple(p.name for p in left), "elements": number, "stale": len(stale)},
    )
