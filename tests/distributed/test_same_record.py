"""A record of several processes is that of one process with the joined batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradflow.records import FlowRecord
from tests.distributed.models import MODELS
from tests.distributed.scenarios import COMPARED, diagnosed
from tests.distributed.worlds import ran

LAYER = (
    "grad_norm", "grad_finite", "called", "reached", "num_elements", "output_rms", "output_zero_share",
    "output_variation", "input_rms",
)  # fmt: skip
PARAMETER = ("grad_norm", "grad_zero_share", "norm", "reached", "grad_finite", "trainable", "optimized")
ACTIVATION = ("num_units", "fired_share", "saturated_share", "never_fired", "always_saturated", "input_rms", "width")
NODE = ("kind", "grad_norm", "input_grad_norm", "effective_rank", "reachable", "num_elements")
UPDATE = ("rate", "weight_rms", "rms", "gradient_rms", "slope", "second_moment", "under_epsilon", "unchanged", "age")


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
        found |= {f"curve {c.step} {f}": getattr(c, f) for c in record.updates.curves for f in ("slope", "bend", "actual")}
    if record.reach is not None:
        found["reached"] = record.reach.num_reached
        found["reasons"] = record.reach.totals()
    return found


def differences(found: FlowRecord, expected: FlowRecord) -> list[str]:
    """Return what of two records is not the same to 1e-5."""
    a, b = numbers(found), numbers(expected)
    wrong = [f"{key} is there once only" for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys():
        x, y = a[key], b[key]
        if isinstance(x, (np.ndarray, float, tuple)):
            x, y = np.asarray(x, float), np.asarray(y, float)
            size = float(np.max(np.nan_to_num(np.abs(y)), initial=1.0 if key.endswith("output_variation") else 0.0))
            if x.shape != y.shape or not np.allclose(x, y, rtol=1e-5, atol=_rounding(key) * size, equal_nan=True):
                wrong.append(f"{key}: {x} instead of {y}")
        elif x != y:
            wrong.append(f"{key}: {x} instead of {y}")
    return sorted(wrong)


def _rounding(key: str) -> float:
    """Return what may be lost of the largest number: a variation is the root of a difference from one."""
    return 1e-6 if key.endswith("output_variation") else 1e-9


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    return ran(request.param, COMPARED, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = {}
    for name, (model, kind, moves, options) in COMPARED.items():
        made, batches, loss_fn = MODELS[model](kind)
        found[name] = diagnosed(made, batches, loss_fn, moves=moves, **options)
    return found


@pytest.mark.parametrize("name", COMPARED)
def test_the_record_is_that_of_the_joined_batch(
    name: str, results: Callable[[str], list[Any]], alone: dict[str, Any]
) -> None:
    first, *others = results(name)
    expected, verdicts = alone[name]
    wrong = differences(first["record"], expected)
    assert not wrong, "\n".join(wrong[:40])
    assert sorted(first["verdicts"]) == sorted(verdicts)
    if name == 'mixture_sick': print(verdicts)
    assert ("sick" in name) == any(severity in ("CRITICAL", "HIGH", "MEDIUM") for _, _, severity in verdicts)
    for other in others:
        assert other["record"] == first["record"]
        assert other["verdicts"] == first["verdicts"]
    assert all(result["pure"] for result in (first, *others))
