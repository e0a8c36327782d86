"""What is known of a tensor on its way from a softmax to the product with values.

For its trace see NOTE [What a softmax is for] in `softmax.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attrs
from torch import Tensor

from gradflow.functional.attention.scores import PART, Part
from gradflow.functional.tap.watch import MASKED


@attrs.define(eq=False)
class Origin:
    """One softmax.

    Args:
        owner: the module call that holds what it gave.
        logits: what entered it, as the model computes with it.
        version: how often that tensor had been written to at the time.
        axis: along which it runs.
        weights: its output, in its original shape.
    """

    owner: int
    logits: Tensor
    version: int
    axis: int
    weights: Tensor

    def hand_over(self, call: int, parent: int) -> None:
        """Give what a module call holds of it to the call that it returned to."""
        if self.owner == call:
            self.owner = parent


@attrs.frozen(eq=False)
class Followed:
    """A tensor on its way from a softmax to a product, or (without weights) from a linear layer to a softmax.

    Args:
        holder: the autograd node, or tensor, that it is recognised by; kept alive.
        trace: see NOTE [What a softmax is for].
        weights: the softmax's output in this shape, before dropout.
        logits: what entered the softmax, in this shape.
        origin: the softmax.
        lead: (samples, heads), where a linear layer's output has had both merged in its first axis.
    """

    holder: Any
    trace: Tensor
    weights: Tensor | None = None
    logits: Tensor | None = None
    origin: Origin | None = None
    lead: tuple[int, ...] = ()

    @property
    def axes(self) -> list[int]:
        """The axes that the trace marks."""
        t = self.trace
        return [d for d in range(t.dim()) if t.shape[d] > 1 and t.stride(d) != 0]


@attrs.frozen(eq=False)
class Weighted:
    """Values weighted by a softmax: the attention that was seen, of shape (samples, heads, queries, keys).

    Args:
        weights: what the softmax gave.
        logits: what entered it; None if it was overwritten.
        queries: the tensor of queries, where the scores are a product.
        keys: the tensor of keys, likewise.
        values: the tensor of values.
        head_axis: the axis of the product's output that counts heads, negative; 0 if there is none.
        merged: whether samples and heads are merged in the first axis of that output.
    """

    weights: Tensor
    logits: Tensor | None
    queries: Tensor | None
    keys: Tensor | None
    values: Tensor
    head_axis: int
    merged: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(samples, heads, queries, keys)."""
        n, heads, queries, keys = self.weights.shape
        return n, heads, queries, keys

    def of(self, chosen: Tensor) -> Weighted:
        """Return the attention of some samples, by their indices; its queries, keys and values are all."""
        logits = None if self.logits is None else self.logits[chosen]
        return attrs.evolve(self, weights=self.weights[chosen], logits=logits)

    def parts(self) -> Iterator[Part]:
        """Yield the attention, some samples at a time."""
        samples, heads, queries, keys = self.shape
        step = max(1, PART // max(heads * queries * keys, 1))
        allowed = self.allowed
        for start in range(0, samples, step):
            part = slice(start, start + step)
            yield Part(self.weights[part], allowed[part], None if self.logits is None else self.logits[part])

    @property
    def allowed(self) -> Tensor:
        """Which keys a query may attend to: those that no mask has pushed out of reach."""
        return self.weights > 0 if self.logits is None else self.logits > MASKED


def hidden(found: Followed, mask: Any) -> Followed:
    """Return what is followed after a mask that is applied behind the softmax: masked weights are 0."""
    assert found.weights is not None
    if not isinstance(mask, Tensor):
        return found
    logits = None if found.logits is None else found.logits.masked_fill(mask, -math.inf)
    return attrs.evolve(found, weights=found.weights.masked_fill(mask, 0.0), logits=logits)


def fitting(weights: Tensor, values: Followed | None) -> tuple[int, ...]:
    """Return the values' (samples, heads), where the first axis of the weights holds as many."""
    lead = () if values is None else values.lead
    return lead if weights.dim() == 3 and lead and math.prod(lead) == weights.shape[0] else ()


def unmerged(found: Followed, order: list[int]) -> tuple[int, ...]:
    """Return the shape (samples, heads) that the first axis had at the softmax, if it was merged since."""
    assert found.origin is not None
    assert found.weights is not None
    then, now = found.origin.weights, found.weights
    plain = then.dim() == 4 and now.dim() == 3 and order == [0, 1, 2] and then.shape[2:] == now.shape[1:]
    same = then.data_ptr() == now.data_ptr() and then.is_contiguous() and now.is_contiguous()
    return tuple(then.shape[:2]) if plain and same else ()
