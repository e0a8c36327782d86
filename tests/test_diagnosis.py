"""`diagnose` is `analyze`, `detect` and `find_causes`, with what was asked for handed on to each."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import EmptyBatchesError, PipelineError
from gradflow.records import FlowRecord, Issue, IssueSeverity


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))


def make_batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(count)
    ]


def every_layer(record: FlowRecord) -> Iterable[Issue]:
    """Complain of everything, mildly."""
    for layer in record:
        yield Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=gf.IssueType.UNSTABLE,
            severity=IssueSeverity.LOW,
            description="It is there.",
            magnitude=1.0,
        )


def test_a_report_holds_what_the_three_functions_give() -> None:
    report = gf.diagnose(make_model(), make_batches(), nn.CrossEntropyLoss(), seed=3)
    record = gf.analyze(make_model(), make_batches(), nn.CrossEntropyLoss(), seed=3)
    assert report.record == record
    assert report.issues == gf.detect(record)
    assert report.causes == gf.find_causes(record, report.issues)
    assert report.ok


def test_a_pipeline_replaces_the_default_detectors() -> None:
    report = gf.diagnose(make_model(), make_batches(), nn.CrossEntropyLoss(), pipeline=every_layer)
    assert [issue.layer for issue in report.issues] == ["0", "1", "2", "3"]
    assert report.ok
    assert gf.diagnose(make_model(), make_batches(), nn.CrossEntropyLoss(), pipeline=[]).issues == ()


def test_a_wrong_pipeline_is_told_before_the_model_is_run() -> None:
    def draw() -> None:
        raise AssertionError("a batch was drawn")

    with pytest.raises(PipelineError, match="expected a pipeline, a detector"):
        gf.diagnose(make_model(), draw, nn.CrossEntropyLoss(), pipeline=3)


def test_every_option_reaches_the_measurement() -> None:
    model = make_model()
    seen: list[tuple[int, int]] = []
    report = gf.diagnose(
        model,
        make_batches(),
        nn.CrossEntropyLoss(),
        steps=3,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.5),
        seed=11,
        mode="eval",
        detail="full",
        transform="vjp",
        progress=lambda step, total: seen.append((step, total)),
    )
    told = report.record.provenance
    assert (told.requested_steps, told.optimizer, told.seed) == (3, "Adam", 11)
    assert (told.mode, told.detail, told.transform) == ("eval", "full", "vjp")
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_pipeline_that_needs_the_full_flow_gets_it() -> None:
    arguments = (make_model(), make_batches(1), nn.CrossEntropyLoss())
    full, cheap = (
        gf.diagnose(*arguments, pipeline=gf.pipelines.Pipeline("mine", every_layer, detail))
        for detail in ("full", "cheap")
    )
    assert full.record.provenance.detail == "full"
    assert cheap.record.provenance.detail == "cheap"


def test_it_looks_deeper_only_where_an_issue_is_undecided() -> None:
    def undecided(record: FlowRecord) -> Iterable[Issue]:
        measured = record.graph_record is not None and record.graph_record.measured
        yield Issue(
            layer="0",
            layer_type="Linear",
            issue_type=gf.IssueType.BOTTLENECK,
            severity=IssueSeverity.INFO,
            description="Decided." if measured else "Undecided.",
            magnitude=1.0,
            evidence=gf.Evidence(undecided=not measured),
        )

    arguments = (make_model(), make_batches(), nn.CrossEntropyLoss())
    plain, deep = (gf.diagnose(*arguments, pipeline=p) for p in (every_layer, undecided))
    assert plain.record.graph_record is not None
    assert not plain.record.graph_record.measured
    assert [issue.description for issue in deep.issues] == ["Decided."]


def test_errors_of_the_measurement_come_through() -> None:
    with pytest.raises(EmptyBatchesError, match="no batch"):
        gf.diagnose(make_model(), [], nn.CrossEntropyLoss())


def test_layer_graph_is_the_measured_graph_of_one_batch() -> None:
    graph = gf.layer_graph(make_model(), make_batches()[0], nn.CrossEntropyLoss())
    assert graph.measured
    assert {"0", "1", "2", "3", "loss"} <= set(graph)


def test_public_names_are_there_and_are_what_they_say() -> None:
    for name in gf.__all__:
        assert getattr(gf, name) is not None
    assert set(gf.__all__) <= set(dir(gf))
    assert gf.GradientIssue is gf.Issue
    with pytest.raises(AttributeError, match="module 'gradflow' has no attribute 'diagnoze'"):
        gf.diagnoze  # noqa: B018


def test_the_version_is_that_of_the_project() -> None:
    try:
        installed = importlib.metadata.version("gradient-flow")
    except importlib.metadata.PackageNotFoundError:
        assert gf.__version__ == "0+unknown"
        return
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert gf.__version__ == installed
    assert f'\nversion = "{installed}"\n' in project


@pytest.mark.parametrize(
    "imports",
    [
        "import gradflow",
        "import gradflow; import gradflow.detect.compose",
        "from gradflow.detect import vanishing; import gradflow",
        "import gradflow; gradflow.detect; from gradflow.detect import vanishing",
    ],
)
def test_detect_is_the_function_whoever_imports_the_subpackage_first(imports: str) -> None:
    check = "import sys; assert gradflow.detect is sys.modules['gradflow.detect'].detect"
    check += "; from gradflow import detect; assert detect is gradflow.detect"
    done = subprocess.run([sys.executable, "-W", "error", "-c", f"{imports}; {check}"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_record_is_judged_once() -> None:
    seen: list[gf.FlowRecord] = []

    def counting(record: gf.FlowRecord) -> list[gf.Issue]:
        seen.append(record)
        return []

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    report = gf.diagnose(
        model, lambda: torch.randn(8, 4), lambda y: y.square().mean(), steps=3, pipeline=counting
    )
    assert seen == [report.record]
