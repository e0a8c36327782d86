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


@attrs.frozen(eq=False)
class Read:
    """What is left of weights that were read: their shape, (samples, heads, queries, keys)."""

    shape: tuple[int, int, int, int]

    def of(self, chosen: Tensor) -> Read:
        """Return that of some samples, by their indices."""
        return Read((len(chosen), *self.shape[1:]))

    def parts(self) -> Iterator[Part]:
        """Yield nothing more."""
        return iter(())


@attrs.frozen(kw_only=True, eq=False)
class Seen:
    """An attention at the moment it is computed.

    Args:
        name: qualified name of the innermost module that is running; `@1`, ... for later ones in a step.
        call: index of that module's call.
        op: the function that it was seen in; `softmax` for one that is multiplied with values.
        source: the weights, or what they are computed from.
        query: the queries as the model computes with them, for gradients; None if there are none.
        key: the keys, likewise.
        value: the values, likewise.
        projection: the weights that make queries, keys and values, where those are out of reach: one tensor
            of all three, or three.
        head_axis: the axis of the output that counts heads, negative; 0 if there is none.
        merged: whether samples and heads are merged in the first axis of the output.
    """

    name: str
    call: int
    op: str
    source: Scored | Weighted | Read
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    projection: tuple[Tensor, ...] = ()
    head_axis: int = 0
    merged: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(samples, heads, queries, keys)."""
        return self.source.shape

    @property
    def scored(self) -> Scored | None:
        """What the weights are computed from, where they are computed again."""
        return self.source if isinstance(self.source, Scored) else None

    def read(self) -> Seen:
        """Return it without its weights and what they are computed from, once they were read."""
        return attrs.evolve(self, source=Read(self.shape))

    def parts(self) -> Iterator[Part]:
        """Yield the weights, some samples at a time."""
        return self.source.parts()


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
            return self._product(name, args, kwargs)
        if name == "multi_head_attention_forward":
            return self._projection(name, args, kwargs)
        running = self._running()
        inside = running[-1].index if running else -1
        found = self._follower.function(name, func, args, kwargs, inside)
        if not isinstance(found, Weighted):
            return found
        named = {"query": found.queries, "key": found.keys, "value": found.values}
        return self._tell("softmax", found, head_axis=found.head_axis, merged=found.merged, **named)

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

    def _tell(self, op: str, source: Scored | Weighted, **what: Any) -> Callable[[Any], None] | None:
        running = self._running()
        module = running[-1].module if running else ""
        number = self._counts.get(module, 0)
        self._counts[module] = number + 1
        self._holding.update(call.module for call in running)
        name = f"{module}@{number}" if number else module
        call = running[-1].index if running else -1
        return self._on_seen(Seen(name=name, call=call, op=op, source=source, **what))

    def _product(
        self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        named = {name: given.get(name) for name in names[:3]}
        query = named["query"]
        if not all(_is_plain(t) for t in named.values()) or query is None:
            return None
        return self._tell(op, scored_by_product(**given), head_axis=-3 if query.dim() > 3 else 0, **named)

    def _projection(
        self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        given = packed_arguments(args, kwargs)
        if not all(_is_plain(given[n]) for n in ("query", "key", "value")):
            return None
        return self._tell(op, scored_by_projection(given), projection=tuple(projection_weights(given)))


def _is_plain(tensor: Any) -> bool:
    """Whether the weights can be computed from a tensor: dense, with values."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
        and tensor.numel() > 0
    )
