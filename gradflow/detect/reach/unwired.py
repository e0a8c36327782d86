"""Layers that no step runs, and layers that run while no path leads from the loss to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from gradflow.detect.reach.actions import copied_actions, cut_actions, never_called_actions
from gradflow.detect.reach.unreached import is_copied, is_moved
from gradflow.detect.view import Flow
from gradflow.records import (
    Evidence,
    Issue,
    IssueSeverity,
    IssueType,
    LayerRecord,
    ParameterRecord,
    Role,
)


def _wanted(parameter: ParameterRecord) -> bool:
    return parameter.trainable and parameter.optimized


def never_called(flow: Flow) -> list[Issue]:
    """One issue for each part that no step runs; the parts of a container are reported together."""
    owned: dict[str, list[ParameterRecord]] = {}
    for parameter in flow.record.parameters:
        if _wanted(parameter):
            owned.setdefault(parameter.layer, []).append(parameter)
    idle = [name for name in flow.record.never_called if name in owned]
    groups: dict[str, list[str]] = {}
    for name in idle:
        groups.setdefault(_idle_container(name, idle, flow), []).append(name)
    return [_idle_issue(flow, container, groups, owned) for container in groups]


def _idle_issue(
    flow: Flow, container: str, groups: dict[str, list[str]], owned: dict[str, list[ParameterRecord]]
) -> Issue:
    names = groups[container]
    number = sum(p.num_elements for name in names for p in owned[name])
    copied = all(is_copied(flow, [p.name for p in owned[name]]) for name in names)
    aside = set(names) <= set(flow.record.passed_by) and not copied
    also = " Code that ran names it: on a branch not taken, or to read of it without a call." if aside else ""
    also = " Modules that are like it, and no part of the model, ran instead." if copied else also
    few = _is_one_of_few(container, groups, flow)  # a router's choice, which steps may change
    by_design = (aside or few) and not flow.record.provenance.optimizer
    by_design |= few and _is_routed(container, flow)
    severity = IssueSeverity.LOW if by_design else IssueSeverity.HIGH
    return Issue(
        layer=container,
        layer_type="Module",
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.CRITICAL if flow.reaches_nothing else severity,
        description=f"No step ran or used it, so its {number:,} parameters "
        f"({len(names)} module(s)) never change.{also}",
        magnitude=float(number),
        recommended_actions=copied_actions(container) if copied else never_called_actions(container, aside),
        metrics={
            "modules": tuple(names),
            "num_parameters": number,
            "passed_by": aside,
            "copied": copied,
        },
        evidence=Evidence(roles=Role.UNUSED),
    )


def _is_one_of_few(name: str, idle: Iterable[str], flow: Flow) -> bool:
    """Whether more of a numbered list of parts ran than did not: `experts.1` to `.3` beside `experts.0`."""
    above, _, number = name.rpartition(".")
    if not (above and number.isdigit()):
        return False
    part = re.compile(rf"{re.escape(above)}\.(\d+)(\.|$)")
    ran = {found[1] for layer in flow.layers.values() if (found := part.match(layer.module))}
    return len(ran) > len({found[1] for other in idle if (found := part.match(other))})


def _is_routed(name: str, flow: Flow) -> bool:
    """Whether the model picks among a numbered list of parts row by row: those of its parts that ran get
    other numbers of rows from step to step, as no part does that is merely forgotten."""
    above = name.rpartition(".")[0]
    part = re.compile(rf"{re.escape(above)}\.\d+(\.|$)")
    ran = (layer for layer in flow.layers.values() if part.match(layer.module))
    sizes = [np.where(layer.called, layer.num_elements, 0) for layer in ran]
    return bool(sizes) and all(len(set(size)) > 1 for size in sizes)


def _idle_container(name: str, idle: Sequence[str], flow: Flow) -> str:
    """The outermost module above `name` in which nothing ran."""
    active = {layer.module for layer in flow.layers.values()}
    best, above = name, name.rpartition(".")[0]
    while above and not any(n == above or n.startswith(f"{above}.") for n in active):
        if sum(n.startswith(f"{above}.") for n in idle) > 1:
            best = above
        above = above.rpartition(".")[0]
    return best


def cut_off(flow: Flow) -> list[Issue]:
    """Layers that ran, none of whose parameters the loss reaches in any step."""
    issues = []
    idle = set(flow.record.never_called)
    told: set[str] = set()
    for node, layer in flow.layers.items():
        wanted = [p for p in flow.trainable(node) if p.layer not in idle]
        if not wanted or layer.module in told or any(p.reached.any() for p in wanted):
            continue
        told.add(layer.module)
        issues.append(_cut_issue(flow, node, layer, wanted))
    return issues


def _cut_issue(flow: Flow, node: str, layer: LayerRecord, wanted: Sequence[ParameterRecord]) -> Issue:
    known = flow.wiring.nodes.get(node)
    reason = known.reason if known and known.reason else "its output does not lead to the loss"
    if layer.reached.any():  # its output is reached, and still nothing in it is: the parameters are unused
        reason = "its output leads to the loss, but they take no part in it"
    ops = flow.wiring.cuts.get(node, ())
    op = next((o for o in ops if o != "no gradient needed"), "")
    # A teacher under no_grad is by design; only an optimizer that holds it says that it is meant to train.
    by_design = "no_grad" in reason and not flow.record.provenance.optimizer
    by_design |= _ends_a_round(flow, node)
    nothing = flow.reaches_nothing
    severity = IssueSeverity.CRITICAL if nothing else IssueSeverity.LOW if by_design else IssueSeverity.HIGH
    if is_moved(flow, [p.name for p in wanted]):
        severity = IssueSeverity.LOW
    number = sum(p.num_elements for p in wanted)
    whole = " None leads to any parameter of the model: nothing trains." if nothing else ""
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.DEAD,
        severity=severity,
        description=f"It ran, but no path leads from the loss to its {number:,} parameters in any of "
        f"{flow.record.steps} steps: {reason}.{whole}",
        magnitude=float(number),
        recommended_actions=cut_actions(flow, node, op or reason),
        metrics={
            "op": op,
            "reason": reason,
            "num_parameters": number,
            "parameters": tuple(p.name for p in wanted),
        },
        evidence=Evidence(roles=Role.CUT, op=op),
    )


def _ends_a_round(flow: Flow, node: str) -> bool:
    """Whether a layer is unused because its rounds end here: nobody takes its output, and that of the same
    layer one round before goes on to the next.

    In a graph network over several types of nodes, the last round updates some that nobody asks for. A whole
    round that nobody takes anything of is another matter: a block too many, or an output taken too early.
    """
    layer = flow.layers[node]
    if flow.wiring.cuts.get(node) or flow.wiring.succs.get(node):
        return False
    parts = layer.module.split(".")
    for place in [i for i, part in enumerate(parts) if part.isdigit() and part != "0"]:
        after = [*parts[:place], str(int(parts[place]) + 1)]
        before = ".".join([*parts[:place], str(int(parts[place]) - 1), *parts[place + 1 :]])
        next_round = ".".join(after)
        last = not any(f"{other.module}.".startswith(f"{next_round}.") for other in flow.layers.values())
        twin = next((o for o in flow.layers.values() if o.module == before), None)
        round_of = ".".join(parts[: place + 1])
        inside = [
            o for o in flow.layers.values() if o.module == round_of or o.module.startswith(f"{round_of}.")
        ]
        if len(inside) > 1 and not any(bool(o.reached.any()) for o in inside):
            continue
        if last and twin is not None and twin.type == layer.type and bool(twin.reached.any()):
            return True
    return False
