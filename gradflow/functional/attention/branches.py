"""Residual branches: what is added to the stream that it was computed from, and its share of the stream.

A sum of two tensors of one shape ends a residual branch where one of them, the branch, was computed from the
other, the stream. That is read off autograd's graph: behind the branch stand module calls that all ran
later than those behind the stream, and the stream itself. So an embedding of positions that is added to one
of tokens is no branch, nor are two projections that are added up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.trees import iter_tensors, wide_dtype
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.nodes import feeds, maker, nodes_under
from gradflow.functional.tap.probes import site_of
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.torch_private import node_number

SUMS = frozenset({"add", "add_"})
_ROUND = ("Dropout", "Identity", "DropPath", "StochasticDepth")  # a branch is named after the call before


@attrs.frozen(eq=False)
class Branch:
    """A residual branch at its sum.

    Args:
        name: of the module call whose output is added.
        type: class name of that module.
        start: index of the latest layer call behind the stream: calls in the branch come later.
        share: ‖branch‖ / ‖stream‖, a scalar.
    """

    name: str
    type: str
    start: int
    share: Tensor


class Branches:
    """Finds the residual branches of a step."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._outputs: dict[int, tuple[Any, int]] = {}  # by node: the outermost call that returned it

    def returned(self, call: Call, output: Any) -> None:
        """Hear that a module call ends."""
        for tensor in iter_tensors(output):
            if (node := maker(tensor)) is not None:
                self._outputs[id(node)] = (node, call.index)

    def summed(self, args: tuple[Any, ...], alpha: float = 1.0) -> Branch | None:
        """Return the branch that ends in a sum of `args`, the second times `alpha`, if one does."""
        if len(args) < 2 or not all(_may_be_stream(t) for t in args[:2]) or args[0].shape != args[1].shape:
            return None
        a, b = args[:2]
        behind_a, behind_b = _calls_behind([maker(a)]), _calls_behind([maker(b)])
        if not behind_a or not behind_b:
            return None
        branch, stream, inside, start = (
            (a, b, behind_a, max(behind_b))
            if max(behind_a) > max(behind_b)
            else (b, a, behind_b, max(behind_a))
        )
        if min(inside) <= start or not _comes_from(maker(branch), maker(stream)):
            return None
        wide = wide_dtype(branch.device)
        share = torch.linalg.vector_norm(branch.detach(), dtype=wide)
        share = share / torch.linalg.vector_norm(stream.detach(), dtype=wide)
        share = share * abs(alpha) if branch is b else share / abs(alpha)
        call = self._call(maker(branch))
        return Branch(call.name, call.type, start, share)

    def _call(self, node: Any) -> Call:
        """Return the module call that a branch is named after."""
        calls = self._recorder.calls
        while True:
            known = self._outputs.get(id(node))
            if known is None:
                node = max(_outputs_behind([node]), key=_call_of)
                known = self._outputs.get(id(node), (node, _call_of(node)))
            call, behind = calls[known[1]], feeds(node)[0][0]
            if not call.type.startswith(_ROUND) or site_of(node) is None or not _outputs_behind([behind]):
                return call
            node = behind


def _may_be_stream(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() >= 3
        and value.is_floating_point()
        and value.grad_fn is not None
        and not isinstance(value, nn.Parameter)
        and value.numel() > 0
    )


def _outputs_behind(nodes: Iterable[Any]) -> list[Any]:
    """Return the nearest probes, or what else makes the outputs of layers, at or behind autograd nodes."""
    return [node for node in nodes_under(nodes, _is_output) if _is_output(node)]


def _is_output(node: Any) -> bool:
    return site_of(node) is not None


def _call_of(node: Any) -> int:
    site = site_of(node)
    assert site is not None
    return site.call


def _calls_behind(nodes: Iterable[Any]) -> list[int]:
    return [_call_of(node) for node in _outputs_behind(nodes)]


def _comes_from(node: Any, source: Any) -> bool:
    """Whether an autograd node was computed from another; nodes older than `source` are not searched."""
    oldest = node_number(source)
    nodes = nodes_under([node], stops=lambda n: node_number(n) <= oldest)
    return node is not source and any(found is source for found in nodes)
