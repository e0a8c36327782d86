"""Synthetic records with a graph, from a few numbers each, for tests of detectors and causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from gradflow.records import (
    ActivationRecord,
    EdgeRecord,
    FlowRecord,
    GraphRecord,
    LayerRecord,
    NodeRecord,
    ParameterRecord,
    Provenance,
)

STEPS = 8
NONE = np.empty(0)


@attrs.frozen(kw_only=True)
class Layer:
    """A layer of a synthetic record: what differs from a healthy `Linear` of 16 units.

    Args:
        name: of the layer call.
        grad: norm of its output gradient, for all steps or per step.
        gain: ‖W‖_F / √rows of its weight; None for a layer without parameters.
        fields: further fields of its LayerRecord.
        weight: further fields of its weight's ParameterRecord.
        op: type of a functional op behind it, if there is one.
        rank: effective rank of its output gradient.
    """

    name: str
    grad: Any = 1.0
    gain: float | None = 1.0
    fields: Mapping[str, Any] = attrs.field(factory=dict)
    weight: Mapping[str, Any] = attrs.field(factory=dict)
    op: str = ""
    rank: float = float("nan")


def per_step(value: Any, steps: int) -> np.ndarray:
    """Return a value as one number per step."""
    return np.broadcast_to(np.asarray(value, float), (steps,)).copy()


def layer_of(spec: Layer, order: int, steps: int) -> LayerRecord:
    """Return the LayerRecord of a specification."""
    grad = per_step(spec.grad, steps)
    values: dict[str, Any] = {
        "module": spec.name.partition("@")[0],
        "type": "Linear" if spec.gain is not None else "ReLU",
        "call": int(spec.name.partition("@")[2] or 0),
        "order": order,
        "parameters": (f"{spec.name.partition('@')[0]}.weight",) if spec.gain is not None else (),
        "shape": (32, 16),
        "called": np.ones(steps, bool),
        "reached": ~np.isnan(grad),
        "grad_finite": np.ones(steps, bool),
        "num_elements": np.full(steps, 512),
        "input_rms": np.ones(steps),
        "output_rms": np.ones(steps),
        "output_finite": np.ones(steps, bool),
        "output_zero_share": np.zeros(steps),
        "output_variation": np.ones(steps),
    }
    return LayerRecord(name=spec.name, grad_norm=grad, **{**values, **spec.fields})


def parameter_of(spec: Layer, steps: int) -> ParameterRecord:
    """Return the ParameterRecord of a layer's weight."""
    grad = per_step(spec.grad, steps)
    values: dict[str, Any] = {
        "layer": spec.name.partition("@")[0],
        "shape": (16, 16),
        "dtype": "float32",
        "trainable": True,
        "reached": ~np.isnan(grad),
        "grad_norm": grad,
        "grad_finite": np.ones(steps, bool),
        "grad_zero_share": np.zeros(steps),
        "norm": per_step((spec.gain or 0.0) * 4.0, steps),  # rows: 16
    }
    return ParameterRecord(name=f"{values['layer']}.weight", **{**values, **spec.weight})


def flow_record(
    *specs: Layer,
    edges: Sequence[tuple[str, str]] | None = None,
    steps: int = STEPS,
    optimizer: str = "",
    nodes: Mapping[str, Mapping[str, Any]] | None = None,
    cuts: Sequence[tuple[str, str, str]] = (),
    graph: bool = True,
    **fields: Any,
) -> FlowRecord:
    """Return a record of layers in their order of execution.

    Args:
        specs: the layers; a chain unless `edges` are given.
        edges: source, target; `loss` is the loss, `op:NAME` the op behind the layer NAME.
        steps: number of steps.
        optimizer: class name of the optimizer that stepped.
        nodes: further fields of nodes, by name.
        cuts: source, target and reason of severed edges.
        graph: whether the record holds a graph.
        fields: further fields of the record.
    """
    layers = [layer_of(spec, i, steps) for i, spec in enumerate(specs)]
    parameters = {p.name: p for spec in specs if spec.gain is not None for p in [parameter_of(spec, steps)]}
    links = list(edges) if edges is not None else _chain(specs)
    values: dict[str, Any] = {
        "losses": np.linspace(2.0, 1.9, steps),
        "provenance": Provenance(
            model="Net",
            optimizer=optimizer,
            learning_rates=(0.1,) if optimizer else (),
            requested_steps=steps,
        ),
    }
    return FlowRecord(
        steps=steps,
        layers=layers,
        parameters=list(parameters.values()),
        graph_record=_graph(specs, layers, links, nodes or {}, cuts) if graph else None,
        **{**values, **fields},
    )


def _chain(specs: Sequence[Layer]) -> list[tuple[str, str]]:
    names: list[str] = []
    for spec in specs:
        names.append(spec.name)
        if spec.op:
            names.append(f"op:{spec.name}")
    return list(zip(names, [*names[1:], "loss"], strict=True))


def _graph(
    specs: Sequence[Layer],
    layers: Sequence[LayerRecord],
    links: Sequence[tuple[str, str]],
    extra: Mapping[str, Mapping[str, Any]],
    cuts: Sequence[tuple[str, str, str]],
) -> GraphRecord:
    nodes: list[NodeRecord] = []
    common: dict[str, Any] = {"grad_norm": NONE, "input_grad_norm": NONE}
    for spec, layer in zip(specs, layers, strict=True):
        rank = NONE if np.isnan(spec.rank) else np.array([spec.rank])
        values: dict[str, Any] = {
            "kind": "layer",
            "type": layer.type,
            "shape": layer.shape,
            "num_elements": int(np.prod(layer.shape)),
            "effective_rank": rank,
            "reachable": bool(layer.reached.any()),
            **common,
        }
        nodes.append(NodeRecord(name=spec.name, order=len(nodes), **{**values, **extra.get(spec.name, {})}))
        if spec.op:
            op = {**values, "kind": "op", "type": spec.op, "effective_rank": NONE}
            nodes.append(NodeRecord(name=f"op:{spec.name}", order=len(nodes), **op))
    nodes.append(NodeRecord(name="loss", kind="loss", order=len(nodes), effective_rank=NONE, **common))
    edges = [EdgeRecord(source=a, target=b, flow=NONE) for a, b in links]
    edges += [EdgeRecord(source=a, target=b, flow=NONE, severed=True, reason=why) for a, b, why in cuts]
    return GraphRecord(nodes=nodes, edges=edges)


def activation(name: str, layer: str, op: str, kind: str, **fields: Any) -> ActivationRecord:
    """Return the record of an activation of 16 units, functional unless its name is its layer's."""
    unknown = np.full(STEPS, np.nan)
    values: dict[str, Any] = {
        "functional": name != layer,
        "num_units": 16,
        "fired_share": np.full(STEPS, 0.5) if kind == "rectifier" else unknown,
        "saturated_share": np.zeros(STEPS) if kind != "rectifier" else unknown,
        "input_rms": np.ones(STEPS),
        "never_fired": 0.0 if kind == "rectifier" else float("nan"),
        "width": 16 if kind == "softmax" else 0,
    }
    return ActivationRecord(name=name, op=op, kind=kind, layer=layer, **{**values, **fields})


def decaying(depth: int, keep: float, *, gain: float = 0.577, **fields: Any) -> FlowRecord:
    """Return a chain `fc0` ... whose gradient shrinks by `keep` at every layer on its way back.

    The weights are by default those of PyTorch's initialisation.
    """
    layers = [Layer(name=f"fc{i}", grad=keep ** (depth - 1 - i), gain=gain) for i in range(depth)]
    return flow_record(*layers, **fields)
