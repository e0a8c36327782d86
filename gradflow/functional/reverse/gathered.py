"""Walks over a graph whose parameters are sharded: each part is gathered while its nodes are called.

In a pass of autograd's own the model's machinery does that, told by hooks on tensors, which do not act where
a walk calls the nodes. See NOTE [Sharded parameters] in processes/shards.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import attrs

from gradflow.functional.processes.shards import Shards
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.nodes import Node, is_leaf
from gradflow.functional.torch_sharded import ShardedGroup


@attrs.define(eq=False)
class Gatherer:
    """Gathers what the next node of a walk needs, and lets go of what no later one does.

    The order depends on the graph alone, and a walk that ends early is gone through to its end, so that all
    processes gather alike.

    Args:
        nodes: of the graph, in the order of the walk.
        users: the group of each node, None where it uses none.
    """

    nodes: Sequence[Node]
    users: Sequence[ShardedGroup | None]
    _last: dict[int, int] = attrs.field(init=False)
    _at: int = 0

    def __attrs_post_init__(self) -> None:
        self._last = {id(group): i for i, group in enumerate(self.users)}

    def next(self) -> None:
        """Be ready for the next node."""
        before = self.users[self._at - 1] if self._at else None
        if before is not None and self._last[id(before)] < self._at:
            before.module.reshard()
        if self._at < len(self.nodes) and (group := self.users[self._at]) is not None:
            group.module.unshard()
        self._at += 1

    @contextlib.contextmanager
    def walk(self) -> Iterator[Callable[[], None]]:
        """Begin a walk: what is called before each node, in their order."""
        self._at = 0
        try:
            yield self.next
        finally:
            while self._at <= len(self.nodes):
                self.next()


def gatherer(shards: Shards, nodes: Sequence[Node], innermost: Callable[[Node], Call | None]) -> Gatherer:
    """Return what gathers the parameters for a walk.

    Args:
        shards: the model's.
        nodes: of the graph, in the order of the walk.
        innermost: the innermost call that made a node.
    """

    def user(node: Node) -> ShardedGroup | None:
        call = None if is_leaf(node) else innermost(node)
        return None if call is None else shards.group_of(call.module)

    return Gatherer(nodes, [user(node) for node in nodes])
