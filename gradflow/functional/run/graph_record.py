"""From contracted autograd graphs, flows and the data flow to the graph's plain data."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import attrs
import numpy as np

from gradflow.functional.reverse.autograd_graph import LOSS, MODEL, Group, Structure
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.reverse.reverse import Flows
from gradflow.functional.run.history import to_host
from gradflow.functional.tap.calls import Call
from gradflow.records import EdgeRecord, GraphRecord, NodeRecord

NAN = float("nan")


@attrs.frozen(eq=False)
class HostFlows:
    """The flows of one step on the host: norms by edge and by node."""

    step: int
    edges: dict[tuple[str, str], float]
    groups: dict[str, float]
    ranks: dict[str, float]


def read_flows(step: int, flows: Flows) -> HostFlows:
    """Return a step's flows as norms on the host, in one transfer."""
    keys = [*flows.edges, *flows.groups]
    numbers = np.array(to_host([*flows.edges.values(), *flows.groups.values()]))
    cut = len(flows.edges)
    edges = dict(zip(flows.edges, numbers[:cut].tolist(), strict=True))
    groups = dict(zip(keys[cut:], numbers[cut:].tolist(), strict=True))
    return HostFlows(step, edges, groups, flows.ranks)  # type: ignore[arg-type]


@attrs.frozen(eq=False)
class Cut:
    """A severed edge: where the data goes on and the gradient does not."""

    source: str
    target: str
    reason: str


def merged(structures: Sequence[Structure]) -> tuple[dict[str, Group], dict[tuple[str, str], None]]:
    """Return the union of the graphs of several steps."""
    groups: dict[str, Group] = {}
    edges: dict[tuple[str, str], None] = {}
    for structure in structures:
        for name, group in structure.groups.items():
            known = groups.get(name)
            groups[name] = (
                group
                if known is None
                else attrs.evolve(known, parameters={**known.parameters, **group.parameters})
            )
        edges |= structure.edges
    return groups, edges


def cuts(dataflow: DataFlow, structure: Structure | None, calls: Sequence[Call]) -> list[Cut]:
    """Return the severed edges that the first step showed."""
    found: dict[tuple[str, str], Cut] = {}
    names = {c.name or MODEL for c in calls if c.is_layer}

    def plain(name: str) -> str:
        return name or MODEL

    for (target, source), reason in dataflow.edges.items():
        name = plain(calls[target].name)
        found.setdefault((plain(source), name), Cut(plain(source), name, reason))
    for node, source, reason in dataflow.joins:
        target = structure.group_of.get(node) if structure is not None else None
        if target is not None and target != plain(source):
            found.setdefault((plain(source), target), Cut(plain(source), target, reason))
    return [c for c in found.values() if c.source in names or c.source.startswith("input")]


def graph_record(
    structures: Sequence[Structure],
    severed: Sequence[Cut],
    calls: Sequence[Call],
    dataflow: DataFlow,
    flows: Sequence[HostFlows] = (),
    arrived: Collection[str] = (),
) -> GraphRecord:
    """Return the graph's plain data.

    Args:
        structures: contracted graphs, one per step that was looked at.
        severed: edges that carry data and no gradient.
        calls: the calls of the first step.
        dataflow: of the first step; tells why a layer is unreachable.
        flows: the measured steps.
        arrived: names of calls at whose output a gradient was seen, in the graph or not.
    """
    groups, edges = merged(structures)
    reached = {*groups, *arrived}
    for call in calls:
        name = call.name or MODEL
        if call.is_layer and name not in groups:
            groups[name] = Group(name, "layer", call.start, call.module, call.type, call, call.shape)
    for cut in severed:
        if cut.source not in groups and cut.source.startswith("input"):
            shape = dataflow.shapes.get(cut.source, ())
            groups[cut.source] = Group(cut.source, "input", -1, type="input", shape=shape)
    into: dict[str, list[tuple[str, str]]] = {}
    for edge in edges:
        into.setdefault(edge[1], []).append(edge)
    ordered = sorted(groups.values(), key=lambda g: (g.order, g.name))
    records = [
        _node(
            rank,
            group,
            into.get(group.name, []),
            flows,
            "" if group.name in reached or group.kind == "input" else _why(group, severed, dataflow),
        )
        for rank, group in enumerate(ordered)
    ]
    return GraphRecord(
        nodes=records,
        edges=[*_edges(edges, flows), *_cut_edges(severed, edges, groups, flows)],
        steps=[f.step for f in flows],
    )


def _edges(edges: dict[tuple[str, str], None], flows: Sequence[HostFlows]) -> list[EdgeRecord]:
    records = []
    for source, target in edges:
        flow = np.array([f.edges.get((source, target), NAN) for f in flows])
        dead = len(flow) > 0 and bool((flow == 0.0).all())
        records.append(EdgeRecord(source=source, target=target, flow=flow, severed=dead))
    return records


def _cut_edges(
    severed: Sequence[Cut],
    edges: dict[tuple[str, str], None],
    groups: dict[str, Group],
    flows: Sequence[HostFlows],
) -> list[EdgeRecord]:
    """Return the edges that carry data and no gradient; one from an input needs none: it is not severed."""
    records = []
    for cut in severed:
        if (cut.source, cut.target) in edges or cut.source not in groups or cut.target not in groups:
            continue
        wanted = groups[cut.source].kind != "input"
        records.append(
            EdgeRecord(
                source=cut.source,
                target=cut.target,
                flow=np.array([0.0 if wanted else NAN for _ in flows]),
                severed=wanted,
                reason=cut.reason or ("no gradient needed" if wanted else ""),
            )
        )
    return records


def _node(
    rank: int,
    group: Group,
    into: Sequence[tuple[str, str]],
    flows: Sequence[HostFlows],
    reason: str,
) -> NodeRecord:
    incoming = []
    if group.name == LOSS:
        grads = [1.0 for _ in flows]
    else:
        grads = [f.groups.get(group.name, NAN) for f in flows]
    for f in flows:
        norms = [f.edges[e] for e in into if e in f.edges]
        incoming.append(math.hypot(*norms) if norms else NAN)
    return NodeRecord(
        name=group.name,
        kind=group.kind,
        layer=group.module,
        type=group.type,
        shape=group.shape,
        num_elements=int(np.prod(group.shape, dtype=np.int64)) if group.shape else 0,
        parameters=tuple(group.parameters),
        taken=group.taken,
        order=rank,
        grad_norm=np.array(grads),
        input_grad_norm=np.array(incoming),
        effective_rank=np.array([f.ranks.get(group.name, NAN) for f in flows]),
        reachable=not reason,
        reason=reason,
    )


def _why(group: Group, severed: Sequence[Cut], dataflow: DataFlow) -> str:
    call = group.call
    out = [cut for cut in severed if cut.source == group.name and cut.reason]
    if out:
        names = ", ".join(f"{cut.reason} before {cut.target}" for cut in out)
        return f"its output goes on without its gradient: {names}"
    if group.name in dataflow.read:
        return f"its values were read out with {dataflow.read[group.name]}, which ends the gradient"
    if call is not None and not call.grad_enabled:
        return "it ran under no_grad"
    if any(cut.source == group.name for cut in severed):
        return "nothing in it or before it requires a gradient"
    return "its output does not lead to the loss"
