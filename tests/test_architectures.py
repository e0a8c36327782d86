"""A sample of `benchmarks/architectures.py`: five kinds of language model of transformers."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("transformers", minversion="5")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of transformers
            import architectures  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return architectures


SAMPLE = [
    ("gpt2", "causal"),
    ("mixtral", "causal"),
    ("mamba", "causal"),
    ("bert", "masked"),
    ("t5", "seq2seq"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("architecture", "task"), SAMPLE)
def test_a_model_passes_without_an_alarm(script: ModuleType, architecture: str, task: str) -> None:
    row = script.examined(architecture, task)
    assert (row.status, row.reason, row.issues) == (script.PASSED, "", ())
    assert row.error <= script.TOLERANCE
    assert row.layers > 10


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_gradient_is_seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = script.plain_norms
    monkeypatch.setattr(
        script, "plain_norms", lambda *given: {name: 1.001 * norm for name, norm in plain(*given).items()}
    )
    row = script.examined("gpt2", "causal")
    assert row.status == script.GRADFLOW
    assert "differs from plain backward by 1.0e-03" in row.reason


@pytest.mark.filterwarnings("ignore")
def test_a_changed_model_is_seen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnose = script.gf.diagnose

    def careless(model: torch.nn.Module, *args: object, **kwargs: object) -> object:
        report = diagnose(model, *args, **kwargs)
        with torch.no_grad():
            next(model.parameters()).flatten()[0] += 1
        return report

    monkeypatch.setattr(script.gf, "diagnose", careless)
    assert script.examined("gpt2", "causal").reason == "the model is not what it was"
    monkeypatch.setattr(
        script.gf, "diagnose", lambda *args, **kwargs: torch.rand(1) and diagnose(*args, **kwargs)
    )
    assert script.examined("gpt2", "causal").reason == "the model is not what it was"  # its random state


def test_what_cannot_be_built_is_told_apart(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(architecture: str, task: str) -> torch.nn.Module:
        raise ImportError("needs a library")

    monkeypatch.setattr(script, "tiny_model", refused)
    row = script.examined("gpt2", "causal")
    assert row.status == script.BUILD
    assert row.reason.startswith("ImportError: needs a library (test_architectures.py:")


def test_the_page_tells_of_every_row(script: ModuleType) -> None:
    rows = [
        script.Row("one", "causal", script.PASSED, model="One", layers=3, parameters=1200, error=2e-8),
        script.Row("two", "masked", script.PASSED, model="Two", issues=("HIGH DEAD pooler",)),
        script.Row("three", "seq2seq", script.PLAIN, "ValueError: a | b"),
    ]
    page = script.page(rows)
    assert "In all 3: 2 pass, of 2 model classes; 1 of these get an issue above LOW." in page
    assert "| three | seq2seq | ValueError: a \\| b |" in page
    assert "| one | causal | `One` | 3 | 1,200 |" in page
    assert "## Gradflow fails\n\nNone." in page
