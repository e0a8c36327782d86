"""Who feeds whom: what the detectors need of the layer graph, and what stands in where there is none.

The graph comes from `FlowRecord.graph_record`. Where the run could not take it, the order of execution
stands in as one chain, and `Wiring.known` is False, so that verdicts can say so.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import attrs
import numpy as np

from gradflow.records import EdgeRecord, FlowRecord, GraphRecord, LayerRecord, NodeRecord

LOSS = "loss"
MODEL = "(model)"
# Along a residual stream every later block takes a part of a layer's output. To look at all of them from each
# layer would take the square of the depth, and one so far away is no neighbour.
MOST_NEIGHBOURS = 32


@attrs.frozen(kw_only=True)
class Wiring:
    """The graph without the edges that cut the gradient, in the direction of the data.

    Args:
        nodes: every node by name; layer nodes carry the name of the layer call: see `node_name`.
        order: names of the nodes, each after all that feed it.
        preds: by name, the nodes that feed it.
        succs: by name, the nodes that it feeds.
        cuts: by name of a node, the reasons why an edge out of it carries no gradient.
        sources: by name, the nodes whose data it takes, along edges that cut the gradient too.
        known: whether this is the graph, and not the order of execution.
        loss: the name of the loss's node: `loss`, unless a layer has that name.
        holders: the layer calls that hold others: each stands where its output is, behind what it holds.

    What is called nearest here is at most `MOST_NEIGHBOURS`, those with the fewest operations between first.
    """

    nodes: Mapping[str, NodeRecord]
    order: tuple[str, ...]
    preds: Mapping[str, tuple[str, ...]]
    succs: Mapping[str, tuple[str, ...]]
    cuts: Mapping[str, tuple[str, ...]]
    sources: Mapping[str, tuple[str, ...]]
    known: bool
    loss: str = LOSS
    holders: frozenset[str] = frozenset()
    _fed_by: dict[str, frozenset[str]] = attrs.field(factory=dict, init=False, eq=False, repr=False)

    def is_layer(self, name: str) -> bool:
        """Whether a node is a layer call."""
        return name in self.nodes and self.nodes[name].kind == "layer"

    def kind_of(self, name: str) -> str:
        """Return the type of a node in small letters, without the mark of what works in place."""
        return self.nodes[name].type.lower().rstrip("_")

    def before(self, name: str) -> tuple[str, ...]:
        """Return the nearest layer calls upstream, across the functional ops between."""
        return tuple(itertools.islice(self._nearest(name, self.preds), MOST_NEIGHBOURS))

    def is_first(self, name: str) -> bool:
        """Whether no layer call stands upstream of a node."""
        return next(self._nearest(name, self.preds), None) is None

    def is_last(self, name: str) -> bool:
        """Whether no layer call stands downstream of a node, but for those that hold others."""
        behind = self._nearest(name, self.succs)
        return all(node in self.holders and self.is_last(node) for node in behind)

    def after(self, name: str) -> tuple[str, ...]:
        """Return the nearest layer calls downstream, across the functional ops between."""
        return tuple(itertools.islice(self._nearest(name, self.succs), MOST_NEIGHBOURS))

    def ops_after(self, name: str) -> tuple[str, ...]:
        """Return the types of the functional ops between a layer call and the next ones downstream.

        Those that hold others are passed by: a model with parameters of its own gives what its last layer
        gives, and the operations of the loss stand behind it.
        """
        return tuple(itertools.islice(self._ops(name, self.succs), MOST_NEIGHBOURS))

    def feeds_op(self, name: str) -> bool:
        """Whether a functional op takes the output of a layer call."""
        return next(self._ops(name, self.succs), None) is not None

    def upstream(self, name: str) -> frozenset[str]:
        """Return all nodes that feed a node, directly or not."""
        return _closure(name, self.preds)

    def downstream(self, name: str) -> frozenset[str]:
        """Return all nodes that a node feeds, directly or not."""
        return _closure(name, self.succs)

    def fed_by(self, name: str) -> frozenset[str]:
        """Return all nodes whose data reaches a node, whether or not a gradient comes back."""
        if name not in self._fed_by:
            self._fed_by[name] = _closure(name, self.sources)
        return self._fed_by[name]

    def _nearest(self, name: str, step: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
        seen, todo = {name}, deque(step.get(name, ()))
        while todo:
            node = todo.popleft()
            if node in seen:
                continue
            seen.add(node)
            if self.is_layer(node):
                yield node
            else:
                todo.extend(step.get(node, ()))

    def _ops(self, name: str, step: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
        seen, todo = {name}, deque(step.get(name, ()))
        while todo:
            node = todo.popleft()
            if node in seen or (self.nodes[node].kind != "op" and node not in self.holders):
                continue
            seen.add(node)
            if node not in self.holders:
                yield self.nodes[node].type
            todo.extend(step.get(node, ()))


def _closure(name: str, step: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    seen: set[str] = set()
    todo = list(step.get(name, ()))
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(step.get(node, ()))
    return frozenset(seen)


def node_name(layer: str) -> str:
    """Return the node's name for a layer call; the model itself, whose name is empty, is `(model)`.

    A layer that is called so gets one more pair of brackets, so that no two share a name.

    >>> node_name("head"), node_name(""), node_name("(model)")
    ('head', '(model)', '((model))')
    """
    return MODEL if not layer else f"({layer})" if _is_model(layer) else layer


def layer_name(node: str) -> str:
    """Return the layer call's name for a node of the graph."""
    return "" if node == MODEL else node[1:-1] if _is_model(node) else node


def _is_model(name: str) -> bool:
    """Whether a name is `(model)`, in whatever number of further brackets."""
    while name != MODEL:
        if not (name.startswith("(") and name.endswith(")")):
            return False
        name = name[1:-1]
    return True


def wiring(record: FlowRecord) -> Wiring:
    """Return the wiring of a record: its graph, or its order of execution where it holds none.

    >>> wiring(FlowRecord(steps=0, losses=[], layers=(), parameters=())).known
    False
    """
    if record.graph_record is not None and any(node.kind == LOSS for node in record.graph_record.nodes):
        graph = _by_layers(record.graph_record, {layer.name for layer in record.layers})
        # An edge that merely carried exact zeros is still a way the gradient can take.
        live = [(edge.source, edge.target) for edge in graph.edges if not (edge.severed and edge.reason)]
        cut = [edge for edge in graph.edges if edge.severed and edge.reason]
        holders = frozenset(node_name(layer.name) for layer in record.layers if layer.composite)
        return attrs.evolve(_assembled(graph.nodes, live, cut, known=True), holders=holders)
    return _chain(record)


def _by_layers(graph: GraphRecord, layers: set[str]) -> GraphRecord:
    """Return the graph with the names of `node_name`, and as layers only the calls that the record has.

    In the graph every layer keeps its name, and others give way to it; here `node_name` gives the names
    of layers. A call that some steps ran at another place is a further node there; it has no record of its
    own, and counts as an operation on the way.
    """
    names: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        root = node.kind == "layer" and not node.layer and _is_model(node.name) and node.name not in layers
        name = MODEL if root else node_name(node.name) if node.name in layers else node.name
        call = layer_name(name) in layers
        kind = "op" if node.kind == "layer" and not call else node.kind
        names[node.name] = name
        nodes.append(
            node if (name, kind) == (node.name, node.kind) else attrs.evolve(node, name=name, kind=kind)
        )
    if all(old == new for old, new in names.items()):
        return attrs.evolve(graph, nodes=nodes)
    taken = {name for name in names.values() if layer_name(name) in layers}
    for node in graph.nodes:  # what is no layer gives way here too
        while node.name not in layers and names[node.name] != MODEL and names[node.name] in taken:
            names[node.name] = f"({names[node.name]})"
    nodes = [attrs.evolve(n, name=names[old.name]) for n, old in zip(nodes, graph.nodes, strict=True)]
    edges = [attrs.evolve(e, source=names[e.source], target=names[e.target]) for e in graph.edges]
    return attrs.evolve(graph, nodes=nodes, edges=edges)


def _chain(record: FlowRecord) -> Wiring:
    """One chain in the order of execution: layers that hold others are left out, they repeat their last."""
    calls = sorted((layer for layer in record.layers if not layer.composite), key=lambda layer: layer.order)
    nodes = [_node(layer) for layer in calls]
    nothing = np.empty(0)
    nodes.append(
        NodeRecord(
            name=_free(LOSS, {node.name for node in nodes}),
            kind=LOSS,
            order=len(nodes),
            grad_norm=nothing,
            input_grad_norm=nothing,
            effective_rank=nothing,
        )
    )
    live = [(a.name, b.name) for a, b in itertools.pairwise(nodes)]
    return _assembled(nodes, live, (), known=False)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name = f"({name})"
    return name


def _node(layer: LayerRecord) -> NodeRecord:
    sizes = layer.num_elements[layer.num_elements > 0]
    return NodeRecord(
        name=node_name(layer.name),
        kind="layer",
        layer=layer.module,
        type=layer.type,
        shape=layer.shape,
        num_elements=int(sizes[-1]) if len(sizes) else 0,
        parameters=layer.parameters,
        order=layer.order,
        grad_norm=np.empty(0),
        input_grad_norm=np.empty(0),
        effective_rank=np.empty(0),
        reachable=bool(layer.reached.any()),
    )


def _assembled(
    nodes: Iterable[NodeRecord],
    edges: Iterable[tuple[str, str]],
    cut: Iterable[EdgeRecord],
    *,
    known: bool,
) -> Wiring:
    named = {node.name: node for node in nodes}
    preds: dict[str, list[str]] = {name: [] for name in named}
    succs: dict[str, list[str]] = {name: [] for name in named}
    for source, target in edges:
        if source in named and target in named:
            preds[target].append(source)
            succs[source].append(target)
    cuts: dict[str, list[str]] = {}
    sources = {name: list(found) for name, found in preds.items()}
    for edge in cut:
        cuts.setdefault(edge.source, []).append(edge.reason)
        if edge.source in named and edge.target in named:
            sources[edge.target].append(edge.source)
    return Wiring(
        nodes=named,
        order=_topological(named, preds, succs),
        preds={name: tuple(dict.fromkeys(found)) for name, found in preds.items()},
        succs={name: tuple(dict.fromkeys(found)) for name, found in succs.items()},
        cuts={name: tuple(dict.fromkeys(found)) for name, found in cuts.items()},
        sources={name: tuple(dict.fromkeys(found)) for name, found in sources.items()},
        known=known,
        loss=next(node.name for node in named.values() if node.kind == LOSS),
    )


def _topological(
    nodes: Mapping[str, NodeRecord], preds: Mapping[str, list[str]], succs: Mapping[str, list[str]]
) -> tuple[str, ...]:
    """Kahn's order; nodes on a cycle, which a record of a real run cannot hold, come last as they stand."""
    waiting = {name: len(set(found)) for name, found in preds.items()}
    ready = [name for name in nodes if not waiting[name]]
    order: list[str] = []
    while ready:
        node = ready.pop()
        order.append(node)
        for target in dict.fromkeys(succs[node]):
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    done = set(order)
    return (*order, *(name for name in nodes if name not in done))
