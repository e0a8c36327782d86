"""The birth certificate of a NaN or an Inf: one step run again with every operation watched.

Forward, each function whose output is not finite although its inputs are is a birth; what it makes is
followed, so that of several births the one that reaches the loss is named. An infinity that the program asked
for (a mask filled with `-inf`) is no birth. Backward, the autograd graph is walked node by node, and the
first node that turns finite gradients into non-finite ones is the birth.

NOTE [Swallowed]
What is not finite may be gone again before the loss: x / inf and exp(-inf) are zero, and a clamp, a selection
or `nan_to_num` puts a number in its place. The loss is finite then, and so are the gradients, which such an
operation makes exactly zero. So a step that hands back nothing to a parameter is traced as well, and of a
birth it is told which operation on the way of the gradient has swallowed it. A softmax is none: what is
minus infinity there is a mask.

NOTE [Left out]
A loss may leave out the rows that are not finite (padding, an index to ignore) and be finite itself. Their
gradient is zero then, and the first operation that takes a slope at them makes zero times NaN of it: a birth
by the rule above, and an echo by its meaning. So an operation that was given what had been born before is no
birth in the backward pass either: the forward one is named.
"""

from __future__ import annotations

import math
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.processes.shards import local
from gradflow.functional.reverse.autograd_graph import Structure, Windows
from gradflow.functional.reverse.reverse import call_node, validated
from gradflow.functional.tap.asked import Listener
from gradflow.functional.tap.nodes import Node, feeds, is_leaf, nodes_under, operation
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_calls, source_layer
from gradflow.functional.torch_private import node_number, sequence_number
from gradflow.records import NumericalRecord

_PACKAGE = __name__.partition(".")[0]
_MASKING = ("softmax", "attention", "logsumexp", "cross_entropy")  # which take -inf for a mask
_CALLER = f"{_PACKAGE}.functional.run.step"  # where model and loss are called


@attrs.frozen(eq=False)
class Operation:
    """One function call of the traced step; `entered` is the birth of what is not finite among its inputs."""

    name: str
    layer: str
    start: int
    end: int
    low: float
    high: float
    line: str
    entered: tuple[Operation, str] | None = None


class Tracer(Listener):
    """Hears of every function of one step."""

    def __init__(self) -> None:
        self._born: dict[int, tuple[weakref.ref[Tensor], tuple[Operation, str]]] = {}
        self.operations: list[Operation] = []
        self.births: list[tuple[Operation, str]] = []
        self.swallowed: list[tuple[tuple[Operation, str], Operation]] = []

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start the step, or start it again."""
        self.recorder = recorder
        self._born, self.operations, self.births, self.swallowed = {}, [], [], []

    def probed(self, output: Tensor, standing_in: Tensor) -> None:
        """Follow what is not finite from a layer's output to the probe that stands in for it."""
        if (born := self.birth(output)) is not None:
            self._born[id(standing_in)] = (weakref.ref(standing_in), born)

    def birth(self, tensor: Tensor) -> tuple[Operation, str] | None:
        """Return the operation that made what is not finite in a tensor, with `nan` or `inf`."""
        found = self._born.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Note the range of a function's inputs, and then whether it made a NaN or an Inf."""
        inputs = [t for t in iter_tensors((args, kwargs)) if t.is_floating_point()]
        name = getattr(func, "__name__", "function")
        if name == "__get__":
            return None
        if not inputs:
            return self._number_made(name, args, kwargs)
        low, high = _range(inputs)
        worst = max((badness(t) for t in inputs), default=0)
        known = next((b for t in inputs if (b := self.birth(t)) is not None), None)
        layer = _place(self.recorder, inputs[0])
        asked_for = _asked_for(args, kwargs)
        start = sequence_number()

        def end(out: Any) -> None:
            last = sequence_number()
            done = Operation(name.strip("_"), layer, start, last, low, high, user_line(), known)
            self.operations.append(done)
            made = [tensor for tensor in iter_tensors(out) if tensor.is_floating_point()]
            for tensor in made:
                self._judge(tensor, done, worst, known, asked_for)
            passes = any(t.requires_grad for t in made) and not any(word in done.name for word in _MASKING)
            if worst and known is not None and passes and not any(map(badness, made)):
                self.swallowed.append((known, done))

        return end

    def _number_made(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Note whether a function of finite whole or plain numbers gives one that its dtype cannot hold."""
        numbers = list(_numbers((args, kwargs)))
        if not numbers or not all(map(math.isfinite, numbers)):
            return None
        done = Operation(
            name.strip("_"), _place(self.recorder, None), 0, 0, min(numbers), max(numbers), user_line()
        )

        def end(out: Any) -> None:
            for tensor in iter_tensors(out):
                if tensor.is_floating_point():
                    self._judge(tensor, done, 0, None, asked_for=False)

        return end

    def _judge(
        self,
        tensor: Tensor,
        done: Operation,
        worst: int,
        known: tuple[Operation, str] | None,
        asked_for: bool,
    ) -> None:
        bad = badness(tensor)
        if not bad:
            self._born.pop(id(tensor), None)  # mended in place
            return
        born = known  # a NaN made of an infinity has its origin where that was made
        if born is None and bad > worst and not (bad == 1 and asked_for):
            born = (done, "nan" if bad == 2 else "inf")
            self.births.append(born)
        if born is not None:
            self._born[id(tensor)] = (weakref.ref(tensor), born)

    def behind(self, node: Node) -> Operation | None:
        """Return the function call that made an autograd node."""
        number = node_number(node)
        for done in self.operations:
            if done.start <= number < done.end:
                return done
        return None


def _place(recorder: Recorder, entering: Tensor | None) -> str:
    """Return the layer call that an operation belongs to: the one that runs, or whose output enters.

    A module that holds others is at work itself where what enters does not come from one that it has called:
    it computes with its own weights or with what it was given, before it calls them.
    """
    leaf, running = recorder.innermost_leaf(), recorder.running()
    if leaf is not None:
        return leaf.name
    if running and running[-1].module:
        within = f"{running[-1].module}."
        sources = () if entering is None else source_calls(entering)
        if not any(recorder.calls[i].module.startswith(within) for i in sources):
            return running[-1].name
    return "" if entering is None else source_layer(recorder, entering)


def badness(tensor: Tensor) -> int:
    """Return 0 for a finite tensor, 1 for one with an infinity, 2 for one with a NaN."""
    tensor = local(tensor.detach())
    if tensor.layout is not torch.strided or bool(torch.isfinite(tensor).all()):
        return 0
    return 2 if bool(torch.isnan(tensor).any()) else 1


def _numbers(given: Any) -> Iterator[float]:
    """Yield the plain numbers in arguments, and the least and largest of tensors of whole numbers."""
    if isinstance(given, Tensor):
        plain = local(given.detach())
        if plain.layout is torch.strided and plain.numel() and plain.dtype in _WHOLE:
            yield from (float(x) for x in plain.aminmax())
    elif isinstance(given, Mapping):
        yield from (x for value in given.values() for x in _numbers(value))
    elif isinstance(given, (list, tuple)):
        yield from (x for value in given[:_MOST] for x in _numbers(value))
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        yield float(given)


_MOST = 4096  # entries of a list that are looked at
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _asked_for(args: Any, kwargs: Any) -> bool:
    """Whether an infinity was passed as a number."""
    values = [*args, *kwargs.values()]
    return any(isinstance(v, float) and v in (float("inf"), float("-inf")) for v in values)


def _range(inputs: list[Tensor]) -> tuple[float, float]:
    """Return the smallest and largest number in the tensors, NaN left out."""
    low, high = float("inf"), float("-inf")
    for tensor in inputs:
        tensor = local(tensor.detach())
        known = tensor[~torch.isnan(tensor)] if tensor.layout is torch.strided else tensor.new_empty(0)
        if known.numel():
            low, high = min(low, float(known.min())), max(high, float(known.max()))
    return (low, high) if low <= high else (float("nan"), float("nan"))


def user_line() -> str:
    """Return `file:line` of the innermost frame of the model or the loss that is neither ours nor torch's.

    '' if there is none: what lies beyond our own call of the two only called us.
    """
    for frame, number in traceback.walk_stack(None):
        module = frame.f_globals.get("__name__", "")
        if module == _CALLER:
            return ""
        if module.split(".")[0] not in (_PACKAGE, "torch"):
            return f"{frame.f_code.co_filename}:{number}"
    return ""


def certificates(
    tracer: Tracer,
    loss: Tensor,
    structure: Structure | None,
    *,
    step: int,
    inputs: Mapping[str, Tensor],
    bad: Mapping[str, int],
    owners: Mapping[str, str],
) -> list[NumericalRecord]:
    """Return the births that the loss and the gradients of a traced step show, forward ones first.

    Args:
        tracer: that heard of the step.
        loss: of the step, with its graph.
        structure: the graph; None if it is not to be walked.
        step: its number.
        inputs: the tensors of the batch by name.
        bad: by name of a parameter that is not finite, its `badness`.
        owners: the modules of the parameters.
    """
    recorder = tracer.recorder
    finite = bool(torch.isfinite(loss.detach()))

    def record(layer: str, op: str, phase: str, value: str, done: Operation | None) -> NumericalRecord:
        nan = float("nan")
        low, high, line = (done.low, done.high, done.line) if done is not None else (nan, nan, "")
        return NumericalRecord(
            step=step, layer=layer, layer_type=_kind(recorder, layer), op=op, phase=phase, value=value,
            input_min=low, input_max=high, line=line, loss_finite=finite,
        )  # fmt: skip

    def forward() -> list[NumericalRecord]:
        for name, tensor in inputs.items():
            if tensor.is_floating_point() and (how := badness(tensor)) and not finite:
                first = next((c.name for c in recorder.calls if c.is_layer and not c.has_children), "")
                return [record(first, name, "input", "nan" if how == 2 else "inf", None)]
        for name, how in bad.items():
            return [record(owners.get(name, ""), name, "parameter", "nan" if how == 2 else "inf", None)]
        if not finite:
            born = tracer.birth(loss) or next(iter(tracer.births), None)
            if born is not None:
                return [record(born[0].layer, born[0].name, "forward", born[1], born[0])]
        return []

    if early := forward():
        if structure is not None:
            with structure.walk():  # other processes may have to walk, for which all gather
                pass
        return early
    if structure is None:
        return []
    found = backward_birth(loss, structure)
    if found is None:
        return []
    node, value = found
    done = tracer.behind(node)
    if done is not None and done.entered is not None:  # see NOTE [Left out]
        born, value = done.entered
        return [record(born.layer, born.name, "forward", value, born)]
    call = Windows(recorder.calls).layer(node)
    layer = call.name if call is not None else done.layer if done is not None else _upstream(node, recorder)
    return [record(layer, done.name if done is not None else operation(node), "backward", value, done)]


def swallowed(tracer: Tracer, step: int) -> list[NumericalRecord]:
    """Return the births of a traced step that an operation on the gradient's way has swallowed, the first of
    every place; see NOTE [Swallowed].

    Args:
        tracer: that heard of the step.
        step: its number.
    """
    found: dict[tuple[str, str], NumericalRecord] = {}
    for (done, value), by in tracer.swallowed:
        layer = done.layer or by.layer  # a number belongs to where it is used
        found.setdefault(
            (layer, by.name),
            NumericalRecord(
                step=step, layer=layer, layer_type=_kind(tracer.recorder, layer), op=done.name,
                phase="forward", value=value, input_min=done.low, input_max=done.high,
                line=done.line or by.line, swallowed_by=by.name,
            ),
        )  # fmt: skip
    return list(found.values())


def _kind(recorder: Recorder, layer: str) -> str:
    """Return the class name of a layer call."""
    kind = next((c.type for c in recorder.calls if c.name == layer), "")
    return kind or recorder.model.types.get(layer.split("@")[0], "function")


def _upstream(node: Node, recorder: Recorder) -> str:
    """Return the layer call nearest upstream of an autograd node."""
    probe = next(filter(is_probe, nodes_under([node], nearest_first=True)), None)
    return "" if probe is None else recorder.calls[probe.site.call].name


def backward_birth(loss: Tensor, structure: Structure) -> tuple[Node, str] | None:
    """Return the first autograd node that makes a non-finite gradient of finite ones, and what it makes."""
    arriving: dict[Node, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    with torch.no_grad(), structure.walk() as ready:
        for node in structure.nodes:
            ready()
            gradients = arriving.pop(node, None)
            if gradients is None or is_leaf(node):
                continue
            before = max(badness(g) for g in gradients.values())
            handed = call_node(node, gradients)
            for cotangent, (child, number) in zip(handed, feeds(node), strict=False):
                if cotangent is None or child is None:
                    continue
                cotangent = validated(cotangent, child, number, structure)
                after = badness(cotangent)
                if after > before:
                    return node, "nan" if after == 2 else "inf"
                slots = arriving.setdefault(child, {})
                slots[number] = slots[number] + cotangent if number in slots else cotangent
    return None
