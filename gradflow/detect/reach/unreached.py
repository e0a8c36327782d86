"""Parts of parameters that no gradient reaches, told by their name and reason: the rest of the detector DEAD.

What has no gradient as a whole layer is told in `dead.py`, by its wiring and by exact zeros. Here are rows
and columns, blocks of fused parameters, single parameters of a layer that trains otherwise, terms of the
loss, and tensors that no module has registered, by the account of reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import attrs

from gradflow.detect.reach.bounds import at_bounds, off_for_all
from gradflow.detect.reach.cancelled import EQUAL_CALLS, EQUAL_OUTPUTS, OF_CALLS, last_to_cancel
from gradflow.detect.reach.classes import OTHER_ACTIONS, OTHER_CLASSES, left_of_classes
from gradflow.detect.reach.factors import OWN, forgetful, is_locked, is_silent_operation, is_state
from gradflow.detect.reach.first import reads_first_step
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import (
    Evidence,
    Issue,
    IssueSeverity,
    IssueType,
    OutsideRecord,
    ReachRecord,
    Reason,
    Role,
    TermRecord,
)

MOST_CODES = 0.9  # of a table that the model picks from are never picked: what is left is no table
MANY_CODES = 0.75
_PICKS_PER_CODE = 2  # so often must have been picked for each, or chance decides
_WHOLE = 0.9  # of a parameter
_PART = 0.25  # of a parameter's rows: what is cut off is no padding
_TAKES = frozenset(("select", "slice", "split", "split_with_sizes", "unbind", "narrow", "unfold", "diagonal"))

# A zero of these comes from outside of what is at fault, or is as it should be.
_Judge = Callable[[Flow, ReachRecord, int], "Issue | None"]


def unreached_parts(flow: Flow, told: Collection[str], min_updates: int) -> Iterator[Issue]:
    """Yield the issues of parts that are not reached and should be.

    Args:
        flow: the record along its wiring.
        told: names of the layers of which something is said already.
        min_updates: steps of the optimizer after which a zero by design has ended.
    """
    account = flow.record.reach
    if account is None:
        return
    yield from (_term_issue(flow, term) for term in account.terms)
    holders: dict[str, list[OutsideRecord]] = {}
    for tensor in account.outside:
        if not tensor.optimized:
            holders.setdefault(tensor.name.split("[")[0].rpartition(".")[0], []).append(tensor)
    yield from (_outside_issue(flow, holder, tensors) for holder, tensors in holders.items())
    best: dict[str, Issue] = {}
    updates = flow.record.steps - 1 if flow.record.provenance.optimizer else 0
    for part in account.unreached:
        judge = _JUDGES.get(part.reason)
        if judge is None or part.layer in told or not _wanted(flow, part):
            continue
        issue = judge(flow, part, updates if updates >= min_updates else 0)
        if issue is not None and not (part.layer in best and best[part.layer].severity >= issue.severity):
            best[part.layer] = issue
    silent = {name: _feeder(flow, issue) for name, issue in best.items()}
    yield from (issue for name, issue in best.items() if silent[name] not in told)
    makers = {feeder: best[name] for name, feeder in silent.items() if feeder and feeder not in told}
    yield from (_silent_operation_issue(flow, feeder, issue) for feeder, issue in makers.items())


def sole_reason(flow: Flow, parameters: Collection[str]) -> ReachRecord | None:
    """Return a part that stands for all unreached ones of some parameters, if all share reason and place."""
    account = flow.record.reach
    parts = [part for name in parameters for part in account.of(name)] if account is not None else []
    alike = {(part.reason, part.at) for part in parts}
    return parts[0] if len(alike) == 1 else None


def is_moved(flow: Flow, parameters: Collection[str]) -> bool:
    """Whether all of these parameters were changed by the module's own code, though no gradient came."""
    account = flow.record.reach
    parts = [part for name in parameters for part in account.of(name)] if account is not None else []
    return bool(parts) and {p.parameter for p in parts} == set(parameters) and all(p.moved for p in parts)


def is_copied(flow: Flow, parameters: Collection[str]) -> bool:
    """Whether modules ran that are like the ones of all these parameters, which themselves did not."""
    account = flow.record.reach
    parts = [part for name in parameters for part in account.of(name)] if account is not None else []
    return {p.parameter for p in parts if p.op == "copy"} == set(parameters)


def loss_is_empty(flow: Flow) -> bool:
    """Whether the loss hands back nothing at all in every step, which no step of an optimizer ends."""
    account = flow.record.reach
    return account is not None and account.num_reached == 0 and Reason.NO_LOSS in account.totals()


def _wanted(flow: Flow, part: ReachRecord) -> bool:
    known = flow.parameters.get(part.parameter)
    return known is None or (known.trainable and known.optimized)


def _issue(
    flow: Flow, part: ReachRecord, severity: IssueSeverity, why: str, actions: tuple[str, ...], role: Role
) -> Issue:
    layer = flow.layers.get(node_name(part.layer))
    has_layers = any(one.module for one in flow.layers.values())  # a parameter of the model beside them
    steps = f"in any of {flow.record.steps} steps" if flow.record.steps > 1 else "in the step that was run"
    what = part.parameter if part.part == "all of it" else f"{part.part} of {part.parameter}"
    return Issue(
        layer=part.layer or (part.parameter if has_layers else ""),
        layer_type=layer.type if layer is not None else "Module",
        issue_type=IssueType.DEAD,
        severity=severity,
        description=f"No gradient reached {what} {steps}: {why}.",
        magnitude=part.share,
        recommended_actions=actions,
        metrics={
            "parameter": part.parameter,
            "part": part.part,
            "reason": part.reason.value,
            "num_elements": part.num_elements,
            "share": part.share,
            "at": part.at,
            "op": part.op,
            "whose": part.whose,
        },
        evidence=Evidence(roles=role, origin=part.layer_at or None, op=part.op),
    )


# ---------------------------------------------------------------------------- by reason


def _by_model(flow: Flow, part: ReachRecord, updates: int) -> Issue | None:
    """Judge rows of a table that the model's own choice never picks."""
    if part.axis != 0 or not part.num_choices:
        return None
    size = part.shape[0]
    lost = part.num_slices / size
    if part.num_choices * flow.record.steps < _PICKS_PER_CODE * size or lost < MANY_CODES or size < 4:
        return None
    severity = IssueSeverity.HIGH if lost >= MOST_CODES else IssueSeverity.MEDIUM
    picked = size - part.num_slices
    chooser = part.whose or part.op
    return _issue(
        flow,
        part,
        severity,
        f"the model's own choice ({chooser}) picks {picked} of {size} in every batch, and a row that is not "
        "picked cannot learn to be",
        (
            "Start rows that are never picked anew, at what the encoder gives for random samples of a batch "
            "(dead-code revival), every few hundred steps.",
            "Check the balance of the losses: where the commitment term outweighs the reconstruction, what "
            "is encoded shrinks onto one row.",
            "Or normalise both sides before the distance, update the table by moving averages, or add an "
            "entropy term that wants all of it used.",
        ),
        Role.BLOCKING,
    )


def _off(flow: Flow, part: ReachRecord, updates: int) -> Issue | None:
    """Judge a parameter that is off in a clamp, a grid or a spike function."""
    if part.op in OWN:
        return None
    share = _total(flow, part)
    if share >= _WHOLE:
        found = off_for_all(part)
    else:  # told of the largest of its parts
        largest = max(p.num_elements for p in _alike(flow, part))
        found = at_bounds(part, share) if part.num_elements == largest else None
    return None if found is None else _issue(flow, part, *found, Role.BLOCKING)


def _cut(flow: Flow, part: ReachRecord, updates: int) -> Issue | None:
    """Judge a part that nobody uses, or that is cut off, of a layer that trains otherwise."""
    if part.moved:
        return None
    if part.axis is None and not part.op:
        account = flow.record.reach
        of_all = part.num_elements / account.num_elements if account is not None else 0.0
        severity = IssueSeverity.MEDIUM if of_all >= 0.01 and part.share == 1 else IssueSeverity.LOW
        why = "nothing that leads to the loss uses it"
    elif read := reads_first_step(flow, part):
        return _issue(flow, part, IssueSeverity.HIGH, *read, Role.CUT)
    elif part.share < _PART or (part.op in _TAKES and not _makes_features(flow, part)):
        return None
    elif left := left_of_classes(flow, part, _TAKES):
        why = OTHER_CLASSES.format(left=left)
        return _issue(flow, part, IssueSeverity.LOW, why, OTHER_ACTIONS, Role.CUT)
    else:
        severity = IssueSeverity.HIGH
        where = f" at {part.at}" if part.at else ""
        why = f"what it makes is cut off by {part.op}{where}: nobody uses that part, or it is flat everywhere"
    name = part.block or part.part
    return _issue(
        flow,
        part,
        severity,
        why,
        (
            f"Follow {name} of {part.parameter} to the loss: is it the part that was meant to be taken?",
            "If it is not needed, make the layer smaller.",
        ),
        Role.CUT,
    )


def _makes_features(flow: Flow, part: ReachRecord) -> bool:
    """Whether the rows of a parameter make features of an output, each on its own at every position.

    Only then do rows that nobody takes mean features that nobody takes. Where steps of a recurrent layer or
    rows of a table are not taken, what is not reached are positions.
    """
    if part.block and "gate" not in part.block:
        return True
    layer = flow.layers.get(node_name(part.layer))
    return layer is not None and any(word in layer.type.lower() for word in ("linear", "conv", "attention"))


def _zero_factor(flow: Flow, part: ReachRecord, updates: int) -> Issue | None:
    """Judge a parameter that is multiplied by something that is zero in every batch."""
    if _total(flow, part) < _WHOLE:
        return None
    if read := reads_first_step(flow, part):
        return _issue(flow, part, IssueSeverity.HIGH, *read, Role.CUT)
    if part.source == "parameter":
        if not updates or part.whose not in flow.parameters:
            return None  # a start, which the first steps end
        why, cure = f"{part.whose}, with which it is multiplied, is zero", f"start {part.whose} at random"
    elif part.source == "data" and part.whose:
        why = f"{part.whose} makes zeros of every batch, with which it is multiplied"
        cure = "rescale the inputs to the range that is expected there, or fit the range (a grid, bins) to it"
    elif lost := forgetful(flow, part):
        why, cure = lost
    elif part.source == "constant" and updates and not is_state(part):
        why = "a constant with which it is multiplied is zero everywhere, so it does nothing"
        cure = "look at what makes that constant: a mask of zeros, a weight that was never switched on"
    elif updates and is_silent_operation(flow, part):
        maker = part.whose.partition("@")[0]
        why = f"all that {maker} gives is exactly zero, with which it is multiplied"
        cure = f"bring what enters {maker} up to what it passes, or lower its threshold"
    elif updates and is_locked(flow, part):
        why = f"a number that {part.at} makes of it, with which it is multiplied there, is exactly zero"
        cure = (
            f"write {part.at} so that its slope is right where it starts (a series near zero), or start "
            f"{part.parameter} elsewhere"
        )
    else:
        return None
    at = f" (in {part.at})" if part.at and part.at != part.layer else ""
    actions = (f"{cure[0].upper()}{cure[1:]}.", "Print what enters there: its smallest and largest value.")
    pruned = part.source == "constant" and part.share < 1  # some rows are masked away, and others are not
    severity = IssueSeverity.LOW if pruned else IssueSeverity.HIGH
    issue = _issue(flow, part, severity, f"{why}{at}", actions, Role.BLOCKING)
    starved = Evidence(roles=Role.BLOCKED, op=part.op, no_input=True)
    return attrs.evolve(issue, evidence=starved) if part.source == "model" else issue


def _cancelled(flow: Flow, part: ReachRecord, updates: int) -> Issue | None:
    """Judge a matrix whose whole gradient cancels: what it tells of the data divides out, whatever it says.

    What is only added may cancel in health: a bias before a norm or a softmax, a table of biases. Of layers
    in a row the last is told.
    """
    if part.layer != last_to_cancel(flow, part):
        return None
    if part.op == OF_CALLS:
        return _issue(flow, part, IssueSeverity.HIGH, *EQUAL_CALLS, Role.BLOCKING)
    if not part.op:
        return _issue(flow, part, IssueSeverity.HIGH, *EQUAL_OUTPUTS, Role.BLOCKING)
    return _issue(
        flow,
        part,
        IssueSeverity.HIGH,
        f"its parts cancel where {part.op} at {part.at or part.layer_at} takes what it gives, and what is "
        "left is rounding. What comes out there is the same whatever the layer says, and no step ends that",
        (
            "Look for a number that is normalised by itself: x / x.sum() over the only one that is kept (a "
            "router's single expert), a softmax over one alternative, a norm over one number (a group of one "
            "channel on one voxel, LayerNorm(1)).",
            "Take that normalisation out, or let it go over several numbers.",
        ),
        Role.BLOCKING,
    )


def _feeder(flow: Flow, issue: Issue) -> str:
    """The layer to be trained whose output an operation makes zeros of, for want of which an issue is told;
    "" for other issues."""
    whose = str(issue.metrics.get("whose", ""))
    if not issue.evidence.no_input or whose not in flow.wiring.nodes or flow.wiring.is_layer(whose):
        return ""
    feeders = [n for n in flow.wiring.before(whose) if n in flow.layers and flow.trainable(n)]
    return flow.layers[max(feeders, key=lambda n: flow.layers[n].order)].module if feeders else ""


def _silent_operation_issue(flow: Flow, feeder: str, issue: Issue) -> Issue:
    """Tell of the layer whose output an operation turns into the zeros that another one starves of."""
    op = str(issue.metrics["whose"]).partition("@")[0]
    layer = flow.layers.get(node_name(feeder))
    return Issue(
        layer=feeder,
        layer_type=layer.type if layer is not None else "Module",
        issue_type=IssueType.DEAD,
        severity=issue.severity,
        description=f"All that {op} makes of its output is exactly zero in every batch: {issue.layer} behind "
        "it is given nothing to learn from.",
        magnitude=1.0,
        recommended_actions=issue.recommended_actions,
        metrics={"why": "silent operation", "op": op},
        evidence=Evidence(roles=Role.SILENT),
    )


def _alike(flow: Flow, part: ReachRecord) -> list[ReachRecord]:
    """Return the parts of the parameter that are unreached for the same reason at the same place."""
    account = flow.record.reach
    assert account is not None
    here = (part.reason, part.at, part.whose)
    return [p for p in account.of(part.parameter) if (p.reason, p.at, p.whose) == here]


def _total(flow: Flow, part: ReachRecord) -> float:
    """Return the share of the parameter that is unreached for the same reason at the same place."""
    return sum(p.share for p in _alike(flow, part))


_JUDGES: dict[Reason, _Judge] = {
    Reason.UNCHOSEN_BY_MODEL: _by_model,
    Reason.OFF: _off,
    Reason.CUT: _cut,
    Reason.ZERO_FACTOR: _zero_factor,
    Reason.BY_MATHEMATICS: _cancelled,
}


# -------------------------------------------------------------------- beside parameters


def _term_issue(flow: Flow, term: TermRecord) -> Issue:
    layer = flow.layers.get(node_name(term.layer))
    how = {
        "grad": "torch.autograd.grad was called without create_graph=True",
        "no_grad": "it was computed under torch.no_grad()",
    }.get(term.made_by, f"{term.made_by} ended its graph")
    return Issue(
        layer=term.layer,
        layer_type=layer.type if layer is not None else "Module",
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.HIGH,
        description=f"A term of the loss is computed from it and carries no gradient: {how}. Its value is "
        "added to the loss, and is a constant to the optimizer.",
        magnitude=0.0,
        recommended_actions=(
            "Pass create_graph=True to torch.autograd.grad, so that the penalty itself has a gradient."
            if term.made_by == "grad"
            else "Compute the term with its graph: outside torch.no_grad(), and without leaving torch.",
            "If it is meant for the log alone, leave it out of the loss.",
        ),
        metrics={"op": term.op, "made_by": term.made_by},
        evidence=Evidence(roles=Role.CUT, origin=term.layer, op=term.made_by),
    )


def _outside_issue(flow: Flow, holder: str, tensors: Sequence[OutsideRecord]) -> Issue:
    """Tell of the tensors that one module holds past its registers."""
    layer = flow.layers.get(node_name(holder))
    names = tuple(tensor.name for tensor in tensors)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    number = sum(math.prod(tensor.shape) for tensor in tensors)
    return Issue(
        layer=holder,
        layer_type=layer.type if layer is not None else flow.record.provenance.model,
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.MEDIUM,
        description=f"{shown} ({number:,} elements) require a gradient and get one, but no module has "
        "registered them: model.parameters() leaves them out, and an optimizer made of it never moves them.",
        magnitude=float(number),
        recommended_actions=(
            f"Hold it in nn.ModuleList, nn.ModuleDict or nn.Parameter: {tensors[0].name.split('[')[0]} is a "
            "plain Python attribute.",
            "If it is not meant to train, say so: requires_grad_(False).",
        ),
        metrics={"names": names, "num_elements": number},
        evidence=Evidence(roles=Role.UNUSED),
    )
