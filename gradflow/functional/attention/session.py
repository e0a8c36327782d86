"""The session behind `attention()`: statistics of every attention and residual branch, at looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.attention.branches import SUMS, Branches
from gradflow.functional.attention.capture import Capture, Seen
from gradflow.functional.attention.statistics import (
    finish,
    head_distances,
    position_residual,
    row_sums,
    sampled_rows,
)
from gradflow.functional.measurement import Session, gradients
from gradflow.functional.model.trees import iter_tensors, wide_dtype
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.ignorance import Ignorance
from gradflow.functional.tap.recorder import Recorder
from gradflow.records import (
    AttentionGradients,
    AttentionRecord,
    AttentionScores,
    BranchRecord,
    TransformerRecord,
)

BY_HEAD = (
    "entropy", "entropy_share", "max_weight", "first_weight", "slope", "saturated_share", "logit_std",
    "logit_peak", "head_output", "head_grad", "nearest_head",
)  # fmt: skip
SCALARS = (
    "num_keys", "head_diversity", "input_residual", "output_residual", "query_norm", "key_norm", "value_norm",
    "query_grad", "key_grad", "value_grad", "output_grad", "branch_share",
)  # fmt: skip


@attrs.define(eq=False)
class _Pending:
    """An attention of the present step: its numbers so far, and the tensors that gradients are asked for."""

    seen: Seen
    numbers: dict[str, Any]
    branched: bool = False
    context: Tensor | None = None
    output: Tensor | None = None


@attrs.define(eq=False)
class _Layer:
    """What is known of an attention layer over all looks."""

    name: str
    op: str
    heads: int
    queries: int
    module: str
    type: str
    gradient_at: str = ""
    looks: dict[int, dict[str, Any]] = attrs.field(factory=dict)


class AttentionSession(Session):
    """Listens for attention and residual branches; see `attention`.

    Args:
        modules: of the model, by qualified name.
        most: elements of the weights of one attention that are read; of larger ones, some samples.
    """

    def __init__(self, modules: Mapping[str, nn.Module], most: float = math.inf) -> None:
        self._modules, self._most = modules, most
        self._thinned: dict[str, None] = {}  # what was read in part, in words
        self._loss_share = math.nan
        self._capture = Capture(self._attention)
        self._steps: list[int] = []
        self._layers: dict[str, _Layer] = {}
        self._shares: dict[tuple[str, str], dict[int, float]] = {}
        self._forget()

    def _forget(self) -> None:
        self._pending: list[_Pending] = []
        self._inputs: dict[int, list[Tensor]] = {}
        self._found: dict[tuple[str, str], Tensor] = {}
        self._branches: Branches | None = None
        self._recorder: Recorder | None = None
        self._ignorance = Ignorance()

    # ------------------------------------------------------------------ while the model runs

    def hears_alone(self) -> bool:
        """All but the gradients is taken of what is heard."""
        return True

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start a step."""
        self._forget()
        self._step, self._recorder = step, recorder
        self._branches = Branches(recorder)
        self._capture.begin(step, recorder)

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what enters a module while it runs."""
        self._capture.entered(call, args, kwargs)
        self._inputs[call.index] = [t for t in iter_tensors((args, dict(kwargs))) if t.is_floating_point()]

    def left(self, call: Call, output: Any) -> None:
        """Look at what an attention module returns."""
        self._capture.left(call, output)
        assert self._branches is not None
        self._branches.returned(call, output)
        self._inputs.pop(call.index, None)
        for pending in self._pending:
            if pending.seen.call == call.index and pending.output is None:
                self._note_output(pending, call, output)

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Look whether a function is attention, or ends a residual branch."""
        self._ignorance.hear(func, args, kwargs)
        if getattr(func, "__name__", "") in SUMS and self._takes_sums:
            assert self._branches is not None
            if (branch := self._branches.summed(args, kwargs.get("alpha", 1.0))) is not None:
                self._found.setdefault((branch.name, branch.type), branch.share)
                for pending in self._pending:
                    if not pending.branched and pending.seen.call > branch.start:
                        pending.branched = True
                        pending.numbers["branch_share"] = branch.share
        return self._capture.function(func, args, kwargs)

    @property
    def _takes_sums(self) -> bool:
        """Whether sums are looked at for residual branches."""
        return True

    def _attention(self, seen: Seen) -> Callable[[Any], None]:
        """Take the statistics of an attention, and return the function to call with its output."""
        numbers, seen = _weight_numbers(self._sampled(seen)), seen.read()
        pending = _Pending(seen, numbers)
        self._pending.append(pending)
        assert self._recorder is not None
        for call in reversed(self._recorder.running()[-3:]):
            batch_first = _batch_first(self._modules[call.module])
            rows = [positions(t, seen.shape[2], batch_first) for t in self._inputs[call.index]]
            if found := [r for r in rows if r is not None]:
                pending.numbers["input_residual"] = position_residual(found[0].detach())
                break

        def end(out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if not isinstance(out, Tensor) or seen.projection:
                return
            pending.context = out
            if (norms := _context_norms(out.detach(), seen)) is not None:
                pending.numbers["head_output"] = norms

        return end

    def _sampled(self, seen: Seen) -> Seen:
        """Return an attention with the samples that are read of it: all, unless that is too many."""
        samples, heads, queries, keys = seen.shape
        number = max(1, int(min(self._most / (heads * queries * keys), samples)))
        if number == samples:
            return seen
        self._thinned.setdefault(f"{number} of {samples} samples")
        chosen = torch.linspace(0, samples - 1, number).round().long()
        return attrs.evolve(seen, source=seen.source.of(chosen))

    def _note_output(self, pending: _Pending, call: Call, output: Any) -> None:
        queries, batch_first = pending.seen.shape[2], _batch_first(self._modules[call.module])
        for tensor in iter_tensors(output):
            if tensor.is_floating_point():
                rows = positions(tensor, queries, batch_first)
                if rows is not None:
                    pending.output = tensor
                    pending.numbers["output_residual"] = position_residual(rows.detach())
                    return

    # ------------------------------------------------------------------ after the forward pass

    def differentiate(self, loss: Tensor) -> None:
        """Take the gradients at queries, keys, values, contexts and outputs, and let go of these."""
        wanted: list[tuple[_Pending, str, Tensor]] = []
        for pending in self._pending:
            seen = pending.seen
            named = {"query": seen.query, "key": seen.key, "value": seen.value,
                     "context": pending.context, "output": pending.output}  # fmt: skip
            wanted += [(pending, name, t) for name, t in named.items() if t is not None]
            wanted += [(pending, f"projection{i}", w) for i, w in enumerate(seen.projection)]
        found = gradients(loss, [tensor for _, _, tensor in wanted])
        with torch.no_grad():
            for (pending, name, tensor), gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    pending.numbers |= _gradient_numbers(pending.seen, name, tensor.detach(), gradient)
        for pending in self._pending:
            pending.context = pending.output = None
            pending.seen = attrs.evolve(pending.seen, query=None, key=None, value=None)
        self._inputs = {}
        self._capture.forget()

    def end(self) -> None:
        """Read the numbers of the step, and let go of its tensors."""
        look = len(self._steps)
        self._steps.append(self._step)
        calls = self._recorder.calls if self._recorder is not None else []
        for pending in self._pending:
            seen, call = (
                pending.seen,
                calls[pending.seen.call] if calls else None,
            )
            module, kind = (call.module, call.type) if call is not None else ("", "")
            _, heads, queries, _ = seen.shape
            layer = self._layers.setdefault(
                seen.name, _Layer(seen.name, seen.op, heads, queries, module, kind)
            )
            layer.op, layer.heads, layer.queries = seen.op, heads, queries
            if "query_grad" in pending.numbers or "value_grad" in pending.numbers:
                layer.gradient_at = "weights" if seen.projection else "tensors"
            layer.looks[look] = {name: _read(value) for name, value in pending.numbers.items()}
        for key, share in self._found.items():
            self._shares.setdefault(key, {})[look] = float(share)
        if self._layers and not math.isnan(known := self._ignorance.share()):
            self._loss_share = known
        self._capture.forget()
        self._forget()

    def fields(self) -> Mapping[str, Any]:
        """Return the record."""
        looks = range(len(self._steps))
        return {
            "transformer": TransformerRecord(
                steps=self._steps,
                attention=[_record(layer, len(looks)) for layer in self._layers.values()],
                branches=[
                    BranchRecord(
                        name=name, type=kind, share=np.array([found.get(i, math.nan) for i in looks])
                    )
                    for (name, kind), found in self._shares.items()
                ],
                loss_share=self._loss_share,
            )
        }

    def notes(self) -> tuple[str, ...]:
        """Name the modules that are called attention, and in which none was seen."""
        return tuple(
            f"No attention was seen in {name or '(model)'!r} ({kind}), so nothing is told of it. It is seen "
            "in scaled_dot_product_attention, nn.MultiheadAttention, and a softmax multiplied with values."
            for name, kind in self._capture.unseen()
        )


# ------------------------------------------------------------------------------------- the numbers


def _weight_numbers(seen: Seen) -> dict[str, Any]:
    """Return what the weights tell, read part by part."""
    samples, heads, queries, keys = seen.shape
    rows = sampled_rows(samples, heads, queries, keys)
    total, chosen, squares, start = None, [], None, 0
    for part in seen.parts():
        sums = row_sums(part.weights, part.allowed, part.logits)
        total = sums if total is None else total + sums
        number = part.weights.shape[0] * queries
        here = rows[(rows >= start) & (rows < start + number)] - start
        if heads > 1 and len(here):
            by_row = part.weights.masked_fill(part.allowed.sum(-1, keepdim=True) < 2, 0.0).transpose(1, 2)
            chosen.append(by_row.reshape(number, heads, keys)[here.to(by_row.device)])
        if seen.projection and seen.scored is not None:
            values = seen.scored.value[start // queries : start // queries + len(part.weights)]
            context = part.weights @ values.detach().to(part.weights.dtype)
            own = _norms_by_head(context, 1, heads).square()
            squares = own if squares is None else squares + own
        start += number
    assert total is not None
    numbers: dict[str, Any] = attrs.asdict(finish(total), recurse=False)
    numbers["num_keys"] = numbers["num_keys"].mean()
    if squares is not None:
        numbers["head_output"] = squares.sqrt()
    if chosen:
        distances = head_distances(torch.cat(chosen).transpose(0, 1)[None])
        pairs = torch.triu_indices(heads, heads, 1)
        numbers["head_diversity"] = distances[pairs[0], pairs[1]].mean()
        numbers["nearest_head"] = distances.fill_diagonal_(math.inf).amin(1)
    return numbers


def _gradient_numbers(seen: Seen, name: str, tensor: Tensor, gradient: Tensor) -> dict[str, Any]:
    """Return the norms of a gradient, and of what it is the gradient of."""
    heads = seen.shape[1]
    if name == "output":
        return {"output_grad": _norm(gradient)}
    if name == "context":
        norms = _context_norms(gradient, seen)
        return {} if norms is None else {"head_grad": norms}
    if not name.startswith("projection"):
        return {f"{name}_grad": _norm(gradient), f"{name}_norm": _norm(tensor)}
    thirds = ("query", "key", "value")
    if len(seen.projection) == 3:
        parts = {thirds[int(name[-1])]: (tensor, gradient)}
    else:
        parts = dict(zip(thirds, zip(tensor.chunk(3), gradient.chunk(3), strict=True), strict=True))
    numbers: dict[str, Any] = {}
    for which, (weight, grad) in parts.items():
        numbers |= {f"{which}_grad": _norm(grad), f"{which}_norm": _norm(weight)}
        if which == "value":
            numbers["head_grad"] = _norms_by_head(grad.reshape(heads, -1), -2, heads)
    return numbers


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=wide_dtype(x.device))


def _context_norms(x: Tensor, seen: Seen) -> Tensor | None:
    """Return the norms by head of an attention's output, or of its gradient; None if it has no head axis."""
    heads = seen.shape[1]
    if seen.merged:
        return _norms_by_head(x.unflatten(0, (-1, heads)), 1, heads)
    return _norms_by_head(x, seen.head_axis, heads) if heads == 1 or seen.head_axis else None


def _norms_by_head(x: Tensor, axis: int, heads: int) -> Tensor:
    by_head = x.movedim(axis, 0).reshape(heads, -1) if axis and heads > 1 else x.reshape(1, -1)
    return torch.linalg.vector_norm(by_head, dim=1, dtype=wide_dtype(x.device))


def positions(x: Tensor, number: int, batch_first: bool) -> Tensor | None:
    """Return a tensor as (..., positions, features), where one of its axes holds `number` positions.

    A map of (samples, channels, height, width) counts its pixels as positions.
    """
    if x.dim() == 2 and x.shape[0] == number:
        return x
    if x.dim() == 3:
        axes = (1, 0) if batch_first else (0, 1)
        for axis in axes:
            if x.shape[axis] == number:
                return x.movedim(axis, 1)
    if x.dim() == 4 and x.shape[2] == number:
        return x
    if x.dim() == 4 and x.shape[1] == number:
        return x.transpose(1, 2)
    if x.dim() == 4 and x.shape[2] * x.shape[3] == number:
        return x.flatten(2).transpose(1, 2)
    return None


def _batch_first(module: nn.Module) -> bool:
    return bool(getattr(module, "batch_first", True))


def _read(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(wide_dtype(value.device)).cpu().numpy()
    return value


def _record(layer: _Layer, number: int) -> AttentionRecord:
    heads = layer.heads
    arrays: dict[str, Any] = {}
    for name in BY_HEAD:
        rows = np.full((number, heads), np.nan)
        for look, numbers in layer.looks.items():
            if name in numbers and len(numbers[name]) == heads:
                rows[look] = numbers[name]
        arrays[name] = rows
    for name in SCALARS:
        arrays[name] = [layer.looks.get(look, {}).get(name, math.nan) for look in range(number)]
    return AttentionRecord(
        name=layer.name, module=layer.module, type=layer.type, op=layer.op, num_heads=heads,
        num_queries=layer.queries, scores=AttentionScores(**_taken(AttentionScores, arrays)),
        gradients=AttentionGradients(at=layer.gradient_at, **_taken(AttentionGradients, arrays)), **arrays,
    )  # fmt: skip


def _taken(kind: type, arrays: dict[str, Any]) -> dict[str, Any]:
    """Take the arrays that are fields of a record out of the others."""
    return {f.name: arrays.pop(f.name) for f in attrs.fields(kind) if f.name in arrays}
