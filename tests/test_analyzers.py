"""The class interface says what the functions say, and nothing of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import GradflowError, NotAnalyzedError
from gradflow.pipelines import flow
from gradflow.report import summary_text


def healthy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


def dead() -> nn.Sequential:
    model = healthy()
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    return model


def inputs() -> torch.Tensor:
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def loss(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


def test_issues_are_those_of_diagnose() -> None:
    analyzer = gf.GradientFlowAnalyzer(dead())
    issues = analyzer.analyze(input_fn=inputs, loss_fn=loss, steps=4)
    report = gf.diagnose(dead(), inputs, loss, steps=4)
    assert isinstance(issues, list)
    assert issues == list(report.issues)
    assert issues[0].issue_type is gf.IssueType.DEAD
    assert [issue.severity for issue in issues] == sorted((i.severity for i in issues), reverse=True)
    assert analyzer.record == report.record


def test_print_summary_prints_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    analyzer = gf.GradientFlowAnalyzer(dead())
    issues = analyzer.analyze(inputs, loss, steps=2)
    analyzer.print_summary(issues)
    assert capsys.readouterr().out == summary_text(issues) + "\n"
    analyzer.print_summary([])
    assert capsys.readouterr().out.startswith("[OK] ")


def test_healthy_layers_are_those_that_no_issue_names() -> None:
    analyzer = gf.GradientFlowAnalyzer(healthy())
    issues = analyzer.analyze(inputs, loss, steps=2)
    assert issues == []
    assert analyzer.get_healthy_layers(issues) == ["0", "1", "2"]
    sick = gf.GradientFlowAnalyzer(dead())
    found = sick.analyze(inputs, loss, steps=2)
    assert set(sick.get_healthy_layers(found)) == {"0", "1", "2"} - {issue.layer for issue in found}


def test_optimizer_and_steps_are_handed_on() -> None:
    model = healthy()
    before = model[0].weight.detach().clone()
    analyzer = gf.GradientFlowAnalyzer(model)
    analyzer.analyze(inputs, loss, steps=5, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert analyzer.record.steps == 5
    assert analyzer.record.provenance.optimizer == "SGD"
    assert analyzer.record.losses[-1] < analyzer.record.losses[0]
    assert torch.equal(model[0].weight, before)


def test_circular_flow_is_measured_when_switched_on() -> None:
    plain, full = (
        gf.GradientFlowAnalyzer(healthy(), enable_circular_flow_analyser=on) for on in (False, True)
    )
    for analyzer in (plain, full):
        analyzer.analyze(inputs, loss, steps=2)
    assert plain.record.provenance.detail == "cheap"
    assert full.record.provenance.detail == "full"
    assert full.record.graph.measured


def test_thresholds_reach_the_detectors(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("gradflow.analyzers.flow", lambda **given: seen.update(given) or flow())
    analyzer = gf.GradientFlowAnalyzer(
        healthy(),
        name="mine",
        enable_rnn_analyzer=True,
        vanishing_threshold=1e-3,
        exploding_threshold=2.0,
        dead_threshold=0.5,
        unstable_cv_threshold=0.25,
    )
    assert analyzer.name == "mine"
    assert analyzer.pipeline.name == "flow+recurrent+automatic"
    assert seen == {
        "vanishing_threshold": 1e-3,
        "exploding_threshold": 2.0,
        "dead_threshold": 0.5,
        "unstable_cv_threshold": 0.25,
        "detail": "cheap",
    }


def test_defaults_are_those_of_the_detectors() -> None:
    assert gf.GradientFlowAnalyzer(healthy()).name == "Sequential"
    gf.GradientFlowAnalyzer(healthy(), None, False, False, 1e-6, 10.0, 0.9, 3.0)


@pytest.mark.parametrize("kind", [gf.GradientFlowAnalyzer, gf.FlowAnalyzer])
def test_there_is_no_record_before_a_run(kind: type) -> None:
    with pytest.raises(NotAnalyzedError, match=f"^{kind.__name__}: nothing was analysed yet. Call analyze"):
        kind(healthy()).record  # noqa: B018
    assert issubclass(NotAnalyzedError, GradflowError)


def test_healthy_layers_need_a_run() -> None:
    with pytest.raises(NotAnalyzedError, match="nothing was analysed yet"):
        gf.GradientFlowAnalyzer(healthy()).get_healthy_layers([])


def test_flow_analyzer_maps_names_to_records() -> None:
    flow = gf.FlowAnalyzer(healthy())
    layers = flow.analyze(inputs, loss, steps=3)
    assert list(layers) == ["0", "1", "2"]
    assert layers["1"] is flow.record["1"]
    assert flow.record == gf.analyze(healthy(), inputs, loss, steps=3)


def test_flow_analyzer_takes_a_forward_of_ones_own() -> None:
    steps: list[int] = []

    def forward(model: nn.Module, step: int) -> torch.Tensor:
        steps.append(step)
        return model(inputs()) - model(-inputs())

    flow = gf.FlowAnalyzer(healthy())
    layers = flow.analyze_custom(forward, loss, steps=3)
    assert steps == [0, 1, 2]
    assert list(layers) == ["0", "1", "2", "0@1", "1@1", "2@1"]
    with pytest.raises(TypeError, match="forward_fn"):
        flow.analyze_custom(None, loss, steps=1)  # type: ignore[arg-type]


def test_the_classes_take_what_a_loop_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    data = [torch.randn(8, 4) for _ in range(4)]
    loss = lambda y: y.square().mean()  # noqa: E731
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    analyzer, low = gf.GradientFlowAnalyzer(model), gf.FlowAnalyzer(model)
    analyzer.analyze(data, loss, optimizer=sgd, clip=0.1, accumulate=2)
    low.analyze(data, loss, optimizer=sgd, clip=0.1, accumulate=2)
    for record in (analyzer.record, low.record):
        assert record.provenance.clip == 0.1
        assert "an update after 2 batches" in record.provenance.loop
    low.analyze_custom(lambda m, step: m(data[step]), loss, steps=2, optimizer=sgd, clip=0.2)
    assert low.record.provenance.clip == 0.2
