"""`automatic`: what is seen in the first step, what is told of it, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.functional.attention import automatic as attention_by_itself
from gradflow.functional.attention.capture import Capture, Seen
from gradflow.pipelines import policy, recurrent, transformer
from tests.functional.snapshots import difference, process, snapshot
from tests.pipelines.models import CASES, case


def diagnosed(name: str, **options: Any) -> gf.Report:
    c = case(name)
    batches = [c.batch] * 3
    return gf.diagnose(c.model, batches, c.loss, steps=3, **{"seed": 0, **options})


def kinds(report: gf.Report) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split()[0] for text in report.record.provenance.chosen)


@pytest.mark.parametrize("name", CASES)
def test_what_ran_decides_what_is_measured(name: str) -> None:
    report = diagnosed(name)
    assert kinds(report) == case(name).kinds
    assert bool(report.record.transformer.attention) is ("attention" in case(name).kinds)
    assert bool(report.record.recurrences) is ("recurrence" in case(name).kinds)
    assert (report.record.policy is not None) is ("policy" in case(name).kinds)
    assert report.ok, report


@pytest.mark.parametrize("name", [name for name in CASES if not case(name).kinds])
def test_where_nothing_is_found_the_record_is_that_of_the_base(name: str) -> None:
    found, base = diagnosed(name), diagnosed(name, pipeline=gf.flow())
    assert found.to_json() == base.to_json()


@pytest.mark.parametrize("name", ["gpt2", "lstm", "actor-critic"])
def test_the_base_by_itself_says_the_base_only(name: str) -> None:
    report = diagnosed(name, pipeline=gf.flow())
    assert report.record.provenance.chosen == ()
    assert not report.record.transformer.attention
    assert not report.record.recurrences
    assert report.record.policy is None
    assert "special" not in report.text("full")


@pytest.mark.parametrize("name", [name for name in CASES if case(name).kinds])
def test_base_numbers_are_what_they_are_without(name: str) -> None:
    found, base = (diagnosed(name, pipeline=p).record for p in (None, gf.flow()))
    np.testing.assert_array_equal(found.losses, base.losses)
    assert found.layers == base.layers
    assert found.parameters == base.parameters


HEADS = {
    "handwritten attention": "attention, since softmax ran in h.0.attn and h.1.attn; at the first and",
    "bert": "attention, since scaled_dot_product_attention ran in bert.encoder.layer.0.attention.self and",
    "lstm": "recurrence, since LSTM in rnn ran; at the first and the last step, on 8 of 12 samples",
    "loop over a cell": "recurrence, since a loop over GRUCell in cell ran; at the first and the last step",
    "actor-critic": "policy in action_head, value in value_head, since log_prob of a Categorical is",
    "policy by hand": "policy in fc2, value in fc3, since what is gathered from a softmax is weighed by",
    "policy by cross-entropy": "policy in fc2, value in fc3, since an unreduced cross_entropy is weighed by",
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_the_report_tells_what_was_chosen_and_why(name: str, tmp_path: Path) -> None:
    report = diagnosed(name)
    (line,) = [line for line in report.text("full").splitlines() if line.startswith("  special")]
    assert line.split(maxsplit=1)[1].startswith(HEADS[name]), line
    report.to_html(tmp_path / "flow.html")
    assert HEADS[name] in (tmp_path / "flow.html").read_text(encoding="utf-8")
    assert gf.Report.from_json(report.to_json()) == report


def test_a_name_makes_a_policy_of_weights_that_a_classifier_has_too() -> None:
    class Policy(nn.Sequential):
        pass

    class Cloud(nn.Sequential):
        pass

    x, actions = torch.randn(16, 3), torch.arange(16) % 2

    def cloned(logits: torch.Tensor) -> torch.Tensor:
        return -torch.distributions.Categorical(logits=logits).log_prob(actions).mean()

    found = [gf.diagnose(kind(nn.Linear(3, 2)), [x] * 2, cloned, steps=2) for kind in (Policy, Cloud)]
    assert [kinds(report) for report in found] == [("policy",), ()]
    assert "'Policy' is called so" in found[0].record.provenance.chosen[0]


def test_the_first_and_the_last_step_are_looked_at_and_large_batches_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_by_itself, "MOST", 100)
    c = case("handwritten attention")
    batch = c.batch.repeat(4, 1)
    report = gf.diagnose(c.model, lambda: batch, c.loss, steps=6)
    assert report.record.transformer.steps == (0, 5)
    assert "at the first and the last step, on 1 of 12 samples" in report.record.provenance.chosen[0]
    whole = gf.analyze(c.model, lambda: batch, c.loss, steps=6, measurements=[gf.functional.attention()])
    entropy = [r.transformer.attention[0].entropy[0] for r in (report.record, whole)]
    np.testing.assert_allclose(entropy[0], entropy[1], rtol=0.3)
    assert not np.array_equal(entropy[0], entropy[1])


class Parts(Capture):
    """Holds the first sample of every attention against what it is among all."""

    def __init__(self, held: list[str]) -> None:
        super().__init__(self.hold)
        self.held = held

    def hold(self, seen: Seen) -> None:
        (whole,), (part,) = seen.parts(), seen.source.of(torch.tensor([0])).parts()
        torch.testing.assert_close(part.weights, whole.weights[:1])
        assert torch.equal(part.allowed.expand_as(part.weights), whole.allowed[:1].expand_as(part.weights))
        self.held.append(seen.name)


@attrs.frozen
class Holding:
    held: list[str] = attrs.field(factory=list, hash=False)

    def start(self, model: Any, modules: Any) -> gf.Session:
        return Parts(self.held)


@pytest.mark.parametrize("name", ["bert", "encoder", "handwritten attention"])
def test_a_part_of_the_samples_is_measured_as_it_is_among_all(name: str) -> None:
    c, holding = case(name), Holding()
    gf.analyze(c.model, [c.batch], c.loss, steps=1, measurements=[holding])
    assert holding.held


@pytest.mark.parametrize("name", ["gpt2", "lstm", "actor-critic", "policy by hand"])
def test_it_leaves_no_trace_and_says_the_same_twice(name: str) -> None:
    c = case(name)
    optimizer = torch.optim.Adam(c.model.parameters())
    before, outside = snapshot(c.model, optimizer), process()
    texts = [
        gf.diagnose(c.model, [c.batch] * 3, c.loss, steps=3, seed=1, optimizer=optimizer).to_json()
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    assert difference(before, snapshot(c.model, optimizer)) == ""
    assert difference(outside, process()) == ""


@pytest.mark.parametrize("name", ["handwritten attention", "lstm", "actor-critic"])
def test_under_the_other_transform_the_first_step_alone_is_heard(name: str) -> None:
    fused, vjp = (diagnosed(name, transform=t) for t in ("fused", "vjp"))
    assert kinds(vjp) == kinds(fused)
    assert vjp.ok


def test_what_a_base_measures_in_full_is_left_to_it() -> None:
    every = gf.pipelines.precision(transformer(recurrent(policy())))
    assert len(gf.automatic(every).measurements) == 4
    report = diagnosed("lstm", pipeline=gf.automatic(recurrent()))
    assert report.record.provenance.chosen == ()
    assert len(report.record.recurrences) == 1
    assert np.isfinite(report.record.recurrences[0].levels[0].lyapunov).all()


def test_a_layer_called_often_is_measured_in_its_first_calls() -> None:
    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state, outputs = None, []
            for step in x:
                y, state = self.rnn(step[None], state)
                outputs.append(y)
            return self.out(outputs[-1])

    report = gf.diagnose(Often(), [torch.randn(7, 4, 3)] * 2, lambda y: y.square().mean(), steps=2)
    assert [r.name for r in report.record.recurrences] == ["rnn", "rnn@1", "rnn@2", "rnn@3"]
    assert "the first 4 calls of rnn" in report.record.provenance.chosen[0]


def test_the_analyzer_and_the_command_see_it_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    c = case("lstm")
    analyzer = gf.GradientFlowAnalyzer(c.model)
    analyzer.analyze([c.batch], c.loss, steps=1)
    assert analyzer.record.provenance.chosen
    from gradflow.cli import main

    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\n"
        "def build():\n"
        "    return nn.GRU(3, 8), lambda: torch.randn(5, 4, 3), lambda y: y[0].square().mean()\n"
    )
    assert main(["diagnose", str(file), "--steps", "2", "--verbose"]) == 0
    assert "special  recurrence, since GRU in the model ran" in capsys.readouterr().out
    assert main(["diagnose", str(file), "--steps", "2", "--pipeline", "flow"]) == 0
    assert "special" not in capsys.readouterr().out
