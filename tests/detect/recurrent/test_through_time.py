"""Verdicts on recurrent layers over time: sick ones are found and named, healthy ones are left alone."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import amplifying, detect, fading, gated
from gradflow.detect.flow.readings.recurrent_weights import growth_of, late_profile, memory
from gradflow.detect.view import flow_of
from gradflow.records import IssueSeverity, IssueType
from tests.detect.recurrent.readers import LOW, OURS, Reader, diagnosed, loud, ours, rnn, scaled

# -------------------------------------------------------------------------------------- healthy


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("length", "read", "options"),
    [
        (20, "last", {}),
        (28, "last", {}),  # the rows of a digit
        (50, "last", {}),
        (50, "last", {"num_layers": 2, "dropout": 0.3}),
        (64, "every", {}),  # a language model
        (64, "every", {"num_layers": 2}),
        (50, "states", {"bidirectional": True}),
        (50, "last", {"bidirectional": True}),
    ],
)
def test_gated_layers_at_their_own_initialisation_raise_no_alarm(
    kind: type[nn.RNNBase], length: int, read: str, options: dict[str, Any]
) -> None:
    assert loud(diagnosed(Reader(rnn(kind, **options), read), length, steps=5)) == []


@pytest.mark.parametrize(("kind", "width"), [(nn.LSTM, 8), (nn.LSTM, 64), (nn.GRU, 48)])
def test_verdicts_do_not_hang_on_width_scale_batch_or_dtype(kind: type[nn.RNNBase], width: int) -> None:
    """Neither where there is no illness, nor where there is one."""
    for length, expected in ((28, []), (120, [("MEDIUM", "VANISHING", "rnn")])):
        for given in ({"scale": 1e-6}, {"scale": 1e4}, {"batch": 3}):
            model = Reader(rnn(kind, width))
            assert loud(diagnosed(model, length, lr=None, steps=1, **given)) == expected, (length, given)
        for dtype in (torch.float64, torch.bfloat16):
            model = Reader(rnn(kind, width)).to(dtype)
            assert loud(diagnosed(model, length, lr=None, steps=1)) == expected, (length, dtype)


def test_a_plain_layer_read_at_every_step_is_healthy() -> None:
    assert loud(diagnosed(Reader(rnn(nn.RNN), "every"), 64)) == []


# --------------------------------------------------------------------------------------- fading


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_long_sequence_read_at_its_end_fades_and_open_gates_cure_it(kind: type[nn.RNNBase]) -> None:
    sick = diagnosed(Reader(rnn(kind)), 200, steps=2)
    assert loud(sick) == [("MEDIUM", "VANISHING", "rnn")]
    issue, slow = sick.issues
    assert (slow.issue_type, slow.severity) == (gf.IssueType.NUMERICAL, gf.IssueSeverity.LOW)
    assert issue.layer_type == kind.__name__
    assert issue.metrics["num_steps"] == 200
    assert 5 <= issue.metrics["steps_to_percent"] <= 12
    assert 20 <= issue.metrics["steps_to_rounding"] <= 40
    assert "of its 200 steps teach it nothing" in issue.description
    assert (
        "rnn.bias_ih_l0.data[rnn.hidden_size:2 * rnn.hidden_size].fill_(5.3)" in issue.recommended_actions[0]
    )
    assert sick.causes[0].layer == "rnn"
    assert loud(diagnosed(Reader(scaled(rnn(kind), keep=5.3)), 200, steps=2)) == []


def test_severity_goes_with_what_is_heard() -> None:
    seen = [late_severity(Reader(rnn(nn.LSTM)), n) for n in (28, 50, 120, 400)]
    assert seen == [None, IssueSeverity.LOW, IssueSeverity.MEDIUM, IssueSeverity.HIGH]


def late_severity(model: nn.Module, length: int) -> IssueSeverity | None:
    found = ours(diagnosed(model, length, lr=None, steps=1, batch=4).record)
    return found[("rnn", IssueType.VANISHING)].severity if found else None


def test_fading_thresholds() -> None:
    record = diagnosed(Reader(rnn(nn.LSTM)), 50, lr=None, steps=1).record
    heard = float(record.recurrences[0].heard_share[0])
    assert 0.33 < heard < 0.9
    assert detect(record, fading(some=heard)) == ()
    (medium,) = detect(record, fading(heard=heard + 0.01))
    (high,) = detect(record, fading(few=heard + 0.01))
    assert (medium.severity, high.severity) == (IssueSeverity.MEDIUM, IssueSeverity.HIGH)


def test_what_has_learned_meanwhile_is_calm() -> None:
    record = diagnosed(Reader(rnn(nn.LSTM)), 120, lr=None, steps=1).record
    learned = attrs.evolve(record, losses=[1.0, 0.9, 0.6, 0.5, 0.4, 0.3], steps=6)
    (issue,) = detect(learned, fading())
    assert issue.severity is LOW
    assert "it seems not to need them" in issue.description


def test_the_lower_of_two_layers_is_not_blamed_for_what_the_upper_one_loses() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lower, self.upper = rnn(nn.GRU), nn.GRU(24, 24, batch_first=True)
            self.head = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.upper(self.lower(x)[0])[0][:, -1])

    report = diagnosed(Two(), 200, steps=2)
    assert [i.layer for i in report.issues if i.issue_type is IssueType.VANISHING] == ["upper"]


def test_a_frozen_layer_is_not_judged() -> None:
    model = Reader(rnn(nn.LSTM))
    for parameter in model.rnn.parameters():
        parameter.requires_grad_(False)

    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.reader = nn.Linear(4, 4), model

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(self.embed(x))

    record = diagnosed(Before(), 200, lr=None, steps=1).record
    assert record.recurrences
    assert ours(record) == {}


class Loop(nn.Module):
    """A loop over a cell, read at its end."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def test_a_loop_over_a_cell_fades_too() -> None:
    torch.manual_seed(0)
    report = diagnosed(Loop(nn.GRUCell(4, 16)), 150, steps=2)
    found = ours(report.record)
    issue = found[("cell", IssueType.VANISHING)]
    assert issue.severity is IssueSeverity.MEDIUM
    assert "cell.bias_ih.data[cell.hidden_size" in issue.recommended_actions[0]
    short = diagnosed(Loop(nn.GRUCell(4, 16)), 20, steps=2)
    assert ours(short.record) == {}


# ----------------------------------------------------------------------------------- amplifying


@pytest.mark.parametrize("read", ["last", "every"])
def test_large_recurrent_weights_explode_through_time(read: str) -> None:
    for name, factor in (("relu", 4.0), ("tanh", 6.0)):
        report = diagnosed(Reader(scaled(rnn(nn.RNN, nonlinearity=name), recurrent=factor), read), 40)
        issue = ours(report.record)[("rnn", IssueType.EXPLODING)]
        assert issue.severity >= IssueSeverity.MEDIUM
        assert issue.metrics["growth"] >= 100
        assert issue.metrics["spectral_radius"] > 1
        assert issue.metrics["kept_per_step"] ** issue.metrics["num_steps"] == pytest.approx(
            issue.metrics["growth"]
        )
        assert ("EXPLODING", "rnn") in [(t, layer) for _, t, layer in loud(report)]
        assert ("rnn", IssueType.VANISHING) not in ours(report.record)


def test_growth_is_that_of_the_transition() -> None:
    """A relu layer that is linear where it stands: 1.5 a step over 20 steps."""
    module = rnn(nn.RNN, 8, nonlinearity="relu")
    with torch.no_grad():
        module.weight_hh_l0.copy_(1.5 * torch.eye(8))
        module.weight_ih_l0.zero_()
        module.bias_ih_l0.fill_(1.0), module.bias_hh_l0.zero_()
    record = diagnosed(Reader(module), 21, lr=None, steps=1).record
    issue = ours(record)[("rnn", IssueType.EXPLODING)]
    assert issue.magnitude == pytest.approx(1.5**20, rel=1e-4)
    assert issue.severity is IssueSeverity.HIGH
    assert (issue.metrics["num_steps"], issue.metrics["steps_to_double"]) == (20, 2)
    assert issue.metrics["kept_per_step"] == pytest.approx(1.5, rel=1e-4)
    (critical,) = detect(record, amplifying(threshold=3.0))
    assert critical.severity is IssueSeverity.CRITICAL
    assert detect(record, amplifying(threshold=60.0)) == ()


def test_orthogonal_weights_neither_fade_nor_grow() -> None:
    module = rnn(nn.RNN)
    with torch.no_grad():
        nn.init.orthogonal_(module.weight_hh_l0)
        module.weight_ih_l0.mul_(0.02)
        module.bias_ih_l0.zero_(), module.bias_hh_l0.zero_()
    assert loud(diagnosed(Reader(module), 60)) == []


# -------------------------------------------------------------------------------------- records


def test_a_record_without_the_measurement_has_no_such_issues() -> None:
    model = Reader(rnn(nn.LSTM))
    record = gf.analyze(model, [torch.randn(4, 200, 4)], lambda y: y.square().mean())
    assert detect(record, OURS) == ()


def test_levels_are_told_apart() -> None:
    module = rnn(nn.LSTM, num_layers=2)
    with torch.no_grad():
        module.bias_ih_l1[24:48] -= 8.0
    record = diagnosed(Reader(module), 60, lr=None, steps=1).record
    issue = ours(record)[("rnn", IssueType.VANISHING)]
    assert issue.metrics["level"] == "l1"
    assert " of l1 " in issue.description


def test_memory_is_that_measured_where_it_was() -> None:
    """By the weights a layer forgets; read at its third step it need not remember more than two."""

    class Third(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, 2])

    model = Third(rnn(nn.RNN))
    record = diagnosed(model, 60, lr=None, steps=1).record
    found = memory(flow_of(record), "rnn")
    assert found is not None
    assert found.steps == 2
    assert loud(diagnosed(model, 60)) == []
    every = diagnosed(Reader(rnn(nn.RNN), "every"), 60, lr=None, steps=1).record
    assert memory(flow_of(every), "rnn") is None


def test_profiles_of_a_run() -> None:
    level = diagnosed(Reader(rnn(nn.GRU)), 12, steps=6).record.recurrences[0].levels[0]
    assert late_profile(level.readout_profile).shape == (12,)
    assert growth_of(level).shape == (2,)  # both ends of the run
    burst = attrs.evolve(level, readout_profile=[[math.inf, 1e-3], [2.0, 1.0], [2.0, 0.0]])
    assert growth_of(burst)[:2].tolist() == [1e300, 2.0]
    assert math.isnan(growth_of(burst)[2])
    empty = attrs.evolve(level, readout_profile=())
    assert late_profile(empty.readout_profile).size == growth_of(empty).size == 0


@pytest.mark.parametrize("factory", [fading, amplifying, gated])
def test_the_page_states_the_defaults_and_the_docstring_their_reasons(factory: Any) -> None:
    defaults = {name: p.default for name, p in inspect.signature(factory).parameters.items()}
    page = (Path(__file__).parents[3] / "docs" / "detectors.md").read_text(encoding="utf-8")
    section = re.split(r"\n###? ", page.split(f"\n### {factory.__name__}\n")[1])[0]
    stated = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| .+ \|$", section, re.MULTILINE)
    assert {name: float(value) for name, value in stated} == defaults
    text = inspect.getdoc(factory) or ""
    for part in ("Measured: ", "Why this is evidence: ", "Looks alike and is not: "):
        assert part in text, part
    for name in defaults:
        assert re.search(rf"^    {name}: ", text, re.MULTILINE), name
