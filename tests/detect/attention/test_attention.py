"""Attention that is sick is found and named; attention that only looks like it is not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
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
    Provenance,
    TransformerRecord,
)
from tests.functional.attention.models import (
    GPT,
    HUGGING_FACE,
    Attention,
    gpt,
    hugging_face,
    token_loss,
    tokens,
)

OWN = (
    collapsed_attention(),
    saturated_attention(),
    growing_logits(),
    collapsed_rank(),
    redundant_heads(),
    unbalanced_attention(),
    idle_branches(),
)
LOOKS, HEADS = 4, 4
SERIOUS = gf.IssueSeverity.MEDIUM

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


# ----------------------------------------------------------------------------- models


SAID = {
    "collapsed": "attention has collapsed",
    "saturated": "softmax passes less",
    "growing scores": "scores grow",
    "alike": "have become one",
    "dead heads": "heads are dead",
    "duplicate heads": "attend exactly like another",
    "unbalanced": "times smaller than at its",
    "idle branch": "residual branch",
}


def serious(
    model: nn.Module, batch: Any, loss: Any = token_loss, **options: Any
) -> list[tuple[str, str, str]]:
    options = {"steps": 6, "seed": 0, **options}
    report = gf.diagnose(model, lambda: batch, loss, pipeline=[*list(OWN), transformer()], **options)
    return [
        (i.issue_type.value, i.layer, next(kind for kind, words in SAID.items() if words in i.description))
        for i in gf.detect(report.record, list(OWN))
        if i.severity >= SERIOUS
    ]


def adam(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=rate)


@pytest.mark.parametrize("way", ["sdpa", "module", "merged"])
def test_scores_that_are_too_large_collapse_attention(way: str) -> None:
    model = gpt(way, sharper=1.0)
    with torch.no_grad():
        model.h[1].attn.qkv.weight[:16] *= 12.0
    issues = serious(model, tokens(8, 12))
    assert issues == [("SATURATION", "h.1.attn", "collapsed")]
    assert serious(gpt(way, sharper=1.0), tokens(8, 12)) == []


def test_verdicts_do_not_depend_on_the_loss_the_batch_or_the_dtype() -> None:
    def sick() -> GPT:
        model = gpt(sharper=1.0)
        with torch.no_grad():
            model.h[1].attn.qkv.weight[:16] *= 12.0
        return model

    expected = serious(sick(), tokens(8, 12))
    assert expected
    for scale in (1e-6, 1e6):
        assert serious(sick(), tokens(8, 12), lambda y, s=scale: s * token_loss(y)) == expected
    assert serious(sick(), tokens(64, 12)) == expected
    assert serious(sick().double(), tokens(8, 12)) == expected
    assert serious(sick().bfloat16(), tokens(8, 12), lambda y: token_loss(y.float())) == expected


def test_steps_that_are_too_large_drive_scores_up() -> None:
    model = gpt(sharper=1.0)
    issues = serious(model, tokens(8, 12), optimizer=adam(model, 1.0), steps=12)
    assert ("UNSTABLE", "h.0.attn", "growing scores") in issues
    calm = gpt(sharper=1.0)
    assert serious(calm, tokens(8, 12), optimizer=adam(calm), steps=12) == []


class Plain(nn.Module):
    """Attention layers with or without a way round them."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.embed, self.skip = nn.Embedding(11, 16), skip
        self.layers = nn.ModuleList(Attention("sdpa", 16) for _ in range(8))
        self.head = nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for attn in self.layers:
            h = h + attn(h) if self.skip else attn(h)
        return self.head(h)


def test_attention_alone_makes_all_positions_one() -> None:
    torch.manual_seed(0)
    issues = serious(Plain(skip=False), tokens(8, 12))
    assert [(kind, role) for kind, _, role in issues] == [("BOTTLENECK", "alike")]
    assert issues[0][1].startswith("layers.")
    assert serious(Plain(skip=True), tokens(8, 12)) == []


def copied_heads(model: GPT) -> None:
    weight, bias = model.h[0].attn.qkv.weight, model.h[0].attn.qkv.bias
    for part in (0, 8):
        weight[part + 4 : part + 8] = weight[part : part + 4]
        bias[part + 4 : part + 8] = bias[part : part + 4]


def silenced_head(model: GPT) -> None:
    model.h[0].attn.out.weight[:, :4] = 0.0


def torn_projections(model: GPT) -> None:
    for rows, factor in ((slice(0, 8), 1e3), (slice(8, 16), 1e-3)):
        model.h[0].attn.qkv.weight[rows] *= factor
        model.h[0].attn.qkv.bias[rows] *= factor


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (copied_heads, ("BOTTLENECK", "h.0.attn", "duplicate heads")),
        (silenced_head, ("DEAD", "h.0.attn", "dead heads")),
        (torn_projections, ("VANISHING", "h.0.attn", "unbalanced")),
    ],
)
def test_one_change_of_the_weights_one_issue(
    change: Callable[[GPT], None], expected: tuple[str, str, str]
) -> None:
    model = gpt()
    with torch.no_grad():
        change(model)
    assert serious(model, tokens(8, 12)) == [expected]
    assert serious(gpt(), tokens(8, 12)) == []


class Faint(nn.Module):
    """A block whose branch is scaled down by a constant, or by a gate that starts there and learns."""

    def __init__(self, *, constant: bool) -> None:
        super().__init__()
        self.inner, self.head = gpt(), nn.Linear(11, 11)
        self.branch, self.constant = nn.Linear(11, 11), constant
        self.gate = nn.Parameter(torch.full((), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = h + self.branch(h) * (1e-6 if self.constant else self.gate)
        return self.head(h)


def test_a_branch_that_carries_nothing_is_told_and_one_that_starts_small_is_not() -> None:
    model = Faint(constant=True)
    expected = [("DEAD", "branch", "idle branch")]
    assert serious(model, tokens(), optimizer=adam(model)) == expected
    gated = Faint(constant=False)
    assert serious(gated, tokens(), optimizer=adam(gated)) == []
    assert serious(Faint(constant=True), tokens()) == []  # without an optimizer nobody can know


class Lookup(nn.Module):
    """Looks up the token at the place that is asked for: solved by attention on one key."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(8, 32), nn.Embedding(8, 32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, words: Tensor, place: Tensor) -> Tensor:
        h = self.token(words) + self.place.weight
        return self.head(self.attn(self.place(place)[:, None], h, h, need_weights=False)[0][:, 0])


def test_attention_that_is_sharp_because_it_learned_is_no_illness() -> None:
    torch.manual_seed(0)
    model = Lookup()
    g = torch.Generator().manual_seed(0)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        words, place = torch.randint(0, 8, (64, 8), generator=g), torch.randint(0, 8, (64,), generator=g)
        return (words, place), words[torch.arange(64), place]

    report = gf.diagnose(
        model, batch, F.cross_entropy, steps=150, optimizer=adam(model), pipeline=transformer()
    )
    stats = report.record.transformer.stats["attn"]
    assert report.record.losses[-1] < 0.1
    assert stats.entropy_share < 0.15
    assert [i for i in gf.detect(report.record, list(OWN)) if i.severity >= SERIOUS] == []


@pytest.mark.parametrize("rate", [0.0, 1e-3])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_are_healthy_at_their_own_start(
    name: str, implementation: str, rate: float
) -> None:
    pytest.importorskip("transformers")
    model, batch = hugging_face(name, implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate) if rate else None
    report = gf.diagnose(
        model, lambda: batch, None, steps=6, optimizer=optimizer, pipeline=transformer(), seed=0
    )
    assert [issue for issue in report.issues if issue.severity >= SERIOUS] == []


@pytest.mark.parametrize("first", [True, False])
def test_pytorch_layers_are_healthy(first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=first)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(8, 32), encoder, nn.Linear(32, 4))
    for shape in ((8, 12, 8), (8, 1, 8)):  # a sequence of one position too
        report = gf.diagnose(
            model, lambda s=shape: torch.randn(*s), lambda y: (y[:, 0] - 1).square().mean(), steps=6,
            pipeline=transformer(), optimizer=adam(model, 1e-3), seed=0,
        )  # fmt: skip
        assert report.ok


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
