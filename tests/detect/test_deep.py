"""Deep models: the work grows with the number of layers and no faster, and one illness has one cause."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradflow.detect import detect, find_causes
from gradflow.records import Cause, FlowRecord, Issue, Role
from tests.detect.builders import STEPS, Layer, activation, flow_record

ZERO = np.zeros(STEPS)


def vanishing_chain(depth: int) -> FlowRecord:
    """Every layer keeps a fifth of the gradient, until float32 has no number so small."""
    grads = (0.2 ** (depth - 1 - i) for i in range(depth))
    return flow_record(*(Layer(name=f"fc{i}", grad=g if g > 1e-45 else 0.0) for i, g in enumerate(grads)))


def exploding_chain(depth: int) -> FlowRecord:
    """Every eighth layer multiplies the gradient by 13, up to 1e36; the others keep it."""
    grads = [13.0 ** min((depth - 1 - i) // 8, 32) for i in range(depth)]
    return flow_record(*(Layer(name=f"fc{i}", grad=g, gain=9.0) for i, g in enumerate(grads)))


def dead_chain(depth: int) -> FlowRecord:
    """No unit of one layer, at two thirds of the depth, fires."""
    at = 2 * depth // 3
    names = [f"fc{i}" for i in range(depth)]
    off = {"never_fired": 1.0, "fired_share": ZERO}
    return flow_record(
        *(Layer(name=name, grad=0.0 if i <= at else 1.0, op="relu") for i, name in enumerate(names)),
        activations=[
            activation(f"{name}:relu", name, "relu", "rectifier", **(off if i == at else {}))
            for i, name in enumerate(names)
        ],
    )


def silent_chain(depth: int) -> FlowRecord:
    """No unit of any layer fires, so nothing but zeros enters the next one."""
    names = [f"fc{i}" for i in range(depth)]
    nothing = {"input_rms": ZERO, "output_rms": ZERO}
    return flow_record(
        *(Layer(name=n, grad=0.0, op="relu", fields=nothing if i else {}) for i, n in enumerate(names)),
        Layer(name="head"),
        activations=[
            activation(f"{n}:relu", n, "relu", "rectifier", never_fired=1.0, fired_share=ZERO) for n in names
        ],
    )


def saturated_chain(depth: int) -> FlowRecord:
    """Every tanh is saturated and hands back a twentieth, until float32 has no number so small."""
    names = [f"fc{i}" for i in range(depth)]
    grads = [0.05 ** (depth - 1 - i) for i in range(depth)]
    full = np.full(STEPS, 0.99)
    return flow_record(
        *(Layer(name=n, grad=g if g > 1e-45 else 0.0, op="tanh") for n, g in zip(names, grads, strict=True)),
        activations=[activation(f"{n}:tanh", n, "tanh", "bounded", saturated_share=full) for n in names],
    )


def residual(depth: int, keep: float) -> FlowRecord:
    """Blocks of two layers round which a stream goes, on which each block keeps a part."""
    layers, edges, stream = [], [], "stem"
    for i in range(depth):
        grad = max(keep ** (depth - 1 - i), 1e-40)
        layers += [Layer(name=f"b{i}.fc", grad=grad, op="tanh"), Layer(name=f"b{i}.out", grad=grad, op="add")]
        edges += [
            (stream, f"b{i}.fc"),
            (f"b{i}.fc", f"op:b{i}.fc"),
            (f"op:b{i}.fc", f"b{i}.out"),
            (f"b{i}.out", f"op:b{i}.out"),
            (stream, f"op:b{i}.out"),
        ]
        stream = f"op:b{i}.out"
    stem = Layer(name="stem", grad=max(keep**depth, 1e-40))
    return flow_record(stem, *layers, edges=[*edges, (stream, "loss")])


def healthy_residual(depth: int) -> FlowRecord:
    return residual(depth, 1.0)


def vanishing_residual(depth: int) -> FlowRecord:
    return residual(depth, 0.3)


def cut_chain(depth: int) -> FlowRecord:
    """No gradient comes past the last but one."""
    names = [f"fc{i}" for i in range(depth)]
    why = {"reachable": False, "reason": "its output goes on without its gradient: detach before head"}
    return flow_record(
        *(Layer(name=name, grad=np.nan) for name in names),
        Layer(name="head"),
        edges=[("head", "loss")],
        cuts=[
            *((a, b, "no gradient needed") for a, b in zip(names, names[1:], strict=False)),
            (names[-1], "head", "detach"),
        ],
        nodes=dict.fromkeys(names, why),
    )


def judged(record: FlowRecord) -> tuple[tuple[Issue, ...], tuple[Cause, ...]]:
    issues = detect(record)
    return issues, find_causes(record, issues)


def num_calls(function: Callable[[FlowRecord], Any], record: FlowRecord) -> int:
    """Return how many calls of functions one call makes, those of built-in ones included."""
    count = 0

    def counted(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        function(record)
    finally:
        sys.setprofile(before)
    return count


CHAINS = [
    (vanishing_chain, "fc0", "VANISHING"),
    (exploding_chain, "fc8", "EXPLODING"),
    (dead_chain, "fc{}", "DEAD"),
    (silent_chain, "fc0", "DEAD"),
    (saturated_chain, "fc{last}", "SATURATION"),
    (cut_chain, "fc{last}", "DEAD"),
]


MODELS = [*(chain for chain, *_ in CHAINS), healthy_residual, vanishing_residual]


@pytest.mark.parametrize("model", MODELS, ids=[model.__name__ for model in MODELS])
def test_work_grows_with_depth_and_no_faster(model: Callable[[int], FlowRecord]) -> None:
    judged(model(4))  # what is done once
    some, twice = (num_calls(judged, model(depth)) for depth in (200, 400))
    assert twice < 2.25 * some


@pytest.mark.parametrize(("chain", "place", "kind"), CHAINS, ids=[chain.__name__ for chain, *_ in CHAINS])
@pytest.mark.parametrize("depth", [24, 240])
def test_one_illness_of_a_chain_has_one_cause(
    chain: Callable[[int], FlowRecord], place: str, kind: str, depth: int
) -> None:
    issues, causes = judged(chain(depth))
    (cause,) = causes
    where = place.format(2 * depth // 3, last=depth - 1)
    assert (cause.layer, cause.issue_type.value, len(cause.issues)) == (where, kind, len(issues))
    assert len(cause.evidence) <= 13


def test_what_underflows_behind_a_decay_vanishes_and_is_not_dead() -> None:
    issues, (cause,) = judged(vanishing_chain(100))
    assert {issue.issue_type.value for issue in issues} == {"VANISHING"}
    assert cause.issues[0].magnitude == 0
    assert "Nothing of the gradient" in cause.mechanism
    assert "keeps about 0.2 of it" in cause.mechanism
    assert all(issue.evidence.plays(Role.STARVED) for issue in issues)
    assert len(issues) > 90
