"""Walks over autograd's nodes, and small questions to them."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.functional.tap.probes import is_probe, site_of
from gradflow.functional.torch_sharded import sees_through

Node = Any  # an autograd node: a C++ one, or a BackwardCFunction
Position = tuple[Node, int]  # an output of a node
_Custom = torch.autograd.function.BackwardCFunction  # the nodes of functions written in Python


def feeds(node: Node) -> list[tuple[Node | None, int]]:
    """Return what a node was computed from: per input, the node that made it and which of its outputs it is.

    Identities by which `fully_shard` learns that a gradient passes are left out.
    """
    return [
        _seen_through(edge) if isinstance(edge[0], _Custom) else edge for edge in node.next_functions
    ]  # asked of every node again and again: nearly all are told by their class


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


def topological(root: Node) -> list[Node]:
    """Return the autograd nodes under `root`, consumers of a tensor before its producer."""
    waiting: dict[Node, int] = {root: 0}
    todo = [root]
    while todo:
        for child, _ in feeds(todo.pop()):
            if child is not None:
                if child not in waiting:
                    waiting[child] = 0
                    todo.append(child)
                waiting[child] += 1
    order, ready = [], [root]
    while ready:
        node = ready.pop()
        order.append(node)
        for child, _ in feeds(node):
            if child is not None:
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
    return order


def signature(nodes: list[Node]) -> list[Any]:
    """Return what tells an autograd graph from others: kinds of nodes, edges, leaves, calls of the probes.

    Args:
        nodes: all of them, in topological order.
    """
    position = {node: i for i, node in enumerate(nodes)}
    found: list[Any] = []
    for node in nodes:
        if is_leaf(node):
            found.append(id(node.variable))
        else:
            found.append(node.site.call if is_probe(node) else node.name())
            found.append([(position[c], k) for c, k in feeds(node) if c is not None])
    return found


def operation(node: Node) -> str:
    """Return the plain name of an autograd node: `AddBackward0` is `add`.

    >>> import torch
    >>> operation(torch.ones(1, requires_grad=True).log_softmax(0).grad_fn)
    'log_softmax'
    """
    name = re.sub(r"Backward\d*$", "", node.name().rsplit("::", 1)[-1]) or node.name()
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return re.sub(r"(?<=\d)_d(?![a-z])", "d", name).strip("_")


def of_parameters(nodes: list[Node]) -> set[Node]:
    """Return the nodes whose values are made of parameters alone.

    Args:
        nodes: all of them, in topological order.
    """
    found: set[Node] = set()
    for node in reversed(nodes):
        below = [child for child, _ in feeds(node) if child is not None]
        if is_leaf(node):
            if isinstance(node.variable, nn.Parameter):
                found.add(node)
        elif site_of(node) is None and below and all(child in found for child in below):
            found.add(node)
    return found
