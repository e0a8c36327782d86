"""Figures of records: what is drawn is what was measured, axes come back, and gaps are told in words."""

from __future__ import annotations

import sys

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import RecordInputError, UnknownLayerError
from gradflow.records import FlowRecord, IssueType, TrialRecord, TrialVerdict
from gradflow.report import Report
from tests.samples import chain_record, layer_record, make_issue, parameter_record

matplotlib = pytest.importorskip("matplotlib")
plots = pytest.importorskip("gradflow.report.plots")


class Both(nn.Module):
    """A recurrent layer, attention behind it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rnn(x)[0]
        return self.head(self.attention(x, x, x)[0][:, -1])


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    model = Both()
    data = [(torch.randn(8, 6, 4), torch.randint(0, 2, (8,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return gf.diagnose(model, data, nn.CrossEntropyLoss(), optimizer=optimizer, steps=3)


def said(ax) -> str:
    return " ".join(text.get_text() for text in ax.texts)


def test_curves_are_the_numbers_of_the_record(report: Report) -> None:
    record = report.record
    assert plots.plot_loss(report).lines[0].get_ydata().tolist() == record.losses.tolist()
    norms = plots.plot_gradient_norm(record).lines[0].get_ydata()
    squares = sum(np.square(p.grad_norm) for p in record.parameters)
    assert np.allclose(norms, np.sqrt(squares))
    (recurrence,) = record.recurrences
    ax = plots.plot_through_time(report, "rnn")
    assert np.allclose(ax.lines[0].get_ydata(), np.nanmean(recurrence.levels[0].gradient_profile, axis=0))
    assert ax.get_yscale() == "log"
    with pytest.raises(UnknownLayerError, match="no entry named 'lstm'"):
        plots.plot_through_time(report, "lstm")


def test_grids_are_the_numbers_of_the_record(report: Report) -> None:
    record = report.record
    image = plots.plot_grid(report).images[0].get_array()
    assert image.shape == (len(record.layers), record.steps)
    assert np.allclose(image, np.log10([layer.grad_rms for layer in record.layers]))
    assert record.updates is not None
    ratios = plots.plot_grid(record, "updates").images[0].get_array()
    drawn = np.log10(np.array([p.ratio for p in record.updates.parameters]))
    assert np.allclose(np.ma.filled(ratios, np.nan), np.clip(drawn, -6.0, 0.0), equal_nan=True)
    entropy = plots.plot_attention(report).images[0].get_array()
    assert np.allclose(entropy[0], np.median(record.transformer.attention[0].entropy_share, axis=0))
    assert plots.plot_attention(report, "gradient").images[0].get_array().max() == 1.0
    with pytest.raises(ValueError, match="expected number to be one of gradient, share, activity, updates"):
        plots.plot_grid(report, "norm")
    with pytest.raises(ValueError, match="expected number to be one of entropy, first, gradient, got 'rank'"):
        plots.plot_attention(report, "rank")


def test_the_flow_marks_issues_and_zeros() -> None:
    record = chain_record(depth=4, steps=3)
    flat = layer_record("dead", [0.0, 0.0, 0.0], order=9)
    record = FlowRecord(
        steps=3, losses=record.losses, layers=(*record.layers, flat), parameters=record.parameters
    )
    ax = plots.plot_flow(Report(record=record, issues=[make_issue("fc1"), make_issue("elsewhere")]))
    middles = [np.median(layer.grad_rms) for layer in record.layers[:-1]]
    assert np.allclose(ax.lines[0].get_ydata()[:-1], middles)
    assert [line.get_label() for line in ax.lines] == ["median over the steps", "exactly zero"]
    assert [text.get_text() for text in ax.texts] == ["VANISHING"]
    assert len(plots.plot_flow(record).texts) == 0


def test_axes_that_are_given_are_drawn_into_and_come_back(report: Report) -> None:
    from matplotlib.figure import Figure

    for draw in (plots.plot_loss, plots.plot_flow, plots.plot_grid, plots.plot_attention):
        figure = Figure()
        ax = figure.add_subplot()
        assert draw(report, ax=ax) is ax
        ax.set_title("mine")
        assert len(ax.lines) + len(ax.images) > 0


def test_a_report_at_a_glance_has_a_panel_for_all_that_was_measured(report: Report, tmp_path) -> None:
    figure = report.plot(tmp_path / "report.png")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    told = [title for title in titles if title]
    assert told == [
        "Gradient at every layer", "Gradient rms", "Loss", "Gradient norm of all parameters", "Update ratio",
        "Entropy, as a share of its maximum", "Gradient through time: rnn (GRU)",
    ]  # fmt: skip
    assert (tmp_path / "report.png").stat().st_size > 20_000
    names = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(names) == len(report.record.layers)
    with pytest.raises(RecordInputError, match="plot_report: expected a Report, got FlowRecord"):
        plots.plot_report(report.record)


def test_names_along_an_axis_do_not_overlap() -> None:
    layers = [layer_record(f"blocks.{i}.fc", [1.0, 2.0], order=i) for i in range(1000)]
    record = FlowRecord(steps=2, losses=[1.0, 1.0], layers=layers, parameters=())
    figure = Report(record=record).plot()
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[1].get_yticklabels()]
    heights = sorted((box.y0, box.y1) for box in boxes)
    assert len(boxes) > 8
    assert all(low[1] <= high[0] + 1 for low, high in zip(heights, heights[1:], strict=False))


def trial(**fields) -> TrialRecord:
    values = {"remedy": "clip", "words": "clip", "code": "clip()", "layer": "fc", "steps": 3,
              "issue_type": IssueType.EXPLODING, "verdict": TrialVerdict.HELPS,
              "losses_without": np.empty((0, 0)), "losses_with": np.empty((0, 0))}  # fmt: skip
    return TrialRecord(**{**values, **fields})


def test_a_trial_shows_both_arms() -> None:
    without, treated = (
        np.array([[3.0, 5.0], [4.0, 4.0], [5.0, 5.0]]),
        np.array([[3.0, 5.0], [2.0, 2.0], [1.0, 1.0]]),
    )
    ax = plots.plot_trial(trial(losses_without=without, losses_with=treated))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[4.0, 4.0, 5.0], [4.0, 2.0, 1.0]]
    assert [line.get_label() for line in ax.lines] == ["without", "clip"]
    assert len(ax.collections) == 2
    assert "has no weight" in said(plots.plot_trial(trial(steps=0, why="has no weight")))
    with pytest.raises(RecordInputError, match="plot_trial: expected a TrialRecord, got str"):
        plots.plot_trial("clip")


def test_actions_of_a_policy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [(torch.randn(16, 4), torch.randint(0, 3, (16,))) for _ in range(3)]
    record = gf.diagnose(model, data, nn.CrossEntropyLoss(), steps=3, pipeline=gf.pipelines.policy()).record
    assert record.policy is not None
    ax = plots.plot_actions(record)
    assert np.allclose(ax.lines[0].get_ydata(), record.policy.distributions[0].entropy_share)
    with pytest.raises(RecordInputError, match=r"number of one of 1 distributions, from 0, got 3"):
        plots.plot_actions(record, 3)


def test_what_was_not_measured_is_said() -> None:
    empty = FlowRecord(steps=1, losses=[float("nan")], layers=(), parameters=())
    assert said(plots.plot_loss(empty)) == "nothing finite was measured"
    assert said(plots.plot_gradient_norm(empty)) == "nothing finite was measured"
    assert said(plots.plot_flow(empty)) == "no gradient was measured at any layer"
    assert said(plots.plot_grid(empty, "updates")) == "Update ratio: not measured"
    assert "pipelines.transformer()" in said(plots.plot_attention(empty))
    assert "pipelines.recurrent()" in said(plots.plot_through_time(empty))
    assert "pipelines.policy()" in said(plots.plot_actions(empty))
    one = FlowRecord(steps=1, losses=[0.5], layers=(), parameters=(parameter_record("w", [0.0]),))
    assert plots.plot_loss(one).lines[0].get_marker() == "o"  # a line of one point cannot be seen
    assert said(plots.plot_gradient_norm(one)) == "nothing finite was measured"


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordInputError, match=r"plot_loss: expected a Report or a FlowRecord.* got dict"):
        plots.plot_loss({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plot_loss needs matplotlib.*pip install "gradient-flow\[plot\]"'):
        plots.plot_loss(chain_record())


def test_a_graph_draws_itself_and_a_record_compares_itself(report: Report, tmp_path) -> None:
    figure = report.record.graph.draw(tmp_path / "graph.svg", level="full")
    assert (tmp_path / "graph.svg").exists()
    assert figure.axes
    assert report.record.compare(report.record) == gf.compare(report.record, report.record)


def test_names_with_dollars_are_shown_as_they_are(tmp_path) -> None:
    record = chain_record(2, 2)
    odd = attrs.evolve(record, layers=[attrs.evolve(layer, name=f"$x_{{{layer.name}$") for layer in record])
    figure = Report(record=odd, issues=(), causes=()).plot(tmp_path / "odd.png")
    assert r"\$x_{" in figure.axes[0].get_xticklabels()[0].get_text()


def test_axes_of_several_plots_are_refused() -> None:
    figure = matplotlib.figure.Figure()
    record = chain_record(2, 2)
    with pytest.raises(TypeError, match=r"plot_loss: expected ax .* got ndarray. .* pass one: ax=axes\[0\]"):
        plots.plot_loss(record, ax=figure.subplots(1, 2))
    with pytest.raises(TypeError, match="plot_loss: expected ax .* got axes of the projection 'polar'"):
        plots.plot_loss(record, ax=figure.add_subplot(projection="polar"))
