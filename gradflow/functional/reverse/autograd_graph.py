"""The autograd graph of one step, contracted to layer calls and the functional operations between them.

NOTE [Which node belongs to whom]
Autograd numbers the nodes it makes. A layer call notes the number at its start and end, so the nodes of its
own operations are those numbered in between, and are contracted into it; the node of its probe is found by
its site. Everything else that the walk from the loss meets is a functional operation, a node of its own. A
layer in which other layers are called (a model that owns a class token) keeps only its probe: the operations
in it, between its inner layers, stay operations. Nothing is put on the inputs of a layer, since an alias of
an input would break models that write to it in place.

NOTE [Derivatives in a model]
A model may take a derivative and go on with it (a gradient penalty, a residual of a differential equation, an
inner step of meta-learning). The nodes of that derivative are made when the layers have returned, so they are
operations. They go on with what the layers have kept for it, and so enter a layer past its probe, in one of
three places. At its output itself, before the probe: this is a part of the gradient of that output, as
`retain_grad` would tell, and is joined with what the probe sees. At what a layer makes of its parameters
alone, as a linear layer's transposed weight: then it is a way to the parameters, as if the operation held
them itself. Anywhere else: there it is no gradient of an output; a note says so.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import attrs
from torch import Tensor

from gradflow.functional.processes.shards import Shards
from gradflow.functional.reverse.gathered import Gatherer, gatherer
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.nodes import (
    Node,
    Nodes,
    Position,
    below,
    converts,
    is_leaf,
    of_parameters,
    operation,
    signature,
    slice_taken,
    softmax_axis,
    topological,
)
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.torch_private import input_metadata, node_number

LOSS = "loss"
MODEL = "(model)"


@attrs.define(eq=False)
class Group:
    """A node of the contracted graph: a layer call, an operation, an input or the loss."""

    name: str
    kind: str
    order: int
    base: str = ""  # what its name is made from: without a number, and as if no layer had it already
    module: str = ""
    type: str = ""
    call: Call | None = None
    shape: tuple[int, ...] = ()
    parameters: dict[str, None] = attrs.field(factory=dict)
    taken: tuple[int, ...] = ()
    along: int = -1

    def named(self, name: str) -> Group:
        """Return the node under a name."""
        return self if name == self.name else attrs.evolve(self, name=name)

    def hold(self, node: Node) -> None:
        """Note what is read off an autograd node that is contracted into it."""
        self.along = max(self.along, softmax_axis(node))

    def use(self, parameters: Iterable[str]) -> None:
        """Note parameters, by name, that the node uses."""
        self.parameters |= dict.fromkeys(parameters)


@attrs.define(eq=False)
class Structure:
    """The contracted graph of one step, and the autograd nodes behind it in topological order."""

    groups: dict[str, Group]
    edges: dict[tuple[str, str], None]  # (source, target) in the direction of the data
    nodes: Nodes
    group_of: dict[Node, str]
    leaves: dict[Node, Tensor]  # nodes that stand for leaf tensors
    foreign: list[Tensor]  # leaves that are no working parameters, tensors of the batch or slots
    calls: list[Call] = attrs.field(factory=list)  # of the step
    loss: str = LOSS  # the name of the loss
    signature: list[Any] = attrs.field(factory=list)  # of the autograd graph: see `signature`
    placed: list[str | None] = attrs.field(factory=list)  # the group of every node, in their order
    root: Tensor | None = None  # the loss: in older releases a custom function's node does not keep itself
    gatherer: Gatherer | None = None  # where parameters are sharded

    def release(self) -> None:
        """Let go of the autograd graph, and keep the contracted one."""
        self.nodes, self.group_of, self.leaves, self.foreign, self.root = {}, {}, {}, [], None
        self.gatherer = None

    def gather_by(self, shards: Shards) -> None:
        """Have the parameters gathered for every walk, where they are sharded."""
        windows = Windows(self.calls)
        self.gatherer = gatherer(shards, list(self.nodes), windows.innermost) if shards.groups else None

    def walk(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Begin a walk over the nodes: what is called before each, in their order, used or not."""
        return contextlib.nullcontext(lambda: None) if self.gatherer is None else self.gatherer.walk()

    def remember(self) -> None:
        """Remember the autograd graph, so that a later step that has the same is known again."""
        self.signature = signature(self.nodes)
        self.placed = [self.group_of.get(node) for node in self.nodes]

    def again(self, root: Tensor, nodes: Nodes, calls: list[Call]) -> Structure | None:
        """Return the structure of a later step, if its graph and its calls are the same, else None.

        Args:
            root: the loss of the later step.
            nodes: those of its graph, in topological order.
            calls: its calls.
        """
        if len(nodes) != len(self.placed) or len(calls) != len(self.calls):
            return None
        if any(a.name != b.name or a.parent != b.parent for a, b in zip(calls, self.calls, strict=True)):
            return None
        if signature(nodes) != self.signature:
            return None
        group_of = {node: name for node, name in zip(nodes, self.placed, strict=True) if name is not None}
        leaves = {node: node.variable for node in nodes if is_leaf(node)}
        return attrs.evolve(self, nodes=nodes, group_of=group_of, leaves=leaves, root=root, calls=calls)


def own_name(name: str, layers: Container[str]) -> str:
    """Return a name for a node that is no layer's: its own, in brackets where a layer has that name.

    >>> own_name("loss", {"net", "loss"}), own_name("input.0", {"net", "loss"})
    ('(loss)', 'input.0')
    """
    while name in layers:
        name = f"({name})"
    return name


def names_of_layers(calls: Iterable[Call]) -> set[str]:
    """Return the names of the layer calls, which no other node may have; the model's own is empty."""
    return {call.name for call in calls if call.is_layer}


class Windows:
    """Finds the innermost call that an autograd node was made in."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._starts = [call.start for call in calls]  # calls are in the order of their starts

    def innermost(self, node: Node) -> Call | None:
        """Return the innermost call that made `node`, or None."""
        return self.at(node_number(node))

    def at(self, number: int) -> Call | None:
        """Return the innermost call that was running when autograd's number was `number`."""
        position = bisect.bisect_right(self._starts, number) - 1
        while position >= 0:
            call = self._calls[position]
            if number < call.end:
                return call
            position = call.parent
        return None

    def layer(self, node: Node) -> Call | None:
        """Return the layer call that `node` is contracted into, or None for a functional operation."""
        call = self.innermost(node)
        return call if call is not None and call.is_layer and not call.has_children else None


def build(
    loss: Tensor,
    recorder: Recorder,
    parameters: Mapping[str, Tensor],
    inputs: Callable[[], Mapping[str, Tensor]],
    before: Structure | None = None,
) -> Structure:
    """Return the contracted graph of the step that ended in `loss`: the loss alone, where it has no graph.

    Args:
        loss: the step's loss, with its graph, if it has one.
        recorder: the recorder of that (structural) step.
        parameters: working parameters by qualified name.
        inputs: gives the tensors of the batch by name; asked only if the graph holds a leaf of another kind.
        before: the structure of an earlier step, which most often is the same.
    """
    nodes: Nodes = {} if loss.grad_fn is None else topological(loss.grad_fn)
    if before is not None and (same := before.again(loss, nodes, recorder.calls)) is not None:
        return same
    windows = Windows(recorder.calls)
    names = {id(p): n for n, p in parameters.items()}
    layers = names_of_layers(recorder.calls)
    end, model = own_name(LOSS, layers), own_name(MODEL, layers)
    structure = Structure({}, {}, nodes, {}, {}, [], recorder.calls, loss=end, root=loss)
    # name -> next number to try
    taken = dict.fromkeys([*(c.name for c in recorder.calls), LOSS, end, model], 1)
    structure.groups[end] = Group(end, "loss", 2**62, LOSS, type="loss")
    leaves = dict.fromkeys(node for node, made_of in nodes.items() if not made_of and is_leaf(node))
    for node in sorted((node for node in nodes if node not in leaves), key=node_number):
        group = _group(node, recorder, windows, taken, structure, model)
        structure.group_of[node] = group.name
    known = {*names, *(id(site.slot) for site in recorder.sites)}
    others = any(id(node.variable) not in known for node in leaves)
    input_names = {id(t): n for n, t in inputs().items()} if others else {}
    layers |= set(structure.groups)
    for node in leaves:
        structure.leaves[node] = node.variable
        if id(node.variable) not in known:
            _place_leaf(node, structure, input_names, layers)
    if nodes:
        structure.edges[(structure.group_of[loss.grad_fn], end)] = None
    weights = of_parameters(nodes)
    for source, target, _, _ in boundaries(structure, weights, stands(structure)):
        structure.edges[(source, target)] = None
    _attach_parameters(structure, names, weights)
    if not others:
        structure.remember()
    return structure


def _group(
    node: Node,
    recorder: Recorder,
    windows: Windows,
    taken: dict[str, int],
    structure: Structure,
    model: str,
) -> Group:
    call = recorder.calls[node.site.call] if is_probe(node) else windows.layer(node)
    if call is not None:
        name = call.name or model
        if name not in structure.groups:
            order = call.start if not call.has_children else call.end
            structure.groups[name] = layer_group(name, call, order)
        structure.groups[name].hold(node)
        return structure.groups[name]
    made = [structure.group_of[child] for child in below(node) if child in structure.group_of]
    if made and converts(node):  # the same tensor, in another form
        return structure.groups[made[0]]
    op = operation(node)
    inside = windows.innermost(node)
    prefix = f"{inside.name}:" if inside is not None and inside.name else ""
    base = name = f"{prefix}{op}"
    number = taken.get(base, 0)
    while name in taken:
        name, number = f"{base}@{number}", number + 1
    taken[name] = taken[base] = max(number, 1)
    module = inside.module if inside is not None else ""
    group = Group(
        name, "op", node_number(node), base, module, op, None, _shape(node), taken=slice_taken(node)
    )
    group.hold(node)
    structure.groups[name] = group
    return group


def layer_group(name: str, call: Call, order: int) -> Group:
    """Return the node of a layer call."""
    return Group(name, "layer", order, call.name, call.module, call.type, call, call.shape)


def _shape(node: Node) -> tuple[int, ...]:
    metadata = input_metadata(node)
    return tuple(metadata[0].shape) if metadata else ()


def _place_leaf(
    node: Node, structure: Structure, input_names: Mapping[int, str], taken: Container[str]
) -> None:
    leaf = node.variable
    if id(leaf) in input_names:
        name = own_name(input_names[id(leaf)], taken)
        structure.groups[name] = input_group(name, input_names[id(leaf)], tuple(leaf.shape))
        structure.group_of[node] = name
    else:
        structure.foreign.append(leaf)


def input_group(name: str, base: str, shape: tuple[int, ...]) -> Group:
    """Return the node of a tensor of the batch."""
    return Group(name, "input", -1, base, type="input", shape=shape)


def boundaries(
    structure: Structure, weights: Container[Node], probed: Container[Position]
) -> Iterator[tuple[str, str, Node, tuple[Node, int]]]:
    """Yield (source group, target group, node, (next node, output number)) where the groups differ.

    Not where a layer is entered at what it makes of its parameters (`weights`, behind no probe): see NOTE
    [Derivatives in a model].
    """
    for node, made_of in structure.nodes.items():
        target = structure.group_of.get(node)
        if target is None:
            continue
        for child, number in made_of:
            source = structure.group_of.get(child) if child is not None else None
            if source is None or source == target:
                continue
            if child not in weights or (child, number) in probed or structure.groups[source].kind != "layer":
                yield source, target, node, (child, number)


def stands(structure: Structure) -> dict[Position, Node]:
    """Return what the probes stand on: by the output that a layer has made, the probe on it.

    An input that a layer hands on as it is is the output of whoever made it.
    """
    group_of = structure.group_of
    return {
        made_of[0]: node
        for node, made_of in structure.nodes.items()
        if is_probe(node) and group_of.get(made_of[0][0]) == group_of[node]
    }


def entered(structure: Structure, probed: Mapping[Position, Node] | None = None) -> set[str]:
    """Return the layer calls whose outputs are used past their probes; see NOTE [Derivatives in a model].

    Those are left out whose output the call itself goes on with as well.
    """
    probed, found, inner = stands(structure) if probed is None else probed, set[str](), set[str]()
    for node, made_of in structure.nodes.items():
        for position in made_of:
            if position in probed and not is_probe(node):
                source = structure.group_of[probed[position]]
                (inner if structure.group_of.get(node) == source else found).add(source)
    calls = [structure.groups[name].call for name in found - inner]
    return {call.name for call in calls if call is not None}


def bypassed(structure: Structure) -> list[str]:
    """Return the layer calls that some gradient enters elsewhere than at what they returned.

    Their output is returned inside an object of an unknown class, something else of theirs is kept on an
    attribute or used by a derivative, or the like.
    """
    found: dict[str, None] = {}
    probed = stands(structure)
    whole = entered(structure, probed)
    for source, _, _, (child, number) in boundaries(structure, of_parameters(structure.nodes), probed):
        call = structure.groups[source].call
        if call is None or call.has_children or is_probe(child):
            continue
        if not ((child, number) in probed and call.name in whole):
            found[call.name] = None
    return list(found)


def capturable(structure: Structure) -> set[str]:
    """Return the layer calls whose outputs are all used, and behind their probes alone.

    The whole gradient of such an output is that of what was returned. One that the call itself goes on with,
    or that nobody takes, gathers other gradients as well.
    """
    consumers: dict[tuple[Node, int], int] = {}
    behind: dict[str, list[tuple[Node, int]]] = {}  # group -> what its probes stand on
    for node, made_of in structure.nodes.items():
        for child, number in made_of:
            if child is not None:
                consumers[child, number] = consumers.get((child, number), 0) + 1
        if is_probe(node):
            behind.setdefault(structure.group_of[node], []).append(made_of[0])
    found = set()
    for name, edges in behind.items():
        call = structure.groups[name].call
        if call is not None and len(edges) == len(call.sites) and all(consumers[e] == 1 for e in edges):
            found.add(call.name)
    return found


def _attach_parameters(structure: Structure, names: Mapping[int, str], weights: Container[Node]) -> None:
    for node, made_of in structure.nodes.items():
        group = structure.group_of.get(node)
        if group is None:
            continue
        todo = [child for child, _ in made_of if child is not None]
        while todo:
            child = todo.pop()
            leaf, inside = structure.leaves.get(child), structure.group_of.get(child)
            if leaf is not None and id(leaf) in names:
                structure.groups[group].use([names[id(leaf)]])
            elif child in weights and inside != group and structure.groups[inside or group].kind == "layer":
                todo += below(child)
