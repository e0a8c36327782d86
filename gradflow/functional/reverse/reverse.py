"""Reverse passes: gradients with respect to parameters and slots, and the exact flow on every edge.

NOTE [Two transforms, and a third pass]
`torch.func.vjp` differentiates the pure step under any outer transform, but loses fused kernels and rejects
old-style autograd Functions and activation checkpointing. `torch.autograd.grad` over the very same pure step
keeps them ("fused"). Reentrant checkpointing refuses `autograd.grad` too, and takes only `backward()`: then
the gradients are read from the `.grad` of our own leaves, and those of leaves that are not ours are put back.

NOTE [The flow on every edge]
The norm of the cotangent that one consumer hands back is not to be had from a gradient with respect to the
tensor, which is the sum over its consumers. The full mode therefore walks the autograd graph itself, from the
loss back, calling each node with the gradient that has arrived: what a node returns for each of its inputs
is the cotangent of that edge, exactly. Nothing is hooked and nothing aliased. An output that is also used
past its probe has gathered its whole gradient when the walk comes to what the probe stands on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.functional.reverse.autograd_graph import Structure, stands
from gradflow.functional.reverse.ranks import effective_rank, gram_matrix, packed
from gradflow.functional.tap.nodes import Node, Position, feeds, is_leaf, of_parameters, topological
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.tap.sums import as_norm, magnitude
from gradflow.functional.torch_private import in_reverse_pass, input_metadata, plain_gradients


def fused(
    loss: Tensor,
    leaves: Sequence[Tensor | GradientEdge],
    *,
    cotangent: Tensor | None = None,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """Return the gradients of `loss` with respect to `leaves`, None where no path leads there.

    Args:
        loss: a scalar, or any tensor where a cotangent of its shape is given.
        leaves: what to differentiate with respect to.
        cotangent: what the gradient of `loss` itself is; None for 1.
        retain_graph: whether the graph is kept.

    Raises:
        ReentrantCheckpoint: if the graph holds one.
    """
    if loss.grad_fn is None:
        return [None] * len(leaves)
    try:
        if cotangent is None:
            return list(plain_gradients(loss, leaves, retain_graph=retain_graph))
        inputs: Any = leaves
        return list(
            torch.autograd.grad(loss, inputs, cotangent, retain_graph=retain_graph, allow_unused=True)
        )
    except RuntimeError as error:
        if not any(words in str(error) for words in _REENTRANT):
            raise
    raise ReentrantCheckpoint


# What PyTorch says, in its older and its newer words, where a reentrant checkpoint meets `autograd.grad`.
_REENTRANT = ("Checkpointing is not compatible", "torch.utils.checkpoint is incompatible with .grad()")


class ReentrantCheckpoint(Exception):
    """The graph holds a reentrant checkpoint, or another function whose backward runs a reverse pass of its
    own, and the pass must be `accumulated`; never seen by a user."""


def check_walkable(structure: Structure) -> None:
    """Raise if the graph holds a reentrant checkpoint.

    `autograd.grad` refuses one on the way to a leaf, but passes by one whose leaves are all inside: their
    gradients would look as if no path led there.
    """
    if any(node.name() == "CheckpointFunctionBackward" for node in structure.nodes):
        raise ReentrantCheckpoint


def accumulated(
    loss: Tensor,
    leaves: Sequence[Any],
    wanted: Collection[int] = (),
    *,
    cotangent: Tensor | None = None,
    retain_graph: bool = False,
) -> dict[int, Tensor | None]:
    """Run `loss.backward()`, leaving the `.grad` of leaves that are not ours as it was.

    The gradients are found in the `.grad` of our own leaves, slots made while it ran included.

    Args:
        loss: scalar loss with its graph.
        leaves: those that are ours: working parameters and slots.
        wanted: ids of leaves of the user's whose gradients are asked for.
        cotangent: what the gradient of `loss` itself is; None for 1.
        retain_graph: whether the graph is kept.

    Returns:
        The gradients of those of `wanted` that were met, by id.
    """
    if loss.grad_fn is None:
        return {}
    ours = {id(leaf) for leaf in leaves}
    saved: dict[int, tuple[weakref.ref[Tensor], Tensor | None]] = {}  # weak: some are a checkpoint's own

    def note(root: Node) -> None:
        nodes = topological(root)
        slots = {feeds(node)[1][0] for node in nodes if is_probe(node)}  # made in a checkpoint
        for leaf in (n.variable for n in nodes if is_leaf(n) and n not in slots):
            known = saved.get(id(leaf))
            if id(leaf) not in ours and (known is None or known[0]() is not leaf):
                saved[id(leaf)] = (weakref.ref(leaf), leaf.grad)
                leaf.grad = None

    note(loss.grad_fn)
    try:
        with _told_of_inner_passes(note):
            loss.backward(cotangent, retain_graph=retain_graph)
        met = {key: reference() for key, (reference, _) in saved.items() if key in wanted}
        return {key: leaf.grad for key, leaf in met.items() if leaf is not None}
    finally:
        for reference, grad in saved.values():
            if (leaf := reference()) is not None:
                leaf.grad = grad


@contextlib.contextmanager
def _told_of_inner_passes(note: Callable[[Node], None]) -> Iterator[None]:
    """Have `note` told of every graph that is differentiated inside a backward pass, before it is.

    A reentrant checkpoint builds its graph, with leaves that no walk over the loss's graph can have met, and
    calls `torch.autograd.backward` on it.
    """
    plain = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if in_reverse_pass():  # inside a pass, and not another thread's own
            for tensor in (tensors,) if isinstance(tensors, Tensor) else tensors:
                if tensor.grad_fn is not None:
                    note(tensor.grad_fn)
        plain(tensors, *args, **kwargs)

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = plain


@attrs.define(eq=False)
class Flows:
    """Norms of one full reverse pass, still on their devices.

    Args:
        edges: ‖c‖ by (source, target).
        groups: ‖g‖ of a group's output gradients.
        probes: magnitude of the gradient at each probe, by the id of its site.
        leaves: gradient of each leaf, by id.
        ranks: effective rank of the output gradient of layers, where asked for.
        grams: in their place, what they are taken of, where that is to be added up over processes.
        kept: gradients that are kept whole, by what they are of: an edge, a node, or a probe's site.
    """

    edges: dict[tuple[str, str], Tensor] = attrs.field(factory=dict)
    groups: dict[str, Tensor] = attrs.field(factory=dict)
    probes: dict[int, Tensor] = attrs.field(factory=dict)
    leaves: dict[int, Tensor] = attrs.field(factory=dict)
    ranks: dict[str, float] = attrs.field(factory=dict)
    grams: dict[str, Tensor] = attrs.field(factory=dict)
    kept: dict[tuple[Any, ...], list[Tensor]] = attrs.field(factory=dict)

    def keep(self, *of: Any, gradient: Tensor) -> None:
        """Keep a gradient whole."""
        self.kept.setdefault(of, []).append(gradient)


def walked(
    loss: Tensor,
    structure: Structure,
    *,
    exact: bool,
    ranks: bool = False,
    kept: Collection[str] | None = None,
) -> Flows:
    """Return the flow on every edge; see NOTE [The flow on every edge].

    Args:
        loss: scalar loss with its graph.
        structure: the contracted graph of the same step.
        exact: take sums in double precision.
        ranks: take the effective rank of every layer's output gradient as well (one SVD each).
        kept: names of nodes whose gradients are kept whole, and Gram matrices instead of ranks, to be
            combined with those of other processes; None where there are none.

    Raises:
        ReentrantCheckpoint: if the graph holds one, whose inside cannot be walked.
    """
    check_walkable(structure)
    walk = _Walk(structure, exact, ranks, kept)
    with torch.no_grad():
        walk.run(loss)
    return walk.flows


@attrs.define(eq=False)
class _Walk:
    """One walk from the loss back; see NOTE [The flow on every edge]."""

    structure: Structure
    exact: bool
    ranks: bool
    kept: Collection[str] | None = None
    flows: Flows = attrs.field(factory=Flows)
    _arriving: dict[Node, dict[int, dict[str, Tensor]]] = attrs.field(factory=dict)
    _weights: set[Node] = attrs.field(init=False)
    _stands: dict[Position, Node] = attrs.field(init=False)
    _entered: set[Position] = attrs.field(init=False)  # outputs that are also used past their probes
    _seen: dict[Position, Tensor] = attrs.field(factory=dict)  # what their probes saw

    def __attrs_post_init__(self) -> None:
        nodes, group_of = self.structure.nodes, self.structure.group_of
        self._weights, self._stands = of_parameters(nodes), stands(self.structure)
        self._entered = {
            position
            for node, made_of in nodes.items()
            for position in made_of
            if position in self._stands and group_of.get(node) != group_of[self._stands[position]]
        }

    def run(self, loss: Tensor) -> None:
        """Call every node with the gradient that has arrived at it, from the loss back."""
        self._arriving[loss.grad_fn] = {0: {self.structure.loss: torch.ones_like(loss)}}
        with self.structure.walk() as ready:
            for node in self.structure.nodes:
                ready()
                incoming = self._arriving.pop(node, None)
                if incoming is not None:
                    self._visit(node, incoming)

    def _visit(self, node: Node, incoming: dict[int, dict[str, Tensor]]) -> None:
        gradients = {number: self._gather(node, number, by_group) for number, by_group in incoming.items()}
        if node in self.structure.leaves:
            self.flows.leaves[id(self.structure.leaves[node])] = gradients[0]
            return
        sliced = self.structure.gatherer is not None  # then gradients come in slices, and none is kept whole
        for cotangent, (child, number) in zip(call_node(node, gradients), feeds(node), strict=False):
            if cotangent is not None and child is not None and not (sliced and is_leaf(child)):
                self._send(cotangent, node, child, number)

    def _send(self, cotangent: Tensor, node: Node, child: Node, number: int) -> None:
        cotangent = validated(cotangent, child, number, self.structure)
        by_group = self._arriving.setdefault(child, {}).setdefault(number, {})
        source = self.structure.group_of[node]
        old = by_group.get(source)
        by_group[source] = cotangent if old is None else old + cotangent

    def _gather(self, node: Node, number: int, by_group: dict[str, Tensor]) -> Tensor:
        """Sum what has arrived at a node over its consumers, noting what crossed a boundary."""
        group = self.structure.group_of.get(node)
        total = _total(by_group.values())
        if group is None:
            return total
        outside = {source: c for source, c in by_group.items() if source != group}
        probe = self._stands.get((node, number))
        layer = self.structure.groups[group].kind == "layer"
        if layer and probe is None and node in self._weights:
            return total  # a way to the layer's parameters: see NOTE [Derivatives in a model]
        sizes = [magnitude(cotangent, exact=self.exact) for cotangent in outside.values()]
        for source, size in zip(outside, sizes, strict=True):
            _add(self.flows.edges, (group, source), size)
            if self.kept and group in self.kept:
                self.flows.keep("edge", group, source, gradient=outside[source])
        if is_probe(node):
            if feeds(node)[0] in self._entered:
                self._seen[feeds(node)[0]] = total
            else:
                whole = sizes[0] if len(sizes) == len(by_group) == 1 else None
                self._note_output(node, group, total, whole)
        elif (node, number) in self._entered and probe is not None:
            seen = self._seen.pop((node, number), None)
            self._note_output(probe, group, _total([*outside.values(), *([] if seen is None else [seen])]))
        elif outside and not self._is_probed(group):
            whole = sizes[0] if len(by_group) == 1 else magnitude(total, exact=self.exact)
            _add(self.flows.groups, group, whole)
            if self.kept and group in self.kept:
                self.flows.keep("node", group, gradient=total)
        return total

    def _note_output(self, probe: Node, group: str, gradient: Tensor, size: Tensor | None = None) -> None:
        """Note the gradient of one output of a layer, of this magnitude if that is known."""
        size = magnitude(gradient, exact=self.exact) if size is None else size
        _add(self.flows.groups, group, size)
        self.flows.probes[id(probe.site)] = size
        kind = self.structure.groups[group].type
        if self.kept and group in self.kept:
            self.flows.keep("node", group, gradient=gradient)
            self.flows.keep("probe", id(probe.site), gradient=gradient)
        if self.ranks and group not in self.flows.ranks and group not in self.flows.grams:
            if self.kept is None or gradient.dim() < 2:
                self.flows.ranks[group] = effective_rank(gradient, kind)
            else:
                self.flows.grams[group] = packed(gram_matrix(gradient, kind))

    def _is_probed(self, group: str) -> bool:
        call = self.structure.groups[group].call
        return call is not None and bool(call.sites)


def _total(parts: Iterable[Tensor]) -> Tensor:
    first, *others = parts
    for part in others:
        first = first + part
    return first


def _add(norms: dict[Any, Tensor], key: Any, size: Tensor) -> None:
    """Take one more part, of this magnitude, into the norm under `key`."""
    norm = as_norm(size)
    norms[key] = torch.hypot(norms[key], norm) if key in norms else norm


def call_node(node: Node, gradients: dict[int, Tensor]) -> Sequence[Tensor | None]:
    """Return the cotangents that an autograd node hands to its inputs, given those of its outputs.

    They are in the order of its `next_functions`, in which what a function is given that is no tensor is not.
    """
    if not gradients:
        return ()
    if is_probe(node):
        return (gradients[0],)
    metadata = input_metadata(node)
    count = max(len(metadata), max(gradients) + 1)
    args: list[Tensor | None] = [gradients.get(i) for i in range(count)]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return _of_tensors(node, call_custom(node, args))
    result = node(*args)
    return result if isinstance(result, tuple) else (result,)


def call_custom(node: Node, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return what a custom function's backward pass gives for each of its arguments, tensors or not."""
    # Whether it asked for None instead, by `set_materialize_grads`, cannot be read; zeros mean the same.
    pairs = zip(gradients, input_metadata(node), strict=False)
    result = node.apply(*[_zeros(m) if a is None else a for a, m in pairs])
    return result if isinstance(result, tuple) else (result,)


def _of_tensors(node: Node, result: tuple[Tensor | None, ...]) -> Sequence[Tensor | None]:
    """Return what a custom function gives for those of its arguments that have a node."""
    wanted = node.needs_input_grad
    if len(result) == len(node.next_functions) or len(wanted) != len(result):
        return result
    found = (cotangent for cotangent, asked in zip(result, wanted, strict=True) if asked)
    return [None if child is None else next(found, None) for child, _ in node.next_functions]


def _zeros(metadata: Any) -> Tensor:
    return torch.zeros(tuple(metadata.shape), dtype=metadata.dtype, device=metadata.device)


def validated(cotangent: Tensor, child: Node, number: int, structure: Structure) -> Tensor:
    """Return the cotangent in the shape and dtype of the tensor it belongs to, as the engine would."""
    like = structure.leaves.get(child)
    if like is None:
        metadata = input_metadata(child)
        if number >= len(metadata):
            return cotangent
        like = metadata[number]
    if cotangent.layout is torch.strided and tuple(cotangent.shape) != tuple(like.shape):
        cotangent = cotangent.sum_to_size(tuple(like.shape))
    return cotangent if cotangent.dtype == like.dtype else cotangent.to(like.dtype)
