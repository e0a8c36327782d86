"""Attention is seen in any model, once, under its module's name, and equals what the model computes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import ModelInputError
from gradflow.functional import attention
from gradflow.functional.attention import scores
from gradflow.functional.attention.products import operands_of
from tests.functional.attention.models import (
    GPT,
    HUGGING_FACE,
    WAYS,
    Attention,
    gpt,
    hugging_face,
    tokens,
)
from tests.functional.snapshots import difference, snapshot

NAMES = {
    "gpt2": [f"transformer.h.{i}.attn" for i in (0, 1)],
    "bert": [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)],
    "llama": [f"model.layers.{i}.self_attn" for i in (0, 1)],
    "t5": [
        *(f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)),
        *(f"decoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)),
        *(f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)),
    ],
    "vit": [f"vit.layers.{i}.attention" for i in (0, 1)],
    "mixtral": [f"model.layers.{i}.self_attn" for i in (0, 1)],
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_against_the_attention_that_they_return(name: str, implementation: str) -> None:
    pytest.importorskip("transformers")
    model, batch = hugging_face(name, implementation)
    eager, _ = hugging_face(name, "eager")
    eager.load_state_dict(model.state_dict())
    found = gf.attention_weights(model.eval(), batch)
    with torch.no_grad():
        output = eager.eval()(**batch, output_attentions=True)
    parts = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    expected = [weights for part in parts for weights in getattr(output, part, None) or ()]
    assert set(found) == set(NAMES[name])
    assert len(found) == len(expected)
    for key, weights in zip(NAMES[name], expected, strict=True):
        assert found[key].shape == weights.shape
        assert float((found[key] - weights).abs().max()) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_attention_gives_the_same(way: str) -> None:
    expected = by_hand(gpt("module"), tokens())
    found = gf.attention_weights(gpt(way), tokens())
    assert list(found) == ["h.0.attn", "h.1.attn"]
    for name, weights in found.items():
        assert weights.shape == (3, 2, 6, 6)
        torch.testing.assert_close(weights.float(), expected[name], atol=1e-6, rtol=0)


def by_hand(model: GPT, batch: Tensor) -> dict[str, Tensor]:
    """The weights, written out once more."""
    found = {}
    with torch.no_grad():
        x = model.wte(batch) + model.wpe(torch.arange(batch.shape[1]))
        for i, block in enumerate(model.h):
            q, k, _ = (t.view(3, 6, 2, 4).transpose(1, 2) for t in block.attn.qkv(block.ln1(x)).chunk(3, -1))
            scores = torch.zeros(3, 2, 6, 6)
            for t in range(6):
                scores[:, :, t, : t + 1] = ((q[:, :, t, None] * k[:, :, : t + 1]).sum(-1) / 2).softmax(-1)
            found[f"h.{i}.attn"] = scores
            x = block(x)
    return found


MHA = [
    {"bias": bias, "add_bias_kv": kv, "add_zero_attn": zero, "batch_first": first, **dims}
    for bias, (kv, zero), first, dims in itertools.product(
        (True, False), ((False, False), (True, True)), (True, False), ({}, {"kdim": 6, "vdim": 5})
    )
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", MHA, ids=str)
@pytest.mark.parametrize("mask", ["", "boolean", "float", "by head"])
def test_multi_head_attention_against_its_own_weights(
    options: dict[str, Any], mask: str, need_weights: bool
) -> None:
    torch.manual_seed(0)
    inner = nn.MultiheadAttention(8, 2, dropout=0.3, **options)
    query, key, value = (torch.randn(3, n, d) for n, d in ((4, 8), (5, inner.kdim), (5, inner.vdim)))
    hidden = torch.rand(4, 5) > 0.6
    hidden[:, 0] = False
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    masks: dict[str, Any] = {
        "": {},
        "boolean": {"attn_mask": hidden, "key_padding_mask": padding},
        "float": {"attn_mask": torch.randn(4, 5), "key_padding_mask": -9.0 * padding.float()},
        "by head": {"attn_mask": hidden.repeat(6, 1, 1) & (torch.arange(6) > 2)[:, None, None]},
    }
    if not options["batch_first"]:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *batch: Tensor) -> Tensor:
            return self.inner(*batch, need_weights=need_weights, **masks[mask])[0]

    found = gf.attention_weights(Model(), (query, key, value))
    inner.eval()
    expected = inner(query, key, value, average_attn_weights=False, **masks[mask])[1]
    assert list(found) == ["inner"]
    torch.testing.assert_close(found["inner"].float(), expected.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_pytorch_encoder_and_decoder(training: bool, grad: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(training).requires_grad_(grad)
    found = gf.attention_weights(encoder, torch.randn(3, 5, 8))
    assert {name: tuple(w.shape) for name, w in found.items()} == {
        f"layers.{i}.self_attn": (3, 2, 5, 5) for i in (0, 1)
    }
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2).train(training)
    found = gf.attention_weights(decoder, (torch.randn(4, 3, 8), torch.randn(5, 3, 8)))
    assert {name: tuple(w.shape) for name, w in found.items()} == {
        f"layers.{i}.{kind}": (3, 2, 4, keys)
        for i in (0, 1)
        for kind, keys in (("self_attn", 4), ("multihead_attn", 5))
    }


class Grouped(nn.Module):
    """Grouped queries, `is_causal` with fewer queries than keys, two calls in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 2)).transpose(1, 2).split([4, 2, 2], 1)
        first = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5)
        second = F.scaled_dot_product_attention(q[:, :, :3], k, v, enable_gqa=True, is_causal=True)
        return first[:, :, :3] + second


def test_grouped_queries_top_left_alignment_and_several_in_one_module() -> None:
    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(2, 5, 8)
    found = gf.attention_weights(nn.Sequential(model), x)
    assert list(found) == ["0", "0@1"]
    q, k, _ = model.qkv(x).unflatten(-1, (-1, 2)).transpose(1, 2).split([4, 2, 2], 1)
    for head in range(4):
        expected = (q[:, head] @ k[:, head // 2].mT * 0.5).softmax(-1)
        torch.testing.assert_close(found["0"][:, head].float(), expected.detach(), atol=1e-6, rtol=0)
        scores = (q[:, head, :3] @ k[:, head // 2].mT / 2**0.5).masked_fill(
            torch.ones(3, 5, dtype=torch.bool).triu(1), -torch.inf
        )
        torch.testing.assert_close(
            found["0@1"][:, head].float(), scores.softmax(-1).detach(), atol=1e-6, rtol=0
        )


class Masked(nn.Module):
    """Fused attention with any mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.proj, self.mask = nn.Linear(4, 4), mask

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=self.mask)


def test_rows_in_which_every_key_is_hidden_are_zero_and_do_not_count() -> None:
    mask = torch.tensor([[False] * 3, [True, True, False], [True] * 3])
    for m in (mask, torch.zeros(3, 3).masked_fill(~mask, -torch.inf)):
        model = Masked(m)
        found = gf.attention_weights(model, torch.randn(2, 3, 4))[""]
        assert bool((found[:, :, 0] == 0).all())
        assert bool((found[:, :, 1, 2] == 0).all())
        record = gf.analyze(
            model, [torch.randn(2, 3, 4)], lambda y: y[:, 1:].sum(), measurements=[attention()]
        )
        layer = record.transformer[""]
        assert layer.num_keys.tolist() == [2.5]
        assert 0 < float(layer.entropy[0, 0]) < 1.1


def test_several_parts_of_a_batch_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gf.attention_weights(gpt(), tokens(5))
    monkeypatch.setattr(scores, "PART", 2 * 2 * 6 * 6)
    parts = gf.attention_weights(gpt(), tokens(5))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


class Router(nn.Module):
    """A softmax over experts, over classes, and over features: none of them is attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.classes = nn.Linear(8, 4), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        given = torch.stack([expert(x) for expert in self.experts], -2)
        mixed = (self.gate(x).softmax(-1)[..., None] * given).sum(-2)
        mixed = mixed + torch.einsum("bte,bted->btd", F.softmax(self.gate(x) / 2, -1), given)
        mixed = mixed + (torch.softmax(x @ self.weight, -1)[..., None, :] @ given)[..., 0, :]
        efficient = self.q(x).view(-1, 5, 2, 4).transpose(1, 2).softmax(-1) @ torch.ones(4, 4)
        return self.classes(mixed + efficient.transpose(1, 2).flatten(2)).softmax(-1)


def test_a_softmax_that_is_no_attention_is_not_taken_for_it() -> None:
    torch.manual_seed(0)
    model, x = Router(), torch.randn(2, 5, 8)
    assert gf.attention_weights(model, x) == {}
    record = gf.analyze(model, [x], lambda y: y[..., 0].mean(), measurements=[attention()])
    assert record.transformer.attention == ()
    assert not any("attention" in note for note in record.provenance.notes)


class Pooling(nn.Module):
    """One score per position, whose softmax over positions weights them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.score = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj(x)
        return (torch.softmax(self.score(torch.tanh(h)), 1).transpose(1, 2) @ h)[:, 0]


def test_scores_over_positions_that_a_linear_layer_gives_are_attention() -> None:
    torch.manual_seed(0)
    model, x = Pooling(), torch.randn(2, 5, 8)
    found = gf.attention_weights(model, x)
    expected = torch.softmax(model.score(torch.tanh(model.proj(x))), 1)[..., 0]
    torch.testing.assert_close(found[""][:, 0, 0], expected.detach())


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (F.elu(self.q(x)) + 1) @ ((F.elu(self.k(x)) + 1).mT @ x)


class AttentionStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.soft = LinearAttention(), Attention("sdpa")

    def forward(self, x: Tensor) -> Tensor:
        return self.soft(self.linear(x))


def test_what_is_called_attention_and_was_not_seen_is_named_in_a_note() -> None:
    model = AttentionStack()
    record = gf.analyze(
        model, [torch.randn(2, 5, 8)], lambda y: y.square().mean(), measurements=[attention()]
    )
    assert [a.name for a in record.transformer.attention] == ["soft"]
    notes = [n for n in record.provenance.notes if n.startswith("No attention was seen in ")]
    assert len(notes) == 1
    assert notes[0].startswith("No attention was seen in 'linear' (LinearAttention)")


def test_it_leaves_no_trace_and_dropout_does_not_show() -> None:
    model = gpt("module", dropout=0.5)
    before = snapshot(model)
    found = gf.attention_weights(model, tokens())
    assert difference(before, snapshot(model)) == ""
    for name, weights in gf.attention_weights(gpt("module"), tokens()).items():
        if name == "h.0.attn":  # dropout inside the first layer changes what enters the second
            torch.testing.assert_close(found[name], weights)
    once, again = (gf.attention_weights(model, tokens(), seed=3)["h.1.attn"] for _ in range(2))
    assert torch.equal(once, again)
    assert not once.requires_grad


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.count = Attention("module"), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.attn(x)
        torch.rand(1)
        raise RuntimeError("on purpose")


def test_it_leaves_no_trace_when_the_model_raises() -> None:
    model, batch = Raising(), torch.randn(2, 5, 8)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        gf.attention_weights(model, batch)
    assert difference(before, snapshot(model)) == ""


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(ModelInputError, match="model is a function, not a torch.nn.Module"):
        gf.attention_weights(lambda x: x, tokens())  # type: ignore[arg-type]


def test_other_precisions() -> None:
    exact = gf.attention_weights(gpt().double(), tokens())
    assert exact["h.0.attn"].dtype is torch.float64
    assert gf.attention_weights(gpt(), tokens())["h.0.attn"].dtype is torch.float32
    half = gf.attention_weights(gpt().to(torch.bfloat16), tokens())
    torch.testing.assert_close(half["h.0.attn"].double(), exact["h.0.attn"], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("equation", "shapes", "labels"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)], ("bij", "bjk", "bik")),
        ("bij,bjk", [(2, 3, 4), (2, 4, 5)], ("bij", "bjk", "ik")),
        ("...ij, ...jk -> ...ik", [(2, 3, 4), (4, 5)], ("αij", "jk", "αik")),
    ],
)
def test_axes_of_einsum(equation: str, shapes: list[tuple[int, ...]], labels: tuple[str, ...]) -> None:
    found = operands_of("einsum", (equation, *(torch.ones(s) for s in shapes)), {})
    assert found is not None
    assert (found[2].a, found[2].b, found[2].out) == labels


def test_other_products_are_left_alone() -> None:
    x = torch.ones(2, 2)
    assert operands_of("einsum", ("ii,ij->j", x, x), {}) is None
    assert operands_of("einsum", ("ij,jk,kl->il", x, x, x), {}) is None
    assert operands_of("einsum", (x, [0, 1], x, [1, 2]), {}) is None
    assert operands_of("matmul", (x,), {}) is None
    by_name = operands_of("matmul", (x,), {"other": x})
    assert by_name is not None
    assert (by_name[2].a, by_name[2].b, by_name[2].out) == ("ik", "kj", "ij")
