"""A record seen along its wiring: `Flow`, which every detector looks at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import attrs
import numpy as np

from gradflow.detect.wiring import Wiring, node_name, wiring
from gradflow.records import ActivationRecord, Floats, FlowRecord, LayerRecord, ParameterRecord


@attrs.frozen(kw_only=True, eq=False)
class Flow:
    """A record seen along its wiring.

    Args:
        record: the record.
        wiring: who feeds whom.
        layers: layer calls by the name of their node.
        parameters: parameters by name.
        grad: measured norm of the output gradient by node; NaN at steps where it was not there.
        norms: the layer calls that normalise.
        summed: by name of a sum, the layer call whose output goes into it and nowhere else.
        functions: by name of a layer call, the activations that are functions of its output.
        modules: by name of a layer call, the activations that it is itself.
    """

    record: FlowRecord
    wiring: Wiring
    layers: Mapping[str, LayerRecord]
    parameters: Mapping[str, ParameterRecord]
    grad: Mapping[str, Floats]
    norms: frozenset[str]
    summed: Mapping[str, str]
    functions: Mapping[str, tuple[ActivationRecord, ...]]
    modules: Mapping[str, tuple[ActivationRecord, ...]]

    def parameters_of(self, node: str) -> tuple[ParameterRecord, ...]:
        """Return the parameters that a layer call owns."""
        return self._owned[node]

    @functools.cached_property
    def _owned(self) -> dict[str, tuple[ParameterRecord, ...]]:
        known = self.parameters
        return {
            node: tuple([known[n] for n in x.parameters if n in known]) for node, x in self.layers.items()
        }

    def trainable(self, node: str) -> tuple[ParameterRecord, ...]:
        """Return the parameters of a layer call that training is meant to change."""
        return tuple(p for p in self.parameters_of(node) if p.trainable and p.optimized)

    def layer_at(self, node: str) -> LayerRecord | None:
        """Return the layer that a node is, or the nearest one before it; None where none is, as behind a
        parameter or the data."""
        near = (n for n in (node, *self.wiring.before(node)) if n in self.layers)
        return next((self.layers[n] for n in near), None)

    def by_module(self, nodes: Iterable[str]) -> dict[str, list[str]]:
        """Return layer calls by the module that was called."""
        found: dict[str, list[str]] = {}
        for node in nodes:
            found.setdefault(self.layers[node].module, []).append(node)
        return found

    def modules_below(self, module: str) -> set[str]:
        """Return the names of the layers that ran inside of a module."""
        return {x.module for x in self.layers.values() if x.module.startswith(f"{module}.")}

    @functools.cached_property
    def reaches_nothing(self) -> bool:
        """Whether no gradient, not even a zero, came to any parameter in any step."""
        return not any(parameter.reached.any() for parameter in self.parameters.values())

    def has_matrix(self, node: str) -> bool:
        """Whether a layer call owns a weight matrix or kernel, and holds no other layers."""
        return node in self._with_matrix

    @functools.cached_property
    def _with_matrix(self) -> frozenset[str]:
        return frozenset(
            node
            for node, owned in self._owned.items()
            if any(len(p.shape) >= 2 for p in owned)
            and not (self.layers[node].composite or self.is_norm(node))
        )

    def is_tied(self, node: str) -> bool:
        """Whether a layer call of a kind that has a matrix owns none: its weight is that of another layer."""
        layer = self.layers[node]
        return not layer.parameters and layer.type in ("Linear", "Conv1d", "Conv2d", "Conv3d")

    def is_table(self, node: str) -> bool:
        """Whether a layer call looks rows up in a table: nothing flows through it."""
        return node in self.layers and "embedding" in self.layers[node].type.lower()

    def is_last(self, node: str) -> bool:
        """Whether no layer stands downstream of a layer call, but for those that hold others."""
        return all(
            n in self.layers and self.layers[n].composite and self.is_last(n) for n in self.wiring.after(node)
        )

    def ends_weightless(self, node: str) -> bool:
        """Whether no parameters stand downstream of a layer call: it makes the output of the model.

        Those of layers that hold others, a table of positions, are taken to be used inside of them.
        """
        todo, seen = [node], {node}
        while todo:  # it ends at the first that has some, and is asked of many
            for behind in self.wiring.after(todo.pop()):
                if self.parameters_of(behind) and not self.layers[behind].composite:
                    return False
                if behind not in seen:
                    seen.add(behind)
                    todo.append(behind)
        return True

    def is_norm(self, node: str) -> bool:
        """Whether a layer call normalises, by the name of its class."""
        return node in self.norms

    @functools.cached_property
    def readings(self) -> dict[Any, Any]:
        """What was read off it so far; see `read_once`."""
        return {}


_Reading = TypeVar("_Reading")


def read_once(reading: Callable[[Flow], _Reading]) -> Callable[[Flow], _Reading]:
    """Return a reading that is taken once of each flow, however many detectors ask for it.

    Args:
        reading: what is read off a flow; nobody changes what it returns.
    """

    @functools.wraps(reading)
    def once(flow: Flow) -> _Reading:
        if reading not in flow.readings:
            flow.readings[reading] = reading(flow)
        return flow.readings[reading]

    return once


_SHARED: ContextVar[dict[int, Flow] | None] = ContextVar("shared flow", default=None)


@contextmanager
def shared_flow() -> Iterator[None]:
    """Let all that asks `flow_of` for the same record meanwhile get the same one, made once."""
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def flow_of(record: FlowRecord) -> Flow:
    """Return a record with its wiring."""
    made = _SHARED.get()
    if made is None:
        return _flow_of(record)
    if id(record) not in made:  # the flow holds the record, so the number stays its own
        made[id(record)] = _flow_of(record)
    return made[id(record)]


def _flow_of(record: FlowRecord) -> Flow:
    layers = {node_name(layer.name): layer for layer in record.layers}
    grad = {}
    for name, layer in layers.items():
        known = layer.called & layer.reached & layer.grad_finite & np.isfinite(layer.grad_norm)
        grad[name] = np.where(known, layer.grad_norm, np.nan)
    wires = wiring(record)
    return Flow(
        record=record,
        wiring=wires,
        summed=_summed(wires, layers),
        layers=layers,
        parameters={p.name: p for p in record.parameters},
        grad=grad,
        norms=frozenset(name for name, layer in layers.items() if "norm" in layer.type.lower()),
        functions=_grouped((a.layer, a) for a in record.activations if a.functional),
        modules=_grouped((a.name, a) for a in record.activations if not a.functional),
    )


def _grouped(pairs: Iterator[tuple[str, ActivationRecord]]) -> dict[str, tuple[ActivationRecord, ...]]:
    found: dict[str, list[ActivationRecord]] = {}
    for name, activation in pairs:
        found.setdefault(name, []).append(activation)
    return {name: tuple(several) for name, several in found.items()}


def _summed(wires: Wiring, layers: Mapping[str, LayerRecord]) -> dict[str, str]:
    found = {}
    for node, record in wires.nodes.items():
        if record.kind == "op" and record.type.lower() in ("add", "add_", "sub"):
            for source in wires.preds[node]:
                alike = wires.nodes[source].num_elements == record.num_elements
                if (
                    source in layers
                    and alike
                    and wires.succs[source] == (node,)
                    and layers[source].parameters
                ):
                    found[node] = source
    return found
