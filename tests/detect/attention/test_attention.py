"""Issues of attention in records made by hand: each at its threshold, and not where it may be learning."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from gradflow.detect import (
    collapsed_attention,
    collapsed_rank,
    growing_logits,
    idle_branches,
    redundant_heads,
    saturated_attention,
    unbalanced_attention,
)
from gradflow.functional import attention
from gradflow.pipelines import transformer
from gradflow.records import (
    AttentionGradients,
    AttentionRecord,
    AttentionScores,
    BranchRecord,
    FlowRecord,
    KnowledgeRecord,
    Provenance,
    TransformerRecord,
)
from tests.detect.attention.detectors import OWN

LOOKS, HEADS = 4, 4


# ----------------------------------------------------------------------------- records made by hand


def layer(name: str = "attn", **fields: Any) -> AttentionRecord:
    """Return the record of a healthy layer of four heads, with other numbers where they are given."""
    usual = {
        "entropy": 2.0, "entropy_share": 0.9, "max_weight": 0.3, "first_weight": 0.1, "slope": 0.9,
        "saturated_share": 0.0, "logit_std": 1.0, "logit_peak": 3.0, "head_output": 1.0, "head_grad": 1.0,
        "nearest_head": 0.3, "num_keys": 9.0, "head_diversity": 0.35, "input_residual": 0.9,
        "output_residual": 0.5, "query_norm": 1.0, "key_norm": 1.0, "value_norm": 1.0, "query_grad": 0.1,
        "key_grad": 0.1, "value_grad": 0.5, "output_grad": 0.5, "branch_share": 0.3,
    }  # fmt: skip
    by_head = list(usual)[:11]
    arrays = {
        key: np.broadcast_to(
            np.asarray(fields.pop(key, value), dtype=float).reshape(-1, 1)
            if key in by_head and np.ndim(fields.get(key, value)) < 2
            else np.asarray(fields.pop(key, value), dtype=float),
            (LOOKS, HEADS) if key in by_head else (LOOKS,),
        )
        for key, value in usual.items()
    }
    arrays |= fields

    def taken(kind: type) -> dict[str, Any]:
        return {f.name: arrays.pop(f.name) for f in attrs.fields(kind) if f.name in arrays}

    return AttentionRecord(
        name=name,
        module=name,
        type="Attention",
        op="softmax",
        num_heads=HEADS,
        num_queries=9,
        scores=AttentionScores(**taken(AttentionScores)),
        gradients=AttentionGradients(**taken(AttentionGradients)),
        **arrays,
    )


def record_of(*layers: AttentionRecord, losses: Any = (4.0, 4.0, 4.0, 4.0), **fields: Any) -> FlowRecord:
    optimizer = fields.pop("optimizer", "Adam")
    return FlowRecord(
        steps=len(losses),
        losses=np.array(losses),
        layers=(),
        parameters=(),
        transformer=TransformerRecord(steps=range(LOOKS), attention=layers, **fields),
        provenance=Provenance(optimizer=optimizer, learning_rates=(0.1,) if optimizer else ()),
    )


def found(detector: Any, *layers: AttentionRecord, **fields: Any) -> list[tuple[str, str]]:
    return [(i.layer, i.severity.value) for i in detector(record_of(*layers, **fields))]


FALLING = (4.0, 3.5, 3.0, 2.5)


def test_a_healthy_record_and_one_without_attention_have_no_issue() -> None:
    for detector in OWN:
        assert found(detector, layer(), layer("other")) == []
        assert found(detector) == []


def test_collapse_is_told_where_half_of_the_heads_have_collapsed() -> None:
    sick = layer("b", entropy_share=np.array([[0.9, 0.9, 0.1, 0.1]] * LOOKS))
    assert found(collapsed_attention(), layer("a"), sick) == [("b", "MEDIUM")]
    one = layer(entropy_share=np.array([[0.9, 0.9, 0.9, 0.01]] * LOOKS))
    assert found(collapsed_attention(), one) == []
    assert found(collapsed_attention(), layer(entropy_share=0.01)) == [("attn", "HIGH")]
    assert found(collapsed_attention(0.005), layer(entropy_share=0.01)) == []


def test_collapse_that_came_with_a_falling_loss_may_be_learning() -> None:
    sharper = layer(entropy_share=[0.9, 0.6, 0.01, 0.01])
    assert found(collapsed_attention(), sharper, losses=FALLING) == [("attn", "LOW")]
    assert found(collapsed_attention(), sharper) == [("attn", "HIGH")]
    assert found(collapsed_attention(), sharper, losses=FALLING, optimizer="") == [("attn", "HIGH")]
    assert found(collapsed_attention(), sharper, losses=(2.5, 90.0, 3.0, 2.5)) == [("attn", "HIGH")]
    assert found(collapsed_attention(), layer(entropy_share=0.01), losses=FALLING) == [("attn", "HIGH")]


@pytest.mark.parametrize(("left", "severity"), [(0.6, "LOW"), (0.9, "HIGH")])
def test_collapse_within_a_run_that_teaches_the_model(left: float, severity: str) -> None:
    known = KnowledgeRecord(step=3, loss=1.7, shuffled=1.7 / left)
    sharper, losses = layer(entropy_share=[0.9, 0.6, 0.01, 0.01]), (2.0, 1.9, 1.8, 1.7)
    record = attrs.evolve(record_of(sharper, losses=losses), knowledge=known)
    assert [issue.severity.value for issue in collapsed_attention()(record)] == [severity]


def test_heads_that_rest_on_the_first_key_are_left_out() -> None:
    resting = {"entropy_share": 0.01, "saturated_share": 1.0, "first_weight": 0.95}
    for detector in (collapsed_attention(), saturated_attention()):
        assert found(detector, layer(**resting)) == []
    half = layer(first_weight=np.array([[0.9, 0.9, 0.1, 0.1]] * LOOKS), entropy_share=0.01)
    assert found(collapsed_attention(), half) == [("attn", "HIGH")]


def test_saturation_by_the_share_of_rows() -> None:
    for share, expected in ((0.4, []), (0.6, [("attn", "MEDIUM")]), (0.9, [("attn", "HIGH")])):
        assert found(saturated_attention(), layer(saturated_share=share)) == expected
    risen = layer(saturated_share=[0.0, 0.5, 0.9, 0.9])
    assert found(saturated_attention(), risen, losses=FALLING) == [("attn", "LOW")]


def test_growing_scores_need_an_optimizer_growth_and_size() -> None:
    grown = layer(logit_std=[1.0, 5.0, 15.0, 15.0])
    assert found(growing_logits(), grown) == [("attn", "MEDIUM")]
    assert found(growing_logits(), grown, optimizer="") == []
    assert found(growing_logits(), grown, losses=FALLING) == [("attn", "LOW")]
    assert found(growing_logits(), layer(logit_std=[1, 9, 80, 80]), losses=FALLING) == [("attn", "HIGH")]
    assert found(growing_logits(), layer(logit_std=[8, 9, 15, 15])) == []
    assert found(growing_logits(), layer(logit_std=[0.1, 1, 3, 3])) == []


def test_positions_that_become_one_are_told_at_the_first_layer_they_enter() -> None:
    depth = [layer(f"l{i}", input_residual=r) for i, r in enumerate((0.9, 0.3, 5e-3, 1e-5))]
    assert found(collapsed_rank(), *depth) == [("l2", "MEDIUM")]
    assert found(collapsed_rank(), *depth[:2], depth[3]) == [("l3", "HIGH")]
    assert found(collapsed_rank(), *depth[2:]) == []  # alike from the start
    unknown = layer("q", input_residual=np.nan)
    assert found(collapsed_rank(), unknown, depth[0], unknown) == []


def test_what_is_read_is_told_where_no_score_differs_and_queries_do() -> None:
    flat = {"logit_peak": 1e-7, "query_grad": 1e-9, "key_grad": 1e-9}
    assert found(collapsed_rank(), layer("a"), layer("b", **flat), layer("c", **flat)) == [("b", "HIGH")]
    for other in (
        {"logit_peak": [1e-7, 1e-7, 1e-7, 1e-2]},  # it has come to tell them apart
        {"key_grad": 0.1}, {"query_grad": 0.1},  # keys or queries that start at zero, and learn
        {"key_norm": 0.0}, {"query_norm": 0.0},
        {"num_keys": 1.0},  # one key is what it is meant to read
        {"input_residual": 1e-3}, {"input_residual": np.nan},  # the queries are one themselves
        {"value_grad": 0.0}, {"value_grad": np.nan},
    ):  # fmt: skip
        assert found(collapsed_rank(), layer(**(flat | other))) == []


def test_dead_heads() -> None:
    heads = np.array([[1.0, 1.0, 1.0, 0.0]] * LOOKS)
    assert found(redundant_heads(), layer(head_output=heads)) == [("attn", "LOW")]
    heads = np.array([[1.0, 1.0, 1e-9, 0.0]] * LOOKS)
    (issue,) = redundant_heads()(record_of(layer(head_grad=heads)))
    assert (issue.severity.value, issue.issue_type.value) == ("MEDIUM", "DEAD")
    assert issue.metrics["heads"] == (2, 3)
    assert found(redundant_heads(), layer(head_grad=0.0)) == []  # an output projection that starts at zero


def test_duplicate_heads_and_those_that_are_alike_because_scores_are_small() -> None:
    twins = np.array([[0.0, 0.0, 0.3, 0.3]] * LOOKS)
    (issue,) = redundant_heads()(record_of(layer(nearest_head=twins)))
    assert (issue.severity.value, issue.issue_type.value) == ("MEDIUM", "BOTTLENECK")
    assert issue.metrics["heads"] == (0, 1)
    assert found(redundant_heads(), layer(nearest_head=1e-3, logit_std=0.01)) == []
    assert found(redundant_heads(), layer(nearest_head=0.0, entropy_share=0.05)) == []
    assert found(redundant_heads(), layer(nearest_head=0.03)) == []


def test_unbalanced_gradients() -> None:
    for between, expected in ((50.0, []), (200.0, [("attn", "MEDIUM")]), (2e3, [("attn", "HIGH")])):
        assert found(unbalanced_attention(), layer(query_grad=0.1, key_grad=0.1 * between)) == expected
        assert found(unbalanced_attention(), layer(key_grad=0.1, query_grad=0.1 * between)) == expected
    far = {"value_grad": 1e4}
    assert found(unbalanced_attention(), layer(**far)) == [("attn", "LOW")]
    assert found(unbalanced_attention(), layer(**far, logit_std=0.01)) == []  # queries and keys start small
    assert found(unbalanced_attention(), layer(**far, slope=0.0)) == []  # saturated
    assert found(unbalanced_attention(), layer(key_grad=1e3, input_residual=0.01)) == []  # merged positions
    assert found(unbalanced_attention(), layer(key_grad=np.nan)) == []


@pytest.mark.parametrize(("first", "developed"), [(0.1, True), (200.0, False), (np.nan, False)])
def test_gradients_that_training_has_put_out_of_balance(first: float, developed: bool) -> None:
    keys = np.full((LOOKS,), 200.0)
    keys[:2] = first
    (issue,) = unbalanced_attention()(record_of(layer(query_grad=0.1, key_grad=keys)))
    assert issue.evidence.developed is developed


@pytest.mark.parametrize(
    ("share", "optimizer", "expected"),
    [
        ([1e-6] * 4, "Adam", [("f", "MEDIUM")]),
        ([0.0] * 4, "Adam", [("f", "MEDIUM")]),
        ([1e-6] * 4, "", [("f", "INFO")]),
        ([0.0, 1e-6, 1e-5, 5e-5], "Adam", []),  # a zero start, on its way
        ([1e-3] * 4, "Adam", []),
        ([np.nan] * 4, "Adam", []),
    ],
)
def test_idle_branches(share: list[float], optimizer: str, expected: list[tuple[str, str]]) -> None:
    branches = (BranchRecord(name="f", type="MLP", share=np.array(share)),)
    assert found(idle_branches(), branches=branches, optimizer=optimizer) == expected


def test_a_branch_is_judged_after_some_updates() -> None:
    branches = (BranchRecord(name="f", type="MLP", share=np.zeros(4)),)
    assert found(idle_branches(), branches=branches, losses=(4.0, 4.0)) == [("f", "INFO")]


# ----------------------------------------------------------------------------- fields and page


def test_fields_of_the_record_made_by_hand_are_all_fields() -> None:
    assert {f.name for f in attrs.fields(AttentionRecord)} <= {f.name for f in attrs.fields(type(layer()))}
    assert attention() in transformer().measurements


PAGE = (Path(__file__).parents[3] / "docs" / "detectors.md").read_text(encoding="utf-8")


FACTORIES = [
    collapsed_attention, saturated_attention, growing_logits, collapsed_rank, redundant_heads,
    unbalanced_attention, idle_branches,
]  # fmt: skip


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__name__)
def test_page_and_docstring_tell_measure_reason_and_thresholds(factory: Callable[..., Any]) -> None:
    section = PAGE.split(f"\n### {factory.__name__}\n")[1].split("\n### ")[0].split("\n## ")[0]
    stated = re.findall(r"^\| `(\w+)` \| ([\d.e+-]+) \| (.+) \|$", section, re.M)
    defaults = {name: p.default for name, p in inspect.signature(factory).parameters.items()}
    assert {name: float(value) for name, value, _ in stated} == defaults
    text = inspect.getdoc(factory) or ""
    for part in ("Measured", "Why this is evidence", "Looks alike and is not"):
        assert part in text
        assert f"*{part.replace('this', 'it')}*" in section
    for name in defaults:
        assert re.search(rf"^    {name}: ", text, re.M), name
