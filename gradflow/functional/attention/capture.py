"""Sees the attention of any model while it runs, whatever it is written with.

NOTE [Where attention is seen]
`Capture` listens to a run, see NOTE [Measured steps], and tells of each attention once, before its values are
weighted:

1. `scaled_dot_product_attention`: scores and weights are computed again from its arguments;
2. `multi_head_attention_forward`, which `nn.MultiheadAttention` and PyTorch's transformer layers call: the
   same, by its in-projection;
3. a softmax that is multiplied with values, see NOTE [What a softmax is for]: its own output.

What is none of these (a kernel of one's own, linear attention) is not seen. A module that ran, whose class
is called attention, and in which none was seen, is named in a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.attention.followed import Weighted
from gradflow.functional.attention.scores import (
    Part,
    Scored,
    packed_arguments,
    projection_weights,
    scored_by_product,
    scored_by_projection,
)
from gradflow.functional.attention.softmax import Follower
from gradflow.functional.measurement import Session
from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.recorder import Recorder


@attrs.frozen(kw_only=True, eq=False)
class Seen:
    """An attention at the moment it is computed.

    Args:
        name: qualified name of the innermost module that is running; `@1`, ... for later ones in a step.
        call: index of that module's call.
        op: the function that it was seen in; `softmax` for one that is multiplied with values.
        shape: (samples, heads, queries, keys).
        parts: yields the weights, some samples at a time.
        query: the queries as the model computes with them, for gradients; None if there are none.
        key: the keys, likewise.
        value: the values, likewise.
        projection: the weights that make queries, keys and values, where those are out of reach: one tensor
            of all three, or three.
        head_axis: the axis of the output that counts heads, negative; 0 if there is none.
        merged: whether samples and heads are merged in the first axis of the output.
        scored: what the weights are computed from, where they are computed again.
    """

    name: str
    call: int
    op: str
    shape: tuple[int, int, int, int]
    parts: Callable[[], Iterator[Part]]
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    projection: tuple[Tensor, ...] = ()
    head_axis: int = 0
    merged: bool = False
    scored: Scored | None = None


class Capture(Session):
    """Hands each attention that is seen to `on_seen`, which may return a function to call with its output."""

    def __init__(self, on_seen: Callable[[Seen], Callable[[Any], None] | None]) -> None:
        self._on_seen = on_seen
        self._follower = Follower()
        self._counts: dict[str, int] = {}
        self._holding: set[str] = set()  # modules that attention was seen in, and those around them
        self._called: dict[str, str] = {}  # modules that are called attention: name -> class
        self._running: Callable[[], list[Call]] = list  # returns the calls that are running, outermost first

    def begin(self, step: int, recorder: Recorder) -> None:
        """Forget the step before."""
        self.forget()
        self._running = recorder.running

    def forget(self) -> None:
        """Let go of the step and of the tensors that are followed."""
        self._running, self._counts = list, {}
        self._follower.clear()

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the modules whose class is called attention."""
        if "attention" in call.type.lower() or "attn" in call.type.lower():
            self._called[call.module] = call.type

    def left(self, call: Call, output: Any) -> None:
        """Let weights go on to the caller of a module that returns them."""
        self._follower.returned(call.index, call.parent, iter_tensors(output))

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Look whether a function is attention."""
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._tell(name, self._product(args, kwargs))
        if name == "multi_head_attention_forward":
            return self._tell(name, self._projection(args, kwargs))
        running = self._running()
        inside = running[-1].index if running else -1
        found = self._follower.function(name, func, args, kwargs, inside)
        return self._tell("softmax", _softmax(found)) if isinstance(found, Weighted) else found

    def unseen(self) -> list[tuple[str, str]]:
        """Return name and class of the modules whose class is called attention, and in which none was seen.

        Of modules inside one another, the innermost.
        """
        left = {name: kind for name, kind in self._called.items() if name not in self._holding}
        inner = {
            name for name in left if any(n.startswith(f"{name}." if name else "") and n != name for n in left)
        }
        return [(name, kind) for name, kind in left.items() if name not in inner]

    # ------------------------------------------------------------------ what `on_seen` gets

    def _tell(self, op: str, what: dict[str, Any] | None) -> Callable[[Any], None] | None:
        if what is None:
            return None
        running = self._running()
        module = running[-1].module if running else ""
        number = self._counts.get(module, 0)
        self._counts[module] = number + 1
        self._holding.update(call.module for call in running)
        name = f"{module}@{number}" if number else module
        return self._on_seen(Seen(name=name, call=running[-1].index if running else -1, op=op, **what))

    @staticmethod
    def _product(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [given.get(n) for n in names[:3]]
        if not all(_is_plain(t) for t in tensors):
            return None
        scored = scored_by_product(**given)
        query, key, value = tensors
        assert query is not None
        return {
            "shape": scored.shape, "parts": scored.parts, "scored": scored,
            "query": query, "key": key, "value": value, "head_axis": -3 if query.dim() > 3 else 0,
        }  # fmt: skip

    @staticmethod
    def _projection(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        given = packed_arguments(args, kwargs)
        if not all(_is_plain(given[n]) for n in ("query", "key", "value")):
            return None
        scored = scored_by_projection(given)
        return {
            "shape": scored.shape, "parts": scored.parts, "scored": scored,
            "projection": tuple(projection_weights(given)),
        }  # fmt: skip


def _softmax(seen: Weighted) -> dict[str, Any]:
    n, heads, queries, keys = seen.weights.shape
    step = max(1, 2**22 // max(heads * queries * keys, 1))

    def parts() -> Iterator[Part]:
        allowed = seen.allowed
        for start in range(0, n, step):
            part = slice(start, start + step)
            logits = None if seen.logits is None else seen.logits[part]
            yield Part(seen.weights[part], allowed[part], logits)

    return {
        "shape": (n, heads, queries, keys), "parts": parts,
        "query": seen.queries, "key": seen.keys, "value": seen.values, "head_axis": seen.head_axis,
        "merged": seen.merged,
    }  # fmt: skip


def _is_plain(tensor: Any) -> bool:
    """Whether the weights can be computed from a tensor: dense, with values."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
        and tensor.numel() > 0
    )
