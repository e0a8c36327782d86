"""What changed between two records."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.cli import main
from gradflow.comparing import Comparison
from gradflow.errors import RecordInputError
from gradflow.graph import LayerGraph
from tests.samples import make_issue


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def report_on(model: nn.Module, scale: float = 1.0) -> gf.Report:
    torch.manual_seed(1)
    batch = torch.randn(32, 16), torch.randint(0, 3, (32,))
    loss = nn.CrossEntropyLoss()
    return gf.diagnose(model, [batch], lambda y, t: scale * loss(y, t), steps=1)


def dead(model: nn.Sequential) -> nn.Sequential:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[4].bias.fill_(-100.0)
    return changed


def test_nothing_changed() -> None:
    report = report_on(network())
    change = gf.compare(report, report)
    assert not change.begun
    assert not change.ended
    assert all(number.size == 0 for number in change.numbers)
    assert "0 issue(s) begun, 0 ended" in str(change)
    assert change.graph is not None
    assert not change.graph.severed


def test_a_scale_of_the_loss_is_shared_by_all_gradients() -> None:
    model = network()
    change = gf.compare(report_on(model), report_on(model, 100.0))
    assert change.common_shift == pytest.approx(math.log(100), rel=1e-3)
    gradients = [number for number in change.numbers if number.name.startswith("gradient_rms/")]
    assert gradients
    assert max(number.size for number in gradients) < 1e-3
    assert "All gradients together: 100 times as large." in str(change)


def test_a_layer_that_died() -> None:
    model = network()
    before, after = report_on(model), report_on(dead(model))
    change = gf.compare(before, after)
    assert ("4", gf.IssueType.DEAD) in {(issue.layer, issue.issue_type) for issue in change.begun}
    assert math.isinf(change.numbers[0].size), "the gradient before it is exactly zero now"
    fired = next(number for number in change.numbers if number.name == "never_fired/5")
    assert fired.size == pytest.approx(math.log(100) * (fired.after - fired.before))
    text = str(change)
    assert "begun    [" in text
    assert "DEAD in 4" in text
    back = gf.compare(after, before)
    assert {i.layer for i in back.ended} == {i.layer for i in change.begun}
    assert "ended    [" in str(back)


def test_layers_that_come_and_go() -> None:
    model = network()
    longer = nn.Sequential(*model, nn.Tanh())
    change = gf.compare(report_on(model).record, report_on(longer).record)
    assert change.layers_after == ("9",)
    assert gf.compare(report_on(longer), report_on(model)).layers_before == ("9",)
    assert "layers only after: 9" in str(change)


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(RecordInputError, match="compare: after is a str; pass a FlowRecord"):
        gf.compare(report_on(network()), "b.json")  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    report_on(model).record.to_json(a)
    report_on(dead(model)).to_json(b)
    assert main(["compare", str(a), str(b)]) == 0
    assert "DEAD in 4" in capsys.readouterr().out
    assert main(["compare", str(a), str(tmp_path / "c.json")]) == 2
    assert "there is no file" in capsys.readouterr().err
    a.write_text("{}")
    assert main(["compare", str(a), str(b)]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_of_many_issues_and_edges_twelve_are_told() -> None:
    issues = tuple(make_issue(layer=f"fc{i}") for i in range(20))
    edges = tuple((f"a{i}", "loss") for i in range(15))
    graph = LayerGraph.from_flows({}, {}).compare(LayerGraph.from_flows({}, {}))
    change = Comparison(
        numbers=(), common_shift=0.0, begun=issues, lasting=tuple((i, i) for i in issues),
        graph=attrs.evolve(graph, severed=edges),
    )  # fmt: skip
    lines = str(change).splitlines()
    assert lines.count("  ... 8 more") == 2
    assert len(lines) == 1 + 2 * 13 + 2
    assert lines[-1].endswith("a11 -> loss and 3 more")
