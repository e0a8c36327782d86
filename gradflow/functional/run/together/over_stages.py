"""What the stages of a pipeline have measured, each of its own part of the model, as one record.

NOTE [One graph of all stages]
A stage's graph begins with a layer that stands for whoever made what the stage before hands on, and ends with
a scalar that stands for all that comes behind. Where two are joined, both go: an edge from what was handed on
is one from whoever made it. Operations are numbered through the whole model, so those of later stages go on
counting where the earlier ones end. All that names a node (why a number was not reached) is renamed with it;
what names the layer that feeds something, and names what was handed on, gets the latest layer behind that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from gradflow.functional.processes.stages import ENTRY
from gradflow.functional.reach.reasons import unmarked
from gradflow.functional.run.graph.record import GOES_ON, LEADS_NOWHERE, NEEDS_NONE, NOT_NEEDED
from gradflow.functional.run.run import Run
from gradflow.functional.run.together.exchanged import exchanged, processes_of_stages
from gradflow.records import (
    EdgeRecord,
    ExchangeRecord,
    FlowRecord,
    GraphRecord,
    LayerRecord,
    NodeRecord,
    NumericalRecord,
    PartsRecord,
    Provenance,
    ReachAccount,
    ReachRecord,
    Reason,
    TransformerRecord,
    UpdatesRecord,
)

_ENTRY = re.compile(rf"{re.escape(ENTRY)}(?:@(\d+))?")
_HANDED = "handed_on"  # the operation that stands for what comes behind a stage
Names = Mapping[str, str]


@attrs.frozen(eq=False)
class _Part:
    """What a stage has to tell.

    Args:
        record: of the stage.
        handed: by number of an output, the node that made it; "" where none is known.
        exchanged: with the other stages.
    """

    record: FlowRecord
    handed: tuple[str, ...]
    exchanged: ExchangeRecord


def over_stages(run: Run, record: FlowRecord) -> FlowRecord:
    """Return the record of all stages of a pipeline, from that of this process's own.

    Args:
        run: the run.
        record: of the stage, the same on all processes that have it.
    """
    if run.stages.alone:
        return record
    parts = _of_stages(run, _Part(record, _handed(run), exchanged(run.stages.line)))
    if not parts:  # another process has the record
        return record
    graphs, names = _joined_graph([p.record.graph_record for p in parts], [p.handed for p in parts])
    feeders = _Feeders.of(graphs)
    counts = [part.exchanged for part in parts]
    records = [
        _fed(part.record, [feeders.layer(of.get(_entry(i), "")) for i in range(len(before))])
        for part, of, before in zip(parts, names, [(), *(p.handed for p in parts)], strict=False)
    ]
    return attrs.evolve(
        records[-1],
        layers=_layers(records),
        parameters=_all(records, "parameters"),
        activations=_all(records, "activations"),
        numerics=_births(records),
        never_called=_all(records, "never_called"),
        passed_by=_all(records, "passed_by"),
        graph_record=graphs,
        transformer=_transformer(records),
        parts=_parts([r.parts for r in records]),
        provenance=_provenance([r.provenance for r in records], run),
        recurrences=_all(records, "recurrences"),
        policy=next((r.policy for r in reversed(records) if r.policy is not None), None),
        reach=_reach([r.reach for r in records if r.reach is not None], names, graphs),
        extras={key: value for r in records for key, value in r.extras.items()},
        updates=_updates([r.updates for r in records if r.updates is not None]),
        precision=_precision([r.precision for r in records if r.precision is not None]),
        processes=processes_of_stages(run, records, counts),
    )


def graph_over_stages(run: Run, graph: GraphRecord | None) -> GraphRecord | None:
    """Return the graph of all stages of a pipeline, from that of this process's own."""
    if run.stages.alone:
        return graph
    parts = _of_stages(run, (graph, _handed(run)))
    if not parts:
        return graph
    return _joined_graph([own for own, _ in parts], [handed for _, handed in parts])[0]


def _of_stages(run: Run, mine: Any) -> list[Any]:
    """Return what each stage has to tell, of whose processes the first speaks."""
    speaks = run.line.alone or run.line.rank == 0
    every = run.stages.line.gathered((run.stages.index, mine) if speaks else None, run.plan.teller)
    return [told for _, told in sorted((e for e in every if e is not None), key=lambda entry: entry[0])]


def _handed(run: Run) -> tuple[str, ...]:
    """Return the nodes that made what this stage hands on, as the first step's graph names them."""
    return () if run.stages.is_last else run.graph.handed


def _all(records: Sequence[Any], field: str) -> list[Any]:
    return [entry for record in records for entry in getattr(record, field)]


def _births(records: Sequence[FlowRecord]) -> list[NumericalRecord]:
    """Return where numbers that are not finite were born: not where another stage has handed them over."""
    found: dict[NumericalRecord, None] = {}
    for stage, record in enumerate(records):
        for entry in record.numerics:
            handed = (entry.phase == "input" and stage > 0) or entry.op == _HANDED
            if not handed:
                finite = bool(np.isfinite(records[-1].losses[entry.step]))
                found[attrs.evolve(entry, loss_finite=finite)] = None
    return sorted(found, key=lambda entry: entry.step)


def _layers(records: Sequence[FlowRecord]) -> list[LayerRecord]:
    own = [layer for layer in _all(records, "layers") if layer.module != ENTRY]
    return [attrs.evolve(layer, order=i) for i, layer in enumerate(own)]


# --------------------------------------------------------------------------------------- the graph


def _joined_graph(
    graphs: Sequence[GraphRecord | None], handed: Sequence[Sequence[str]]
) -> tuple[GraphRecord | None, list[Names]]:
    """Return the graph of all stages, and the names that the nodes of each have in it."""
    names: list[Names] = []
    taken: set[str] = {node.name for g in graphs if g for node in g.nodes if node.kind == "layer"}
    for stage, graph in enumerate(graphs):
        entries = names[stage - 1] if stage else {}
        made_by = [entries.get(name, "") for name in handed[stage - 1]] if stage else []
        names.append(_names(graph, made_by, taken, last=stage == len(graphs) - 1))
    known = [(graph, of) for graph, of in zip(graphs, names, strict=True) if graph is not None]
    if len(known) < len(graphs):
        return None, names
    edges: dict[tuple[str, str], EdgeRecord] = {}
    for graph, of in known:
        for edge in graph.edges:
            _put(edges, edge, of.get(edge.source, ""), of.get(edge.target, ""))
    own = [(node, of[node.name]) for graph, of in known for node in graph.nodes if _stays(node, of)]
    nodes = [
        attrs.evolve(node, name=name, order=i, reason=_why(node, name, edges.values()))
        for i, (node, name) in enumerate(own)
    ]
    return GraphRecord(nodes=nodes, edges=list(edges.values()), steps=known[-1][0].steps), names


def _names(graph: GraphRecord | None, made_by: Sequence[str], taken: set[str], *, last: bool) -> Names:
    """Return the names that the nodes of a stage have in the whole graph; "" of those that go.

    Args:
        graph: of the stage.
        made_by: the nodes that made what it was handed.
        taken: names that are given; those of its nodes are put among them.
        last: whether it is the last stage.
    """
    found: dict[str, str] = {}
    nodes = () if graph is None else graph.nodes
    ends = {edge.source for edge in graph.edges if edge.target in _losses(nodes)} if graph else set()
    for node in sorted(nodes, key=lambda node: _number(node.name)):
        entry = _ENTRY.fullmatch(node.name)
        if entry is not None:
            number = int(entry[1] or 0)
            found[node.name] = made_by[number] if number < len(made_by) else ""
        elif (made_by and node.kind == "input") or (not last and _ends(node, ends)):
            found[node.name] = ""
        elif node.kind == "op":
            base, number, name = _base(node.name), 1, _base(node.name)
            while name in taken:
                name, number = f"{base}@{number}", number + 1
            found[node.name] = name
            taken.add(name)
        else:
            found[node.name] = node.name
    return found


def _ends(node: NodeRecord, ends: Collection[str]) -> bool:
    """Whether a node stands for what comes behind a stage, or is the loss in its place."""
    return node.kind == "loss" or (node.kind == "op" and node.name in ends)


def _why(node: NodeRecord, name: str, edges: Iterable[EdgeRecord]) -> str:
    """Return why no gradient comes to a node: what a stage cannot know where a later one cuts it off."""
    if node.reachable or node.kind != "layer":
        return node.reason
    cuts = [edge for edge in edges if edge.source == name and edge.severed]
    ends = ", ".join(f"{edge.reason} before {edge.target}" for edge in cuts if edge.reason != NOT_NEEDED)
    if ends:
        return f"{GOES_ON}: {ends}"
    return NEEDS_NONE if cuts and node.reason == LEADS_NOWHERE else node.reason


def _losses(nodes: Sequence[NodeRecord]) -> set[str]:
    return {node.name for node in nodes if node.kind == "loss"}


def _stays(node: NodeRecord, names: Names) -> bool:
    return bool(names[node.name]) and not _ENTRY.fullmatch(node.name)


def _base(name: str) -> str:
    return re.sub(r"@\d+$", "", name)


def _number(name: str) -> int:
    found = re.search(r"@(\d+)$", name)
    return int(found[1]) if found else 0


def _put(edges: dict[tuple[str, str], EdgeRecord], edge: EdgeRecord, source: str, target: str) -> None:
    """Put an edge under its names in the whole graph; what two ways carry adds up."""
    if not source or not target or source == target:
        return
    known = edges.get((source, target))
    edge = attrs.evolve(edge, source=source, target=target)
    if known is not None:
        flow = np.hypot(known.flow, edge.flow) if len(known.flow) == len(edge.flow) else known.flow
        edge = attrs.evolve(edge, flow=flow, severed=known.severed and edge.severed)
    edges[source, target] = edge


# ---------------------------------------------------------------------------------------- the rest


def _reach(
    accounts: Sequence[ReachAccount], names: Sequence[Names], graph: GraphRecord | None
) -> ReachAccount | None:
    if not accounts:
        return None
    unreached = [
        _renamed(part, stage, names) for stage, account in enumerate(accounts) for part in account.unreached
    ]
    cuts = _cuts(graph)
    unreached = [
        attrs.evolve(part, op=cuts[part.layer][0], at=cuts[part.layer][1])
        if part.reason is Reason.CUT and not part.at and part.layer in cuts
        else part
        for part in unreached
    ]
    return attrs.evolve(
        accounts[-1],
        num_elements=sum(a.num_elements for a in accounts),
        num_reached=sum(a.num_reached for a in accounts),
        unreached=unreached,
        outside=_all(accounts, "outside"),
        step=max(a.step for a in accounts),
    )


def _cuts(graph: GraphRecord | None) -> dict[str, tuple[str, str]]:
    """Return, by the module of a layer, the operation that cuts its output off, and who takes it."""
    found: dict[str, tuple[str, str]] = {}
    modules = {node.name: node.layer for node in graph.nodes if node.kind == "layer"} if graph else {}
    for edge in graph.edges if graph else ():
        if edge.source in modules and edge.severed and edge.reason not in ("", NOT_NEEDED):
            found.setdefault(modules[edge.source], (edge.reason, edge.target))
    return found


def _renamed(part: ReachRecord, stage: int, names: Sequence[Names]) -> ReachRecord:
    """Return a part that no gradient reached, with the names of the whole graph."""

    def of(marked: str) -> str:
        name, where = unmarked(marked)
        return names[stage if where is None else where].get(name, name)

    return attrs.evolve(part, at=of(part.at), whose=of(part.whose))


@attrs.frozen(eq=False)
class _Feeders:
    """What feeds the nodes of a graph."""

    nodes: Mapping[str, NodeRecord]
    above: Mapping[str, list[str]]

    @classmethod
    def of(cls, graph: GraphRecord | None) -> _Feeders:
        above: dict[str, list[str]] = {}
        for edge in graph.edges if graph else ():
            above.setdefault(edge.target, []).append(edge.source)
        return cls({node.name: node for node in graph.nodes} if graph else {}, above)

    def layer(self, name: str) -> str:
        """Return the latest layer call that feeds a node by way of operations, or is it; "" if none."""
        found: list[str] = []
        todo, met = [name], {name}
        for node in todo:  # grows while it is walked
            if node in self.nodes and self.nodes[node].kind == "layer":
                found.append(node)
                continue
            new = [other for other in self.above.get(node, ()) if other not in met]
            todo += new
            met.update(new)
        return max(found, key=lambda node: self.nodes[node].order, default="")


def _entry(number: int) -> str:
    return f"{ENTRY}@{number}" if number else ENTRY


def _fed(value: Any, layers: Sequence[str]) -> Any:
    """Return a record in which what stands for something handed on is the layer that it came from."""
    if isinstance(value, str) and ENTRY in value:
        return _ENTRY.sub(lambda found: [*layers, found[0]][min(int(found[1] or 0), len(layers))], value)
    if isinstance(value, tuple):
        new = tuple(_fed(entry, layers) for entry in value)
        return value if all(a is b for a, b in zip(new, value, strict=True)) else new
    if not attrs.has(type(value)) or isinstance(value, GraphRecord):
        return value
    if isinstance(value, LayerRecord) and value.module == ENTRY:
        return value
    fields = {f.name: getattr(value, f.name) for f in attrs.fields(type(value))}
    changed = {n: new for n, old in fields.items() if (new := _fed(old, layers)) is not old}
    return attrs.evolve(value, **changed) if changed else value


def _updates(found: Sequence[UpdatesRecord]) -> UpdatesRecord | None:
    if not found:
        return None
    stale = list(dict.fromkeys(_all(found, "stale")))
    return attrs.evolve(found[-1], parameters=_all(found, "parameters"), stale=stale)


def _parts(found: Sequence[PartsRecord]) -> PartsRecord:
    fields = [field.name for field in attrs.fields(PartsRecord) if field.name != "steps"]
    return attrs.evolve(found[-1], **{name: tuple(_all(found, name)) for name in fields})


def _transformer(records: Sequence[FlowRecord]) -> TransformerRecord:
    found = [record.transformer for record in records]
    first = next((t for t in reversed(found) if t.steps), found[-1])
    return attrs.evolve(first, attention=_all(found, "attention"), branches=_all(found, "branches"))


def _precision(found: Sequence[Any]) -> Any:
    if not found:
        return None
    fields = ("layers", "parameters", "subnormals")
    return attrs.evolve(found[-1], **{name: tuple(_all(found, name)) for name in fields})


def _provenance(found: Sequence[Provenance], run: Run) -> Provenance:
    stage = run.stages.stage
    assert stage is not None
    notes = list(dict.fromkeys(note for p in found for note in p.notes))
    return attrs.evolve(
        found[0],
        dtypes=sorted({dtype for p in found for dtype in p.dtypes}),
        num_parameters=sum(p.num_parameters for p in found),
        learning_rates=found[-1].learning_rates,
        notes=notes,
        chosen=tuple(dict.fromkeys(line for p in found for line in p.chosen)),
    )
