"""What attentions let their outputs see: against the derivative itself, in many ways of writing the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.functional.parts.texts import Texts
from gradflow.records import FlowRecord

WORDS, TIME = 12, 8


class Written(nn.Module):
    """Attention written out, with a mask added before the softmax."""

    def __init__(self, causal: bool, hidden: float = -math.inf) -> None:
        super().__init__()
        self.qkv, self.causal, self.hidden = nn.Linear(8, 24), causal, hidden

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) / 8**0.5
        if self.causal:
            scores = scores + torch.full((x.shape[1], x.shape[1]), self.hidden).triu(1)
        if pad is not None:
            scores = scores.masked_fill(pad[:, None], self.hidden)
        return scores.softmax(-1) @ v


class Fused(Written):
    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=self.causal)[:, 0]


class Ready(nn.Module):
    """nn.MultiheadAttention, whose positions come first."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.inner, self.causal = nn.MultiheadAttention(8, 2), causal

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        x = x.transpose(0, 1)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if self.causal else None
        return self.inner(x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=False)[0].transpose(
            0, 1
        )


class Language(nn.Module):
    def __init__(self, *attentions: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 8, padding_idx=padding), nn.Linear(8, WORDS)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for attention in self.attentions:
            x = x + attention(x, None if mask is None else mask == 0)
        return self.head(x)


def next_word(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def text() -> tuple[Tensor, Tensor]:
    words = torch.randint(1, WORDS, (4, TIME + 1))
    return words[:, :-1], words[:, 1:]


def record_of(model: nn.Module, batch: Callable[[], Any] = text, loss: Any = next_word) -> FlowRecord:
    return gf.analyze(model, batch, loss, steps=1, seed=0)


@pytest.mark.parametrize("kind", [Written, Fused, Ready])
def test_causal_attention_sees_exactly_nothing_later(kind: Any) -> None:
    record = record_of(Language(kind(True), kind(True)))
    assert [s.future for s in record.parts.sights] == [0.0, 0.0, 0.0]
    assert [s.whole for s in record.parts.sights] == [False, False, True]


@pytest.mark.parametrize("kind", [Written, Fused, Ready])
def test_a_leak_has_the_size_of_the_rest(kind: Any) -> None:
    first, second, model = record_of(Language(kind(True), kind(False))).parts.sights
    assert first.future == 0.0
    assert 0.3 < second.future < 0.95
    assert 0.1 < model.future < 0.95


def test_a_finite_mask_counts_as_well() -> None:
    assert record_of(Language(Written(True, -1e4), Written(True, -1e9))).parts.sights[0].future == 0.0
    assert record_of(Language(Written(True, -3.0))).parts.sights[0].future > 0.01  # hides next to nothing


def test_the_share_is_that_of_the_whole_jacobian() -> None:
    torch.manual_seed(0)
    module = Written(False)
    x = torch.randn(1, TIME, 8)
    rows = torch.autograd.functional.jacobian(module, x)[
        0, TIME // 2, :, 0
    ]  # (features, positions, features)
    assert isinstance(rows, Tensor)
    numbers = torch.cos(torch.arange(8.0) * 1.7 + 0.3)
    squares = torch.einsum("i,itj->tj", numbers, rows).square().sum(-1)
    expected = squares[TIME // 2 + 1 :].sum() / (squares.sum() - squares[TIME // 2])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.before = module, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    record = record_of(Model(), lambda: x.clone().requires_grad_(), lambda y: y.square().mean())
    assert record.parts.sights[0].future == pytest.approx(math.sqrt(float(expected)), rel=1e-4)


def padded() -> tuple[tuple[Tensor, Tensor], Tensor]:
    words, target = text()
    mask = (torch.arange(TIME) < torch.tensor([[TIME], [5], [4], [6]])).long()
    return (words * mask, mask), target


@pytest.mark.parametrize("kind", [Written, Ready])
def test_padding_is_known_from_a_mask_and_hidden_by_it(kind: Any) -> None:
    record = record_of(Language(kind(False)), padded)
    assert record.parts.sights[0].padding == 0.0
    assert record.parts.sights[0].padding_told


def test_a_mask_that_is_not_applied_lets_padding_be_seen() -> None:
    record = record_of(Language(Fused(False)), padded)
    assert record.parts.sights[0].padding > 0.1


def test_padding_is_known_from_the_embedding_too() -> None:
    def batch() -> tuple[Tensor, Tensor]:
        (words, _), target = padded()
        return words, target

    (sight, *_) = record_of(Language(Written(False), padding=0), batch).parts.sights
    assert sight.padding > 0.1
    assert not sight.padding_told
    assert math.isnan(record_of(Language(Written(False)), batch).parts.sights[0].padding)


def test_targets_that_are_not_the_next_words_are_not_taken_for_them() -> None:
    def same() -> tuple[Tensor, Tensor]:
        words, _ = text()
        return words, words

    for causal in (True, False):
        attention, model = record_of(Language(Written(causal)), same).parts.sights
        assert (attention.name, model.name, model.own) == ("attentions.0", "", True)
        assert (model.future == 0) == causal

    def alike() -> tuple[Tensor, Tensor]:  # one word over and over: next and same cannot be told apart
        return torch.ones(4, TIME, dtype=torch.long), torch.ones(4, TIME, dtype=torch.long)

    assert [s.name for s in record_of(Language(Written(False)), alike).parts.sights] == ["attentions.0"]


def test_targets_that_were_cut_or_filled_up_are_known() -> None:
    def cut(scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), target[:, :-1].flatten())

    def filled(scores: Tensor, target: Tensor) -> Tensor:
        target = target.clone()
        target[:, -1] = -100
        return next_word(scores, target)

    for loss in (cut, filled):
        assert record_of(Language(Written(False)), text, loss).parts.sights[-1].whole


def test_nothing_is_held_of_a_step() -> None:
    texts = Texts({})
    assert texts.padding() is None
    assert texts.shifted() is None


def test_whether_order_is_told_shows_in_equal_tokens() -> None:
    class Placed(Language):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            places = torch.arange(TIME).float()[:, None] / TIME
            x = self.embed(tokens) + places
            return self.head(x + self.attentions[0](x))

    assert record_of(Placed(Written(False))).parts.sights[-1].ordered
    assert record_of(Language(Written(True))).parts.sights[-1].ordered  # a mask tells the order as well
    assert not record_of(Language(Written(False))).parts.sights[-1].ordered


class Hiding(nn.Module):
    """A model that is told of padding by True, as `key_padding_mask` is, and may take it the wrong way."""

    def __init__(self, inverted: bool) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(11, 8), Written(False)
        self.inverted = inverted

    def forward(self, tokens: Tensor, pad: Tensor) -> Tensor:
        x = self.embed(tokens)
        return (x + self.attention(x, ~pad if self.inverted else pad)).mean(1)


@pytest.mark.parametrize("inverted", [False, True])
def test_true_may_stand_for_padding(inverted: bool) -> None:
    torch.manual_seed(0)
    pad = torch.arange(TIME) >= torch.tensor([[TIME], [5], [4], [6]])
    if inverted:
        pad[0, -1] = True  # else one text would see nothing
    tokens = torch.randint(1, 11, (4, TIME)).masked_fill(pad, 0)
    (found,) = gf.analyze(Hiding(inverted), [(tokens, pad)], lambda y: y.square().mean()).parts.sights
    assert found.padding_told
    assert (found.padding > 0.01) == inverted
