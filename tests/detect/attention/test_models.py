"""Models whose attention is sick are found by name; healthy ones, and those that learned, are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.pipelines import transformer
from tests.detect.attention.detectors import OWN
from tests.functional.attention.models import (
    GPT,
    HUGGING_FACE,
    Attention,
    gpt,
    hugging_face,
    token_loss,
    tokens,
)

SERIOUS = gf.IssueSeverity.MEDIUM


SAID = {
    "collapsed": "attention has collapsed",
    "saturated": "softmax passes less",
    "growing scores": "scores grow",
    "alike": "have become one",
    "read alike": "the same at all of its",
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


class Cross(nn.Module):
    """Cross attention with one projection for keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, memory: Tensor, _: Tensor) -> tuple[Tensor]:
        return (F.scaled_dot_product_attention(self.q(x), *self.kv(memory).chunk(2, -1)),)


class Captioner(nn.Module):
    """Words that look at a picture by cross attention: at its regions, at one vector, or at that repeated."""

    def __init__(self, way: str, look: str, width: int = 24) -> None:
        super().__init__()
        self.look = look
        self.words, self.regions = nn.Embedding(7, width), nn.Conv2d(3, width, 2, stride=2)
        self.places = nn.Parameter(torch.randn(9, width))
        ways = {
            "module": lambda: nn.MultiheadAttention(width, 3, batch_first=True),
            "own": lambda: Cross(width),
        }
        self.cross = ways[way]()
        self.score = nn.Linear(width, 7)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        words, picture = self.words(x[1]), self.regions(x[0]).flatten(2).mT
        memory = picture + self.places if self.look == "regions" else picture.mean(1, keepdim=True)
        if self.look == "repeated":
            memory = memory.repeat(1, 9, 1)
        return self.score(words + self.cross(words, memory, memory)[0])


@pytest.mark.parametrize("way", ["module", "own"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_one_vector_that_is_repeated_is_no_memory_of_many_positions(way: str, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(8, 3, 6, 6, generator=g), torch.randint(7, (8, 5), generator=g))

    def told(look: str) -> list[tuple[str, str, str]]:
        torch.manual_seed(0)
        model = Captioner(way, look)
        loss = lambda y: scale * F.cross_entropy(y.flatten(0, 1), batch[1].roll(1, 1).flatten())  # noqa: E731
        return serious(model, [batch], loss, optimizer=adam(model))

    assert [kind for _, _, kind in told("repeated")] == ["read alike"]
    assert told("regions") == []
    assert told("one") == []
