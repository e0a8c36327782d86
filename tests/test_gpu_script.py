"""`benchmarks/gpu.py` on a CPU: the same code with tiny models, so that it runs where a GPU is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gpu  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return gpu


def test_every_row_is_there(script: ModuleType) -> None:
    (size, _), cpu = script.TINY, torch.device("cpu")
    rows = list(script.measured(cpu, [size], paths=(), seconds=600.0))
    values = {what: value for what, of, value in rows if of == size.name}
    assert len(values) == len(rows), rows  # any other row tells that something is left out
    steps = [float(value) for what, value in values.items() if what.endswith("over plain")]
    assert len(steps) == 4
    assert min(steps) > 0.5
    assert all(any(what.startswith(name) for what in values) for name in script.PIPELINES)


def test_what_there_is_no_time_for_is_told(script: ModuleType) -> None:
    rows = list(script.measured(torch.device("cpu"), script.TINY[:1], paths=(), seconds=-1.0))
    assert {value for _, _, value in rows} == {"left out: no time was left"}


def test_the_model_has_the_parameters_of_gpt_2(script: ModuleType) -> None:
    small, large = script.SIZES
    for size, number in ((small, 124e6), (large, 1.56e9)):
        with torch.device("meta"):
            model = script.GPT(size)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(number, rel=0.01)
