"""Attention written out: a softmax whose output is multiplied with values.

NOTE [What a softmax is for]
A softmax is attention where its output, possibly after dropout, a cast, a mask or a change of shape, is an
operand of a matrix product that sums over the very axis that the softmax runs along. So a classifier's
softmax is none, and neither is a router's whose weights multiply what the experts give. Nor is a softmax
along the features that a linear layer gives, whatever follows: those are classes, experts or features, no
keys.

To know along which axis, every tensor that is followed has a *trace*: a tensor without data, of the same
shape, whose strides are zero except along the axes that come from the softmax's (or the features') axis.
Every change of the tensor's shape is applied to the trace too. A tensor is recognised by the autograd node
that made it, so that a probe, which puts a new tensor in an output's place, does not hide it; without a
graph, by its identity.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.attention.followed import Followed, Origin, Weighted, fitting, hidden, unmerged
from gradflow.functional.attention.products import PRODUCTS, Labels, operands_of
from gradflow.functional.tap.nodes import feeds
from gradflow.functional.tap.probes import is_probe, site_of
from gradflow.functional.torch_private import num_writes

End = Callable[[Any], None]

_PASSING = frozenset(
    [
        *("dropout", "dropout_", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach"),
        *("to", "type", "float", "double", "half", "bfloat16", "type_as", "nan_to_num"),
        *("mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "masked_fill", "masked_fill_"),
    ]
)
_FEATUREWISE = _PASSING | {"add", "add_", "sub", "sub_", "clamp", "tanh", "gelu", "relu", "silu", "softplus"}
_SHAPING = frozenset(
    [
        *("view", "reshape", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"),
        *("unsqueeze", "squeeze", "flatten", "unflatten", "expand", "expand_as", "view_as", "reshape_as"),
        *("__getitem__", "narrow", "select", "chunk", "split", "unbind", "unsafe_chunk"),
    ]
)
_TURNS = frozenset(["T", "mT", "H", "mH"])
_FEW = 16  # outputs of linear layers that are followed at a time


class Follower:
    """Follows every softmax of a step to the product with its values; see NOTE [What a softmax is for]."""

    def __init__(self) -> None:
        self._weights: dict[tuple[int, int], Followed] = {}
        self._features: collections.OrderedDict[tuple[int, int], Followed] = collections.OrderedDict()
        self._products: dict[int, _Product] = {}  # by node of the output

    def function(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        owner: int,
    ) -> Weighted | End | None:
        """Hear of a function call: return the attention that it is, or a function to call with its output."""
        if name == "softmax":
            return self._softmax(args, kwargs, owner)
        if name in PRODUCTS:
            return self._product(name, args, kwargs)
        if name in ("linear", "addmm"):
            return self._mark_features
        if name in _SHAPING or (name == "__get__" and _attribute(func) in _TURNS):
            return self._shaped(func, args, kwargs)
        if name in _FEATUREWISE:
            return self._passed(name, args, kwargs)
        return None

    def returned(self, call: int, parent: int, outputs: Iterable[Tensor]) -> None:
        """Hear that a module call ends: what it returns goes on to its caller, the rest is let go of."""
        if not self._weights and not self._features:
            return
        kept: set[int] = set()
        for tensor in outputs:
            node = tensor.grad_fn
            source = feeds(node)[0] if node is not None and is_probe(node) else None
            for table in (self._weights, self._features):
                found = table.get(_key(tensor))
                if found is None and source is not None and source[0] is not None:
                    found = table.get((id(source[0]), source[1]))
                    if found is not None:
                        table[_key(tensor)] = attrs.evolve(found, holder=_holder(tensor))
                if found is not None and found.origin is not None:
                    kept.add(id(found.origin))
                    found.origin.hand_over(call, parent)
        gone = [k for k, f in self._weights.items() if f.origin is not None and f.origin.owner == call]
        for k in gone:
            if id(self._weights[k].origin) not in kept:
                del self._weights[k]
        while len(self._features) > _FEW:
            self._features.popitem(last=False)

    def clear(self) -> None:
        """Let go of all tensors."""
        self._weights, self._products = {}, {}
        self._features.clear()

    # ------------------------------------------------------------------ on the way

    def _mark_features(self, out: Any) -> None:
        if isinstance(out, Tensor) and out.dim():
            self._add_features(out, _trace(out.shape, out.dim() - 1))

    def _add_features(self, out: Tensor, trace: Tensor, lead: tuple[int, ...] = ()) -> None:
        self._features[_key(out)] = Followed(_holder(out), trace, lead=lead)
        while len(self._features) > 4 * _FEW:
            self._features.popitem(last=False)

    def _softmax(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], owner: int) -> End | None:
        x = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if not isinstance(x, Tensor) or not isinstance(dim, int) or x.dim() < 2 or not x.numel():
            return None
        features = self._features.get(_key(x))
        if features is not None and dim % x.dim() in features.axes:
            return None

        def end(out: Any) -> None:
            if isinstance(out, Tensor) and out.shape == x.shape:
                axis, weights = dim % out.dim(), out.detach()
                origin = Origin(owner, x, num_writes(x), axis, weights)
                trace = _trace(out.shape, axis)
                self._weights[_key(out)] = Followed(_holder(out), trace, weights, x.detach(), origin)

        return end

    def _passed(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> End | None:
        found = self._find(args[:2], self._weights) if name in _PASSING else None
        if found is not None and found.weights is not None:
            in_place = name.endswith("_") or kwargs.get("inplace", args[3:4] == (True,))
            kept = attrs.evolve(found, weights=found.weights.clone()) if in_place else found
            if name.startswith("masked_fill") and self._find(args[:1], self._weights) is found:
                kept = hidden(found, args[1] if len(args) > 1 else kwargs.get("mask"))

            def follow(out: Any) -> None:
                if isinstance(out, Tensor) and out.shape == kept.trace.shape:
                    self._weights[_key(out)] = attrs.evolve(kept, holder=_holder(out))

            return follow
        marked = self._find(args[:2], self._features)
        if marked is None:
            return None

        def mark(out: Any) -> None:
            if isinstance(out, Tensor) and out.shape == marked.trace.shape:
                self._add_features(out, marked.trace, marked.lead)

        return mark

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> End | None:
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            return None
        found = self._weights.get(_key(x)) or self._features.get(_key(x))
        if found is None:
            return None

        def same(t: Tensor | None) -> list[Any]:
            if t is None:
                return []
            made = func(t, *args[1:], **kwargs)
            return [made] if isinstance(made, Tensor) else list(made)

        def end(out: Any) -> None:
            outs = [out] if isinstance(out, Tensor) else list(out)
            try:
                traces, weights, logits = same(found.trace), same(found.weights), same(found.logits)
            except (RuntimeError, NotImplementedError, IndexError, TypeError):  # not possible on the trace
                return
            for i, made in enumerate(outs):
                if found.weights is None:
                    self._add_features(made, traces[i], _lead(x.shape, made.shape) or found.lead)
                elif i < len(weights):
                    parts = (traces[i], weights[i], logits[i] if logits else None)
                    self._weights[_key(made)] = Followed(_holder(made), *parts, found.origin)

        return end

    @staticmethod
    def _find(operands: Iterable[Any], table: Mapping[tuple[int, int], Followed]) -> Followed | None:
        for operand in operands if table else ():
            if isinstance(operand, Tensor) and (found := table.get(_key(operand))) is not None:
                return found
        return None

    # ------------------------------------------------------------------- products

    def _product(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Weighted | End | None:
        operands = operands_of(name, args, kwargs)
        if operands is None:
            return None
        a, b, labels = operands
        for this, other, left in ((a, b, True), (b, a, False)):
            found = self._weights.get(_key(this)) if self._weights else None
            if found is None or (seen := self._weighted(found, other, labels, left)) is None:
                continue
            self._weights = {k: f for k, f in self._weights.items() if f.origin is not found.origin}
            return seen

        def end(out: Any) -> None:
            if isinstance(out, Tensor) and isinstance(b, nn.Parameter):
                self._mark_features(out)
            elif isinstance(out, Tensor) and out.grad_fn is not None:
                self._products[id(out.grad_fn)] = _Product(out.grad_fn, out, a, b, labels)

        return end

    def _weighted(self, found: Followed, values: Tensor, labels: Labels, left: bool) -> Weighted | None:
        """Return the attention if the product sums over the softmax's axis."""
        assert found.weights is not None
        assert found.origin is not None
        own, other = (labels.a, labels.b) if left else (labels.b, labels.a)
        axes = found.axes
        dims = found.weights.dim()
        if len(axes) > 1 or len(own) != dims:
            return None
        axis = axes[0] if axes else (dims - 1 if left else max(dims - 2, 0))  # length one has no stride
        if own[axis] in labels.out or own[axis] not in other:
            return None
        rest = [d for d in range(dims) if d != axis]
        if not rest:
            return None
        queries = [d for d in rest if own[d] not in other] or rest[-1:]
        lead = [d for d in rest if d != queries[-1]]
        order = [*lead, queries[-1], axis]
        logits = found.logits
        if num_writes(found.origin.logits) != found.origin.version:  # overwritten since
            logits = None
        head = own[lead[-1]] if len(lead) >= 2 else ""
        q, k = self._scored_by(found.origin)
        behind = self._features.get(_key(values))
        lead_shape = unmerged(found, order) or fitting(found.weights, behind)
        return Weighted(
            weights=_four(found.weights.permute(order), lead_shape),
            logits=None if logits is None else _four(logits.permute(order), lead_shape),
            queries=q,
            keys=k,
            values=values,
            head_axis=labels.out.index(head) - len(labels.out) if head and head in labels.out else 0,
            merged=bool(lead_shape) and own[0] == labels.out[0],
        )

    def _scored_by(self, origin: Origin) -> tuple[Tensor | None, Tensor | None]:
        """Return the queries and keys whose product the scores are, found on a walk back from the softmax."""
        scores = origin.logits
        todo = collections.deque([scores.grad_fn] if scores.grad_fn is not None else [])
        for _ in range(32):
            if not todo:
                break
            node = todo.popleft()
            made = self._products.get(id(node))
            if made is not None and made.output.numel() == scores.numel():
                # The softmax runs along the axis of the keys, where no axis was moved on the way.
                same = made.output.dim() == scores.dim()
                axis = origin.axis if same else origin.axis - scores.dim()
                keys_first = -made.output.dim() <= axis and made.labels.out[axis] in made.labels.a
                return (made.b, made.a) if keys_first else (made.a, made.b)
            if site_of(node) is None or node is scores.grad_fn:
                todo.extend(child for child, _ in feeds(node) if child is not None)
        return None, None


@attrs.frozen(eq=False)
class _Product:
    """A product that may turn out to be scores."""

    node: Any  # of the output: what it is recognised by is kept alive
    output: Tensor
    a: Tensor
    b: Tensor
    labels: Labels


def _lead(before: torch.Size, after: torch.Size) -> tuple[int, ...]:
    """Return (samples, heads), where a change of shape merges them in the first axis."""
    merges = len(before) == 4 and tuple(after) == (before[0] * before[1], *before[2:])
    return tuple(before[:2]) if merges else ()


def _attribute(getter: Any) -> str:
    return getattr(getattr(getter, "__self__", None), "__name__", "")


def _trace(shape: torch.Size, axis: int) -> Tensor:
    strides = [1 if d == axis else 0 for d in range(len(shape))]
    return torch.empty_strided(tuple(shape), strides, device="meta")


def _holder(tensor: Tensor) -> Any:
    return tensor if tensor.grad_fn is None else tensor.grad_fn


def _key(tensor: Tensor) -> tuple[int, int]:
    node = tensor.grad_fn
    return (id(tensor), -1) if node is None else (id(node), tensor.output_nr)


def _four(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """Return a tensor of (..., queries, keys) as (samples, heads, queries, keys)."""
    if lead:
        return x.unflatten(0, lead)
    if x.dim() == 2:
        return x[None, None]
    return x[:, None] if x.dim() == 3 else x.flatten(0, x.dim() - 4)
