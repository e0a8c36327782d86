"""A record with every part in it, for tests of what becomes of it when it is saved and copied."""

from __future__ import annotations

import typing
from typing import Any

import attrs
import numpy as np

import gradflow as gf
from gradflow.records import (
    ActionDistribution,
    ActivationRecord,
    AttentionRecord,
    BranchRecord,
    EdgeRecord,
    Floats,
    FlowRecord,
    GateRecord,
    GraphRecord,
    NodeRecord,
    NumericalRecord,
    PolicyRecord,
    RecurrenceRecord,
    RecurrentLevelRecord,
    TransformerRecord,
    array_field,
    frozen,
)
from tests.samples import chain_record

NAN = float("nan")


@gf.register_record
@attrs.frozen
class Share:
    """A record of one's own."""

    layer: str
    shares: Floats = array_field()
    parts: Any = attrs.field(default=(), converter=frozen)


def _arrays(cls: type, looks: int, *, second: int = 2, **fields: Any) -> Any:
    """Return a record whose other arrays hold numbers that differ, as those of the records in it."""
    values, hints = dict(fields), typing.get_type_hints(cls)
    for i, field in enumerate(attrs.fields(cls)):
        axes = field.metadata.get("axes")
        if axes is not None and field.name not in values:
            shape = (looks, second)[:axes]
            values[field.name] = np.arange(int(np.prod(shape))).reshape(shape) % 2 + (i % 3) / 4
        part = hints[field.name]
        if isinstance(part, type) and attrs.has(part) and field.name not in values:
            values[field.name] = _arrays(part, looks, second=second)
    return cls(**values)


def extras() -> dict[str, Any]:
    """Return one of everything that a session may give."""
    return {
        "number": 3,
        "share": NAN,
        "word": "nan",
        "mark": {"$mark": -np.inf},
        "list": [1, (2.5, None), True],
        "by step": {0: "a", 4: {"x": [1]}, (1, "b"): 2},
        "arrays": {
            "floats": np.array([[0.5, NAN], [np.inf, -0.0]]),
            "halves": np.array([0.1, 2.0], np.float32),
            "whole": np.arange(3, dtype=np.uint8),
            "truth": np.array([True, False]),
            "complex": np.array([1 + 2j, complex(NAN, 1)]),
            "texts": np.array(["a", "longer"]),
            "none": np.empty((0, 3)),
            "one": np.array(2.5),
        },
        "complex": 1 - 2j,
        "own": {"fc1": Share("fc1", [0.1, NAN], {"deep": np.ones(1)})},
    }


def full_record() -> FlowRecord:
    """Return a record of three steps with graph, attention, recurrence, policy and extras."""
    chain = ("input", "fc1", "fc2", "loss")
    nodes = [_arrays(NodeRecord, 2, name=n, kind=k, order=i) for i, (n, k) in enumerate(
        zip(chain, ("input", "layer", "layer", "loss"), strict=True))]  # fmt: skip
    edges = [EdgeRecord(source=u, target=v, flow=[0.5, 2.0]) for u, v in zip(chain, chain[1:], strict=False)]
    activation = _arrays(
        ActivationRecord, 3, name="a", op="relu", kind="rectifier", functional=False, layer="fc1", num_units=4
    )
    birth = NumericalRecord(step=1, layer="fc1", layer_type="Linear", op="exp", phase="forward", value="inf")
    attention = _arrays(
        AttentionRecord, 2, name="at", module="at", type="Attention", op="softmax", num_heads=2, num_queries=5
    )
    level = _arrays(
        RecurrentLevelRecord,
        2,
        second=4,
        level="l0",
        state_size=3,
        gates=[_arrays(GateRecord, 2, name="input")],
    )
    recurrence = _arrays(
        RecurrenceRecord, 2, name="rnn", module="rnn", type="GRU", kind="gru", levels=[level],
        measured_steps=[0, 2], num_steps=[4, 4],
    )  # fmt: skip
    policy = _arrays(
        PolicyRecord, 2, steps=[0, 2], policy_heads=("pi",), policy_reached=[True, False],
        value_reached=[True, True], distributions=[
            _arrays(ActionDistribution, 2, heads=("pi",), family="Categorical", given="logits",
                    evidence="seen", discrete=True, num_samples=[8, 8]),
        ],
    )  # fmt: skip
    return chain_record(
        depth=2, steps=3, losses=[1.0, NAN, np.inf], activations=(activation,), numerics=(birth,),
        never_called=("idle",), graph_record=GraphRecord(nodes=nodes, edges=edges, steps=(0, 2)),
        transformer=TransformerRecord(
            steps=(0, 2),
            attention=[attention],
            branches=[BranchRecord(name="b", type="Block", share=[0.1, NAN])],
        ),
        recurrences=(recurrence,), policy=policy, extras=extras(),
    )  # fmt: skip
