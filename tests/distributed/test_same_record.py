"""A record of several processes is that of one process with the joined batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradflow.records import FlowRecord, Reason
from tests.distributed.models import MODELS
from tests.distributed.scenarios import COMPARED, diagnosed, one_step
from tests.distributed.worlds import World

LAYER = (
    "grad_norm", "grad_finite", "called", "reached", "num_elements", "output_rms", "output_zero_share",
    "output_variation", "input_rms",
)  # fmt: skip
PARAMETER = ("grad_norm", "grad_zero_share", "norm", "reached", "grad_finite", "trainable", "optimized")
ACTIVATION = (
    "num_units",
    "fired_share",
    "saturated_share",
    "never_fired",
    "always_saturated",
    "input_rms",
    "width",
)
NODE = ("kind", "grad_norm", "input_grad_norm", "effective_rank", "reachable", "num_elements")
UPDATE = (
    "rate",
    "weight_rms",
    "rms",
    "gradient_rms",
    "slope",
    "shrink",
    "second_moment",
    "under_epsilon",
    "unchanged",
    "age",
)


def own(name: str) -> str:
    """Return a name without that of DistributedDataParallel's inner module."""
    return name.replace("module.", "").replace("module:", "")


def numbers(record: FlowRecord) -> dict[str, Any]:
    """Return what must be the same, by what it is of."""
    found: dict[str, Any] = {"losses": record.losses, "never": [own(n) for n in record.never_called]}
    for of, fields in (
        (record.layers, LAYER), (record.parameters, PARAMETER), (record.activations, ACTIVATION),
        (record.graph_record.nodes if record.graph_record else (), NODE),
        (record.updates.parameters if record.updates else (), UPDATE),
    ):  # fmt: skip
        found |= {f"{type(e).__name__} {own(e.name)} {f}": getattr(e, f) for e in of for f in fields}
    for edge in record.graph_record.edges if record.graph_record else ():
        found[f"edge {own(edge.source)} {own(edge.target)}"] = edge.flow
        found[f"severed {own(edge.source)} {own(edge.target)}"] = edge.severed
    if record.updates is not None:
        found["clipping"] = record.updates.clipping
        found |= {
            f"curve {c.step} {f}": getattr(c, f)
            for c in record.updates.curves
            for f in ("slope", "bend", "actual")
        }
    if record.reach is not None:
        found["reached"] = record.reach.num_reached
        found["unreached"] = sum(part.num_elements for part in record.reach.unreached)
    return found


def differences(found: FlowRecord, expected: FlowRecord) -> list[str]:
    """Return what of two records is not the same to 1e-5."""
    a, b = numbers(found), numbers(expected)
    wrong = [f"{key} is there once only" for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys():
        x, y = a[key], b[key]
        if isinstance(x, (np.ndarray, float, tuple)):
            x, y = np.asarray(x, float), np.asarray(y, float)
            size = float(
                np.max(np.nan_to_num(np.abs(y)), initial=1.0 if key.endswith("output_variation") else 0.0)
            )
            if x.shape != y.shape or not np.allclose(
                x, y, rtol=1e-5, atol=_rounding(key) * size, equal_nan=True
            ):
                wrong.append(f"{key}: {x} instead of {y}")
        elif x != y:
            wrong.append(f"{key}: {x} instead of {y}")
    return sorted(wrong)


def _rounding(key: str) -> float:
    """Return what may be lost of the largest number: a variation is the root of a difference from one."""
    return 1e-6 if key.endswith("output_variation") else 1e-9


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = {}
    more = {
        "clipped": ("mlp", "healthy", True, {"clip": 0.3, "accumulate": 2}),
        "by_step_fn": ("mlp", "healthy", True, {"step_fn": one_step}),
    }
    for name, (model, kind, moves, options) in {**COMPARED, **more}.items():
        made, batches, loss_fn = MODELS[model](kind)
        found[name] = diagnosed(made, batches, loss_fn, moves=moves, **options)
    return found


@pytest.mark.parametrize("name", [*COMPARED, "clipped", "by_step_fn"])
def test_the_record_is_that_of_the_joined_batch(name: str, world: World, alone: dict[str, Any]) -> None:
    first, *others = world.results(name)
    expected, verdicts = alone[name]
    wrong = differences(first["record"], expected)
    assert not wrong, "\n".join(wrong[:40])
    assert sorted(first["verdicts"]) == sorted(verdicts)
    assert ("sick" in name) == any(severity in ("CRITICAL", "HIGH", "MEDIUM") for _, _, severity in verdicts)
    for other in others:
        assert other["record"] == first["record"]
        assert other["verdicts"] == first["verdicts"]
    assert all(result["pure"] for result in (first, *others))


def test_nodes_that_exchange_are_called_as_often_on_every_process(world: World) -> None:
    first, *others = world.results("zeros_of_one")
    assert all(other == first for other in others)
    assert {name for name, _, slices in first if slices == ((3, 4),)} == {
        "module.scale", "module.first.weight", "module.first.bias", "module.last.weight",
    }  # fmt: skip
    assert {reason for name, reason, _ in first if "first" in name} == {Reason.OFF}


def test_plain_batch_norms_are_those_of_one_process_that_norms_each_part(world: World) -> None:
    first, *others = world.results("plain_norm")
    made, batches, loss_fn = MODELS["resnet"](str(world.size))
    expected, _ = diagnosed(made, batches, loss_fn, moves=True)
    wrong = differences(first["record"], expected)
    assert not wrong, "\n".join(wrong[:40])
    assert [kind for _, kind, _ in first["verdicts"]] == ["UNSYNCHRONISED"]
    assert all(other["record"] == first["record"] for other in others)
    assert all(result["pure"] for result in (first, *others))


def test_a_process_without_a_batch_ends_the_run_on_all(world: World) -> None:
    first, *others = world.results("runs_out")
    assert first.steps == 3
    assert any("ended after 3 of 5 steps" in note for note in first.provenance.notes)
    assert all(other == first for other in others)


def test_a_pass_that_is_run_again_lets_go_of_the_graph_before(world: World) -> None:
    for found in world.results("lets_go"):
        assert len(found) > 3  # the first step is run again
        assert set(found) == {0}


def test_the_reducer_and_its_hook_go_on_as_before(world: World) -> None:
    for same, num_calls, notes in world.results("trains_on"):
        assert same
        assert num_calls >= 6
        assert any("communication hook of DistributedDataParallel is not run" in note for note in notes)
        assert not any("of this process alone" in note for note in notes)
