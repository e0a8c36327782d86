"""The class interface for transformers: what it documents exists, is finite, and moves the right way."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch

import gradflow as gf
from gradflow.errors import NotAnalyzedError
from gradflow.pipelines import flow, transformer
from gradflow.report import attention_text, summary_text
from tests.example_modules import example_module
from tests.functional.attention.models import gpt, token_loss, tokens
from tests.functional.snapshots import difference, snapshot


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return example_module("collapsed_attention")


def analysed(built: tuple[Any, ...], steps: int = 6) -> Any:
    model, batches, loss_fn, optimizer = built
    return gf.TransformerAnalyzer(model).analyze(batches, loss_fn, steps=steps, optimizer=optimizer)


def test_the_numbers_of_the_example_are_finite_and_tell_the_sick_model_from_its_repair(
    example: ModuleType,
) -> None:
    sick, repaired = analysed(example.build()), analysed(example.repaired())
    names = ["blocks.0.attention", "blocks.1.attention"]
    assert list(sick.attention_stats) == list(repaired.attention_stats) == names
    for name in names:
        a, b = sick.attention_stats[name], repaired.attention_stats[name]
        assert all(math.isfinite(v) for stats in (a, b) for v in attrs.astuple(stats))
        assert a.mean_entropy < 0.2 < 2.5 < b.mean_entropy
        assert a.entropy_share < 0.1 < 0.8 < b.entropy_share
        assert a.max_attention > 0.9 > 0.5 > b.max_attention
        assert a.head_diversity > b.head_diversity  # each head on another key
        assert a.saturated_share > 0.5 > b.saturated_share
        assert a.slope < b.slope
        assert a.logit_std > 5 > b.logit_std
        assert a.rank_collapse > b.rank_collapse  # equal weights give all positions the same
        # 1 − Σp² of what comes back passes to queries and keys
        assert a.query_grad_norm / a.value_grad_norm > 0
    found = {
        (i.issue_type.value, i.layer) for i in sick.gradient_issues if i.severity >= gf.IssueSeverity.MEDIUM
    }
    assert found == {("SATURATION", name) for name in names}
    assert not [i for i in repaired.gradient_issues if i.severity >= gf.IssueSeverity.MEDIUM]


def test_results_are_those_of_diagnose_and_no_trace_is_left() -> None:
    model = gpt(dropout=0.1)
    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, optimizer)
    analyzer = gf.TransformerAnalyzer(model)
    torch.manual_seed(3)
    results = analyzer.analyze(input_fn=tokens, loss_fn=token_loss, steps=4, optimizer=optimizer)
    torch.manual_seed(3)
    report = gf.diagnose(model, tokens, token_loss, steps=4, optimizer=optimizer, pipeline=transformer())
    assert results.report == report
    assert analyzer.record == report.record
    assert results.gradient_issues == report.issues
    assert results.attention_stats == report.record.transformer.stats
    before["process"] = snapshot(model)["process"]  # the seeds above
    assert difference(before, snapshot(model, optimizer)) == ""


def test_the_summary_tells_issues_and_a_line_a_layer(capsys: pytest.CaptureFixture[str]) -> None:
    analyzer = gf.TransformerAnalyzer(gpt())
    results = analyzer.analyze(tokens, token_loss, steps=2)
    analyzer.print_summary(results)
    shown = capsys.readouterr().out
    assert shown == f"{summary_text(results.gradient_issues)}\n\n{attention_text(results.attention_stats)}\n"
    table = shown.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table] == ["attention", "h.0.attn", "h.1.attn"]
    assert len({len(line) for line in table}) == 1
    assert f"{results.attention_stats['h.0.attn'].mean_entropy:.3f}" in table[1]


def test_a_model_without_attention_is_analysed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    analyzer = gf.TransformerAnalyzer(torch.nn.Linear(4, 2))
    results = analyzer.analyze(lambda: torch.randn(8, 4), lambda y: y.square().mean(), steps=2)
    assert results.attention_stats == {}
    analyzer.print_summary(results)
    assert capsys.readouterr().out.endswith("No attention was seen.\n")


def test_there_is_no_record_before_a_run() -> None:
    with pytest.raises(NotAnalyzedError, match="^TransformerAnalyzer: nothing was analysed yet"):
        gf.TransformerAnalyzer(gpt()).record  # noqa: B018


def test_the_pipeline_is_the_base_and_more() -> None:
    assert transformer().measurements[0] in transformer(flow(detail="full")).measurements
    assert transformer(flow(detail="full")).detail == "full"
    assert len(transformer().detectors) == len(flow().detectors) + 8
