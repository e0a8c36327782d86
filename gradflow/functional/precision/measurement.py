"""`precision`: the measurement of what number formats hold of gradients and activations, at looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.measurement import Session
from gradflow.functional.model.layers import owner
from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.precision.counts import Counts, Row, counted, histogram, row
from gradflow.functional.precision.passes import Output, Pass, error, fullest, listening, references, run_pass
from gradflow.functional.precision.subnormal import ENTRIES, Span, Tally, graph_nodes, sample
from gradflow.functional.reverse.flushing import flushes
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.torch_private import sequence_number
from gradflow.records import (
    ExponentHistogram,
    LayerPrecision,
    ParameterPrecision,
    PrecisionRecord,
    SubnormalRecord,
)
from gradflow.records.formats import exponent_of


@attrs.frozen
class Precision:
    """The measurement of precision; see `precision`."""

    loss_scale: float = attrs.field(default=1.0, converter=float)

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return PrecisionSession(model, modules, self.loss_scale)


def precision(*, loss_scale: float | None = None) -> Precision:
    """Return the measurement of what number formats hold of a model's gradients and activations.

    At looks, the exponents of every layer's output, of its gradient and of every parameter's gradient are
    counted. From the counts follows, exactly, what share of them would be zero, subnormal or infinite in
    float16, bfloat16, float8 and float32, under any loss scale. Where the format that they are computed in
    may have lost some, the loss is differentiated once more under a larger scale, which shows what. The
    record has it as `record.precision`. A look takes one or two reverse passes more.

    Args:
        loss_scale: what the training multiplies the loss by, `scaler.get_scale()`; None for nothing.

    Raises:
        ValueError: if it is no power of two.

    >>> import gradflow as gf
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> loss_fn = lambda y: 1e-7 * y.square().mean()
    >>> record = gf.analyze(model, [torch.randn(16, 4)], loss_fn, measurements=[precision()])
    >>> gradient = record.precision["0"].gradient
    >>> gradient.underflow("float16") > 0.9, gradient.underflow("float16", scale=2.0**24)
    (True, 0.0)
    """
    scale = 1.0 if loss_scale is None else loss_scale
    exponent_of(scale)
    return Precision(scale)


_UNKNOWN = (math.nan, math.nan)
_KINDS = ("activations", "gradients", "computed", "parameters", "computed_parameters")


@attrs.define(eq=False)
class _Look:
    """What one look saw of each kind of tensors, by name: counts, and rows of them when it is over."""

    activations: dict[str, Counts] = attrs.field(factory=dict)
    gradients: dict[str, Counts] = attrs.field(factory=dict)
    computed: dict[str, Counts] = attrs.field(factory=dict)
    parameters: dict[str, Counts] = attrs.field(factory=dict)
    computed_parameters: dict[str, Counts] = attrs.field(factory=dict)
    errors: dict[str, tuple[float, float]] = attrs.field(factory=dict)
    reference: float = math.nan
    rows: dict[str, dict[str, Row]] = attrs.field(factory=dict)

    def settle(self) -> None:
        """Take the counts to the host."""
        for kind in _KINDS:
            counts: dict[str, Counts] = getattr(self, kind)
            self.rows[kind] = {name: row(found) for name, found in counts.items()}
            counts.clear()


class PrecisionSession(Session):
    """Counts what passes layers and parameters; see `precision`."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], loss_scale: float) -> None:
        self._model, self._modules, self._exponent = model, modules, exponent_of(loss_scale)
        self._types: dict[str, str] = {}
        self._steps: list[int] = []
        self._looks: list[_Look] = []
        self._subnormals: list[SubnormalRecord] = []
        self._flushes, self._device, self._failed = False, "cpu", False
        self._forget()

    def _forget(self) -> None:
        self._look = _Look()
        self._outputs: list[Output] = []
        self._starts: dict[int, int] = {}
        self._spans: list[Span] = []

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start a look."""
        self._forget()
        self._step = step

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note where the nodes of a layer call begin."""
        if call.is_layer:
            self._starts[call.index] = sequence_number()

    def left(self, call: Call, output: Any) -> None:
        """Count what a layer gives, and note where its gradient will arrive."""
        if not call.is_layer:
            return
        self._types.setdefault(call.name, call.type)
        self._spans.append((self._starts.pop(call.index, 0), sequence_number(), call.name))
        seen: set[int] = set()
        for y in iter_tensors(output):
            if id(y) in seen or y.layout is not torch.strided or not y.numel():
                continue
            if not (y.is_floating_point() or y.is_complex()):
                continue
            seen.add(id(y))
            if self._counts_activations():
                _add(self._look.activations, call.name, counted(y))
            if y.grad_fn is not None:
                self._outputs.append((call.name, y.grad_fn, y.output_nr))

    def _counts_activations(self) -> bool:
        return True

    def differentiate(self, loss: Tensor) -> None:
        """Differentiate under the scale in use, and under a larger one where that may have lost something."""
        self._device = loss.device.type
        parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        nodes = graph_nodes(loss)
        some = Tally(sample(nodes) if loss.is_cpu else (), most=ENTRIES)
        used = None
        if not any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            with listening(some.places()):
                used = run_pass(loss, self._outputs, parameters, exponent=self._exponent)
        if used is None:
            self._failed = True
            return
        self._keep(used, references(used, loss, self._outputs, parameters))
        self._flushes = flushes()
        self._subnormals = self._count_subnormals(loss, parameters, nodes) if some.any else []

    def _keep(self, used: Pass, better: Sequence[Pass]) -> None:
        look = self._look
        look.computed, look.computed_parameters = dict(used.layers), dict(used.counts)
        look.gradients = _of_loss([used, *better], lambda p: p.layers)
        look.parameters = _of_loss([used, *better], lambda p: p.counts)
        if not better:
            return
        look.reference = math.ldexp(1.0, better[-1].exponent)
        with torch.no_grad():
            for name in used.parameters:
                if (right := fullest(better, lambda p: p.counts, name)) is not None:
                    look.errors[name] = error(name, used, right)

    def _count_subnormals(
        self, loss: Tensor, parameters: Mapping[str, Tensor], nodes: Sequence[Any]
    ) -> list[SubnormalRecord]:
        tally = Tally(nodes, sorted(self._spans))
        with listening(tally.places()):
            run_pass(loss, (), parameters, exponent=self._exponent)
        return tally.records()

    def end(self) -> None:
        """Keep the look."""
        self._look.settle()
        self._steps.append(self._step)
        self._looks.append(self._look)
        self._forget()

    def fields(self) -> Mapping[str, Any]:
        """Return the record."""
        return {
            "precision": PrecisionRecord(
                steps=self._steps,
                loss_scale=math.ldexp(1.0, self._exponent),
                reference_scales=[look.reference for look in self._looks],
                layers=[self._layer(name, type) for name, type in self._types.items()],
                parameters=[self._parameter(name) for name in self._reached()],
                subnormals=self._subnormals,
                flushes=self._flushes,
                device=self._device,
            )
        }

    def _layer(self, name: str, type: str) -> LayerPrecision:
        return LayerPrecision(
            name=name,
            type=type,
            activation=self._histogram("activations", name),
            gradient=self._histogram("gradients", name),
            computed=self._histogram("computed", name),
        )

    def _parameter(self, name: str) -> ParameterPrecision:
        return ParameterPrecision(
            name=name,
            layer=owner(name, self._modules),
            gradient=self._histogram("parameters", name),
            computed=self._histogram("computed_parameters", name),
            error=np.array([look.errors.get(name, _UNKNOWN)[0] for look in self._looks]),
            norm=np.array([look.errors.get(name, _UNKNOWN)[1] for look in self._looks]),
        )

    def _histogram(self, kind: str, name: str) -> ExponentHistogram | None:
        return histogram([look.rows[kind].get(name) for look in self._looks])

    def _reached(self) -> list[str]:
        """Return the names of the parameters that a gradient was seen of, in the order of the model's."""
        reached = set().union(*(look.rows["parameters"] for look in self._looks))
        return [name for name, _ in self._model.named_parameters() if name in reached]

    def notes(self) -> Sequence[str]:
        """Say where nothing could be measured."""
        if not self._failed:
            return ()
        return (
            "The precision of gradients could not be measured: no gradient could be taken beside the step's "
            "own pass, as where a reentrant checkpoint hides the graph; `use_reentrant=False` shows it.",
        )


def _add(found: dict[str, Counts], name: str, counts: Counts) -> None:
    if name in found and found[name].first != counts.first:
        return  # outputs of single and double precision in one call: the first stands for both
    found[name] = found[name] + counts if name in found else counts


def _of_loss(passes: Sequence[Pass], kind: Callable[[Pass], Mapping[str, Counts]]) -> dict[str, Counts]:
    """Return the counts of the gradients of the loss itself, of each in the pass that kept most of it."""
    found = {}
    for name, counts in kind(passes[0]).items():
        best = fullest(passes, kind, name)
        exponent = passes[0].exponent if best is None else best.exponent
        found[name] = (counts if best is None else kind(best)[name]).over(exponent)
    return found
