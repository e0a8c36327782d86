"""From contracted autograd graphs, flows and the data flow to the graph's plain data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import attrs
import numpy as np

from gradflow.functional.reverse.autograd_graph import (
    MODEL,
    Group,
    Structure,
    input_group,
    layer_group,
    names_of_layers,
    own_name,
)
from gradflow.functional.reverse.dataflow import DataFlow, Source
from gradflow.functional.reverse.reverse import Flows
from gradflow.functional.reverse.union import Union
from gradflow.functional.run.rows import to_host
from gradflow.functional.tap.calls import Call
from gradflow.records import EdgeRecord, GraphRecord, NodeRecord

NAN = float("nan")
# why an edge carries nothing, and why no gradient comes to a node
NOT_NEEDED = "no gradient needed"
GOES_ON = "its output goes on without its gradient"
NEEDS_NONE = "nothing in it or before it requires a gradient"
LEADS_NOWHERE = "its output does not lead to the loss"


@attrs.frozen(eq=False)
class HostFlows:
    """The flows of one step on the host: norms by edge and by node.

    Args:
        step: the step.
        nodes: the nodes of the step's graph, by the names that the other fields use.
        edges: norms by (source, target).
        groups: norms by node.
        ranks: effective ranks by layer call.
    """

    step: int
    nodes: Mapping[str, Group]
    edges: dict[tuple[str, str], float]
    groups: dict[str, float]
    ranks: dict[str, float]

    def renamed(self, names: Mapping[str, str]) -> HostFlows:
        """Return the flows with other names of the nodes."""
        return attrs.evolve(
            self,
            edges={(names[u], names[v]): value for (u, v), value in self.edges.items()},
            groups={names[n]: value for n, value in self.groups.items()},
            ranks={names[n]: value for n, value in self.ranks.items()},
        )


def read_flows(step: int, flows: Flows, structure: Structure) -> HostFlows:
    """Return a step's flows as norms on the host, in one transfer."""
    keys = [*flows.edges, *flows.groups]
    numbers = np.array(to_host([*flows.edges.values(), *flows.groups.values()]))
    cut = len(flows.edges)
    edges = dict(zip(flows.edges, numbers[:cut].tolist(), strict=True))
    groups = dict(zip(keys[cut:], numbers[cut:].tolist(), strict=True))
    return HostFlows(step, structure.groups, edges, groups, flows.ranks)  # type: ignore[arg-type]


@attrs.frozen(eq=False)
class Cut:
    """A severed edge: where the data goes on and the gradient does not."""

    source: str
    target: str
    reason: str
    shape: tuple[int, ...] | None = None  # of the source, where that is a tensor of the batch
    base: str = ""  # that tensor's name in the batch


def cuts(dataflow: DataFlow, structure: Structure | None, calls: Sequence[Call]) -> list[Cut]:
    """Return the severed edges that the first step showed, by the names of the nodes in that step."""
    found: dict[tuple[str, str], Cut] = {}
    layers = names_of_layers(calls)

    def note(origin: Source, target: str, reason: str) -> None:
        kind, name = origin
        if kind == "input":
            cut = Cut(own_name(name, layers), target, reason, dataflow.shapes[name], name)
        elif name in layers:
            cut = Cut(name or own_name(MODEL, layers), target, reason)
        else:
            return
        if cut.source != target:
            found.setdefault((cut.source, target), cut)

    for (target, origin), reason in dataflow.edges.items():
        note(origin, calls[target].name or own_name(MODEL, layers), reason)
    for node, origin, reason in dataflow.joins:
        target = structure.group_of.get(node) if structure is not None else None
        if target is not None:
            note(origin, target, reason)
    if structure is not None:
        for origin, reason in dataflow.lost.items():
            note(origin, structure.loss, reason)
    return list(found.values())


@attrs.frozen(eq=False)
class _Merged:
    """The union of the graphs of several steps, by the names that the nodes have in the record."""

    groups: dict[str, Group]  # in the order of execution
    edges: dict[tuple[str, str], None]
    severed: list[Cut]
    reached: set[str]
    flows: list[HostFlows]


def _merged(
    structures: Sequence[Structure],
    severed: Sequence[Cut],
    calls: Sequence[Call],
    flows: Sequence[HostFlows],
    arrived: Collection[str],
) -> _Merged:
    """Return the union of the steps' graphs, with the calls of the first that no gradient reaches."""
    union = Union()
    images = {id(structures[0].groups): union.add(structures[0])} if structures else {}
    first = dict(next(iter(images.values()), {}))
    layers = names_of_layers(calls)
    alone: dict[int, str] = {}  # layer calls that no gradient reaches in the first step
    for call in calls:
        name = call.name or own_name(MODEL, layers)
        if call.is_layer and name not in first:
            first[name] = union.add_alone(layer_group(name, call, call.start))
            alone[first[name]] = call.name
    for cut in severed:
        if cut.source not in first and cut.shape is not None:
            first[cut.source] = union.add_alone(input_group(cut.source, cut.base, cut.shape))
    known = [cut for cut in severed if cut.source in first and cut.target in first]
    union.cut((first[cut.source], first[cut.target]) for cut in known)
    for structure in structures[1:]:
        images[id(structure.groups)] = union.add(structure)
    names = union.named()
    met = {node for image in images.values() for node in image.values()}
    met |= {node for node, name in alone.items() if name in arrived}
    return _Merged(
        groups={names[i]: union.groups[i].named(names[i]) for i in union.in_order(names)},
        edges={(names[u], names[v]): None for u, v in union.edges},
        severed=[
            attrs.evolve(cut, source=names[first[cut.source]], target=names[first[cut.target]])
            for cut in known
        ],
        reached={names[node] for node in met},
        flows=[
            flow.renamed({name: names[i] for name, i in images[id(flow.nodes)].items()}) for flow in flows
        ],
    )


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
    merged = _merged(structures, severed, calls, flows, arrived)
    into: dict[str, list[tuple[str, str]]] = {}
    for edge in merged.edges:
        into.setdefault(edge[1], []).append(edge)
    records = [
        _node(
            rank,
            group,
            into.get(name, []),
            merged.flows,
            "" if name in merged.reached or group.kind == "input" else _why(group, merged.severed, dataflow),
        )
        for rank, (name, group) in enumerate(merged.groups.items())
    ]
    return GraphRecord(
        nodes=records,
        edges=[*_edges(merged), *_cut_edges(merged)],
        steps=[flow.step for flow in flows],
    )


def _edges(merged: _Merged) -> list[EdgeRecord]:
    records = []
    for source, target in merged.edges:
        flow = [f.edges.get((source, target), NAN) for f in merged.flows]
        known = [norm for norm in flow if norm == norm]
        dead = bool(known) and not any(known)
        records.append(EdgeRecord(source=source, target=target, flow=np.array(flow), severed=dead))
    return records


def _cut_edges(merged: _Merged) -> list[EdgeRecord]:
    """Return the edges that carry data and no gradient; an input needs none, so its edges are not severed."""
    records = []
    for cut in merged.severed:
        if (cut.source, cut.target) in merged.edges:
            continue
        wanted = merged.groups[cut.source].kind != "input"
        records.append(
            EdgeRecord(
                source=cut.source,
                target=cut.target,
                flow=np.array([0.0 if wanted else NAN for _ in merged.flows]),
                severed=wanted,
                reason=cut.reason or (NOT_NEEDED if wanted else ""),
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
    if group.kind == "loss":
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
        num_elements=math.prod(group.shape) if group.shape else 0,
        parameters=tuple(group.parameters),
        taken=group.taken,
        along=group.along,
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
        return f"{GOES_ON}: {names}"
    read = dataflow.read.get(("layer", call.name)) if call is not None else None
    if read is not None:
        return f"its values were read out with {read}, which ends the gradient"
    if call is not None and not call.grad_enabled:
        return "it ran under no_grad"
    behind = dataflow.behind.get(call.name) if call is not None else None
    ends = ", ".join(f"{cut.reason} before {cut.target}" for cut in severed if cut.source == behind)
    if ends:
        return f"it goes on without its gradient behind {behind}: {ends}"
    if any(cut.source == group.name for cut in severed):
        return NEEDS_NONE
    return LEADS_NOWHERE
