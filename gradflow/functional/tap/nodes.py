"""Walks over autograd's nodes, and small questions to them."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.functional.tap.probes import is_probe, site_of
from gradflow.functional.torch_private import input_metadata
from gradflow.functional.torch_sharded import sees_through

Node = Any  # an autograd node: a C++ one, or a BackwardCFunction
Position = tuple[Node, int]  # an output of a node
Nodes = dict[Node, Sequence[tuple[Node | None, int]]]  # with what they were computed from: see `feeds`
_Custom = torch.autograd.function.BackwardCFunction  # the nodes of functions written in Python


def feeds(node: Node) -> Sequence[tuple[Node | None, int]]:
    """Return what a node was computed from: per input, the node that made it and which of its outputs it is.

    Identities by which `fully_shard` learns that a gradient passes are left out.
    """
    edges = node.next_functions  # asked of every node again and again: nearly all are told by their class
    for child, _ in edges:
        if isinstance(child, _Custom):
            return [_seen_through(edge) for edge in edges]
    return edges


def _seen_through(edge: tuple[Any, int]) -> tuple[Node | None, int]:
    while sees_through(edge[0]):
        edge = edge[0].next_functions[edge[1]]
    return edge


def maker(tensor: Tensor) -> Node | None:
    """Return the node that made a tensor, identities left out as in `feeds`; None where none did."""
    return _seen_through((tensor.grad_fn, tensor.output_nr))[0]


def converts(node: Node) -> bool:
    """Whether an autograd node makes a DTensor of a tensor, or the other way round, or moves its parts."""
    custom = isinstance(node, _Custom)
    return custom and type(node).__name__ in _CONVERT


def exchanges(node: Node) -> bool:
    """Whether an autograd node, when it is called, waits for other processes that call theirs.

    Told by name: functions of PyTorch's. One of the user's own that does is not known.
    """
    custom = isinstance(node, _Custom)
    return custom and type(node).__name__ in _EXCHANGE


_EXCHANGE = (
    "SyncBatchNormBackward", "_AllGatherBackward", "_AllGatherBaseBackward", "_AllReduceBackward",
    "_AlltoAllBackward", "_AlltoAllSingleBackward", "_BroadcastBackward", "_GatherBackward",
    "_ReduceBackward", "_Reduce_ScatterBackward", "_ScatterBackward",
)  # fmt: skip
_CONVERT = ("_FromTorchTensorBackward", "_ToTorchTensorBackward", "RedistributeBackward")


def below(node: Node) -> list[Node]:
    """Return the nodes that made what a node was computed from."""
    return [child for child, _ in feeds(node) if child is not None]


def nodes_under(
    roots: Iterable[Node], stops: Callable[[Node], bool] = lambda node: False, *, nearest_first: bool = False
) -> Iterator[Node]:
    """Yield the nodes under others, themselves included, each once.

    Args:
        roots: where to start.
        stops: whether not to go on from a node, which is yielded all the same.
        nearest_first: whether to go level by level, and not one way to its end before the next.
    """
    todo = collections.deque(dict.fromkeys(roots))
    seen = set(todo)
    while todo:
        node = todo.popleft() if nearest_first else todo.pop()
        yield node
        if not stops(node):
            new = [child for child in dict.fromkeys(below(node)) if child not in seen]
            seen.update(new)
            todo.extend(new)


def is_leaf(node: Node) -> bool:
    """Whether an autograd node only accumulates the gradient of a leaf tensor."""
    return hasattr(node, "variable")


def topological(root: Node) -> Nodes:
    """Return the autograd nodes under `root`, consumers of a tensor before its producer."""
    made_of = {root: feeds(root)}
    waiting: dict[Node, int] = {root: 0}
    todo = [root]
    while todo:
        for child, _ in made_of[todo.pop()]:
            if child is not None:
                if child not in waiting:
                    waiting[child], made_of[child] = 0, feeds(child)
                    todo.append(child)
                waiting[child] += 1
    order, ready = {}, [root]
    while ready:
        node = ready.pop()
        order[node] = made_of[node]
        for child, _ in made_of[node]:
            if child is not None:
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
    return order


def signature(nodes: Nodes) -> list[Any]:
    """Return what tells an autograd graph from others: kinds of nodes, edges, leaves, calls of the probes.

    Args:
        nodes: all of them, in topological order.
    """
    position = {node: i for i, node in enumerate(nodes)}
    found: list[Any] = []
    for node, made_of in nodes.items():
        if not made_of and is_leaf(node):
            found.append(id(node.variable))
        else:
            found.append(node.site.call if is_probe(node) else node.name())
            found.append([(position[c], k) for c, k in made_of if c is not None])
    return found


def operation(node: Node) -> str:
    """Return the plain name of an autograd node: `AddBackward0` is `add`.

    >>> import torch
    >>> operation(torch.ones(1, requires_grad=True).log_softmax(0).grad_fn)
    'log_softmax'
    """
    return _plain_name(node.name())


@functools.lru_cache(1024)
def _plain_name(full: str) -> str:
    name = re.sub(r"Backward\d*$", "", full.rsplit("::", 1)[-1]) or full
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return re.sub(r"(?<=\d)_d(?![a-z])", "d", name).strip("_")


def of_parameters(nodes: Nodes) -> set[Node]:
    """Return the nodes whose values are made of parameters alone.

    Args:
        nodes: all of them, in topological order.
    """
    found: set[Node] = set()
    for node, made_of in reversed(nodes.items()):
        if not made_of:
            if is_leaf(node) and isinstance(node.variable, nn.Parameter):
                found.add(node)
            continue
        known = {child for child, _ in made_of if child is not None}
        if known and known <= found and site_of(node) is None:
            found.add(node)
    return found


def slice_taken(node: Node) -> tuple[int, ...]:
    """Return (axis, index from 0, size of the axis) where the node takes one slice of an axis, else ()."""
    sizes, axis, index = (getattr(node, f"_saved_{key}", None) for key in ("self_sym_sizes", "dim", "index"))
    if not isinstance(index, int) or not isinstance(axis, int) or not sizes:
        return ()
    axis, index = _signed(axis), _signed(index)
    size = int(sizes[axis])
    return (axis % len(sizes), index % size, size) if size else ()


def softmax_axis(node: Node) -> int:
    """Return the axis from 0 along which the node is a softmax or its logarithm; -1 for other nodes.

    >>> import torch
    >>> softmax_axis(torch.ones(2, 3, 4, requires_grad=True).softmax(-2).grad_fn)
    1
    """
    if not operation(node).endswith("softmax") or not isinstance(
        dim := getattr(node, "_saved_dim", None), int
    ):
        return -1
    return _signed(dim) % max(len(input_metadata(node)[0].shape), 1)


def _signed(number: int) -> int:
    """Return a number that may be negative, and come unsigned."""
    return number - 2**64 if number >= 2**63 else number
