"""The measurement `attention()`: numbers by slow versions and plain autograd, and no trace is left."""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional import (
    attention,
    attention_statistics,
    attention_weights,
    head_distances,
    position_residual,
)
from gradflow.functional.attention.session import positions
from gradflow.records import AttentionGradients, AttentionRecord, AttentionScores, FlowRecord
from tests.functional.attention.models import (
    GPT,
    HUGGING_FACE,
    WAYS,
    Attention,
    gpt,
    hugging_face,
    measured,
    token_loss,
    tokens,
)
from tests.functional.snapshots import difference, snapshot

CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_those_of_the_weights(way: str) -> None:
    model, batch = gpt(way, dropout=0.2 if way in ("sdpa", "module") else 0.0), tokens()
    record = measured(model, batch, mode="eval")
    for name, weights in attention_weights(model.eval(), batch).items():
        found, layer = attention_statistics(weights, allowed=CAUSAL), record.transformer[name]
        for field in attrs.fields(type(found)):
            value = getattr(layer if hasattr(layer, field.name) else layer.scores, field.name)[0]
            expected = getattr(found, field.name)
            expected = float(expected.mean()) if field.name == "num_keys" else expected.tolist()
            assert value == pytest.approx(expected, abs=1e-5), field.name
        rows = weights.masked_fill((CAUSAL.sum(-1) < 2)[:, None], 0.0)
        distance = float(head_distances(rows)[0, 1])
        assert float(layer.head_diversity[0]) == pytest.approx(distance, abs=1e-6)
        assert layer.nearest_head[0].tolist() == pytest.approx([distance] * 2, abs=1e-6)
        assert (layer.num_heads, layer.num_queries, layer.type) == (2, 6, "Attention")


@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_norms_against_plain_autograd(way: str) -> None:
    """The same two blocks written out, with every tensor in question kept by its own hand."""
    model, batch = gpt(way), tokens()
    record = measured(model, batch)
    x = model.wte(batch) + model.wpe(torch.arange(6))
    kept: list[dict[str, Tensor]] = []
    for block in model.h:
        entered = block.ln1(x)
        q, k, v = (t.view(3, 6, 2, 4).transpose(1, 2) for t in block.attn.qkv(entered).chunk(3, -1))
        weights = (q @ k.mT / 2).masked_fill(~CAUSAL, -math.inf).softmax(-1)
        context = weights @ v
        y = block.attn.out(context.transpose(1, 2).reshape(3, 6, 8))
        kept.append({"query": q, "key": k, "value": v, "context": context, "output": y, "stream": x})
        kept[-1]["entered"] = entered
        x = x + y
        x = x + block.mlp(block.ln2(x))
    loss = token_loss(model.head(model.ln_f(x)))
    for i, tensors in enumerate(kept):
        layer = record.transformer[f"h.{i}.attn"]
        gradients = dict(
            zip(tensors, torch.autograd.grad(loss, list(tensors.values()), retain_graph=True), strict=True)
        )
        for name in ("query", "key", "value", "output"):
            value = float(getattr(layer.gradients, f"{name}_grad")[0])
            assert value == pytest.approx(float(gradients[name].norm()), rel=1e-4), name
        for name in ("query", "key", "value"):
            assert float(getattr(layer.gradients, f"{name}_norm")[0]) == pytest.approx(
                float(tensors[name].detach().norm()), rel=1e-4
            )
        for field, values in (
            ("head_grad", gradients["context"]),
            ("head_output", tensors["context"].detach()),
        ):
            expected = values.transpose(0, 1).flatten(1).norm(dim=1).tolist()
            assert getattr(layer, field)[0].tolist() == pytest.approx(expected, rel=1e-4), field
        share = float(tensors["output"].detach().norm() / tensors["stream"].detach().norm())
        assert float(layer.branch_share[0]) == pytest.approx(share, rel=1e-5)
        for field, name in (("input_residual", "entered"), ("output_residual", "output")):
            expected = float(position_residual(tensors[name].detach()))
            assert float(getattr(layer, field)[0]) == pytest.approx(expected, rel=1e-4)
        assert layer.gradients.at == "tensors"


def test_inside_multi_head_attention_gradients_are_those_of_the_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(nn.Linear(8, 8), layer), torch.randn(3, 5, 8)

    def loss_fn(y: Tensor) -> Tensor:
        return y[..., :3].square().mean()

    record = measured(model, x, loss_fn)
    found = record.transformer["1.self_attn"]
    loss_fn(model(x)).backward()
    weight = layer.self_attn.in_proj_weight
    assert weight.grad is not None
    for name, third in zip(("query", "key", "value"), weight.grad.chunk(3), strict=True):
        seen = float(getattr(found.gradients, f"{name}_grad")[0])
        assert seen == pytest.approx(float(third.norm()), rel=1e-5)
    expected = weight.grad[16:].view(2, -1).norm(dim=1).tolist()
    assert found.head_grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert found.gradients.at == "weights"
    h = model[0](x)
    v = F.linear(h, weight[16:], layer.self_attn.in_proj_bias[16:]).view(3, 5, 2, 4).transpose(1, 2)
    context = attention_weights(model, x)["1.self_attn"].float() @ v
    assert found.head_output[0].tolist() == pytest.approx(
        context.detach().transpose(0, 1).flatten(1).norm(dim=1).tolist(), rel=1e-5
    )
    assert [b.name for b in record.transformer.branches] == ["1.self_attn", "1.linear2"]


@pytest.mark.parametrize("first", [True, False])
def test_positions_are_told_from_samples(first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=first)
    x = torch.randn(4, 4, 8)
    x[:, 1] = x[:, 2]
    found = measured(model, x, lambda y: y.square().mean()).transformer["self_attn"]
    rows = x if first else x.transpose(0, 1)
    assert float(found.input_residual[0]) == pytest.approx(float(position_residual(rows)), rel=1e-6)


def test_shapes_that_hold_positions() -> None:
    x = torch.arange(24.0)
    assert positions(x.view(2, 3, 4), 3, True) is not None
    swapped = positions(x.view(3, 2, 4), 3, True)
    assert swapped is not None
    assert swapped.shape == (2, 3, 4)
    image = positions(x.view(1, 2, 3, 4), 12, True)
    assert image is not None
    assert image.shape == (1, 12, 2)
    heads = positions(x.view(1, 3, 2, 4), 3, True)
    assert heads is not None
    assert heads.shape == (1, 2, 3, 4)
    assert positions(x.view(2, 3, 4), 5, True) is None
    assert positions(x, 24, True) is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_have_all_numbers(name: str, implementation: str) -> None:
    pytest.importorskip("transformers")
    model, batch = hugging_face(name, implementation)
    record = gf.analyze(model, [batch] * 2, None, measurements=[attention()], mode="eval")
    stats, weights = record.transformer.stats, attention_weights(model.eval(), batch)
    assert set(stats) == set(weights)
    for key, layer in stats.items():
        assert all(math.isfinite(value) for value in attrs.astuple(layer)), key
        # where keys are hidden, their weight is zero
        exact = attention_statistics(weights[key], allowed=weights[key] > 0)
        assert layer.mean_entropy == pytest.approx(float(exact.entropy.mean()), abs=1e-5)
        assert layer.max_attention == pytest.approx(float(exact.max_weight.mean()), abs=1e-5)
        # the figures in the docstrings of `unbalanced_attention` and `idle_branches`
        assert 0.25 < layer.query_grad_norm / layer.key_grad_norm < 4
        if name in ("gpt2", "bert"):
            assert 50 < layer.value_grad_norm / layer.query_grad_norm < 500
    assert len(record.transformer.branches) == (10 if name == "t5" else 4)
    assert min(float(branch.share[0]) for branch in record.transformer.branches) > 0.005


def test_one_record_per_look_and_json_keeps_it() -> None:
    record = gf.analyze(gpt(), [tokens()] * 12, token_loss, measurements=[attention()])
    found = record.transformer
    assert found.steps == (0, 1, 4, 11)
    assert found.attention[0].entropy.shape == (4, 2)
    assert found.branches[0].share.shape == (4,)
    again = FlowRecord.from_json(record.to_json())
    assert again == record
    assert again.transformer.stats == found.stats
    with pytest.raises(gf.GradflowError, match=r"no entry named 'h\.0'.*h\.0\.attn"):
        found["h.0"]


def test_without_the_measurement_the_record_is_empty() -> None:
    plain = gf.analyze(gpt(), [tokens()], token_loss)
    assert (plain.transformer.steps, plain.transformer.attention, plain.transformer.branches) == ((), (), ())
    assert FlowRecord.from_json(plain.to_json()) == plain


@pytest.mark.parametrize("way", ["sdpa", "module", "merged"])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_nothing_else_changes_and_no_trace_is_left(way: str, detail: Any) -> None:
    model = gpt(way, dropout=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = [tokens()] * 6
    before = snapshot(model, optimizer)
    options: dict[str, Any] = {"optimizer": optimizer, "detail": detail, "seed": 0}
    plain = gf.analyze(model, batches, token_loss, **options)
    with_it = gf.analyze(model, batches, token_loss, measurements=[attention()], **options)
    assert difference(before, snapshot(model, optimizer)) == ""
    assert attrs.evolve(with_it, transformer=plain.transformer) == plain


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = gpt("module", dropout=0.2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.model(x)
        if self.calls > 1:
            raise RuntimeError("on purpose")
        return y


def test_no_trace_is_left_when_the_model_raises() -> None:
    model, batches = Failing(), [tokens()] * 3
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        gf.analyze(model, batches, token_loss, measurements=[attention()])
    assert difference(before, snapshot(model)) == ""


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = gpt("module"), reentrant

    def forward(self, batch: Tensor) -> Tensor:
        x = self.model.wte(batch)
        for block in self.model.h:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.model.head(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool) -> None:
    model = Checkpointed(reentrant=reentrant)
    found = measured(model, tokens()).transformer
    assert [a.name for a in found.attention] == ["model.h.0.attn", "model.h.1.attn"]
    for layer in found.attention:
        assert np.isfinite(layer.entropy).all()
        # the inside of a reentrant checkpoint is not in the graph
        assert bool(np.isfinite(layer.gradients.query_grad[0])) is not reentrant


def test_under_vjp_the_first_step_is_measured() -> None:
    record = gf.analyze(gpt(), [tokens()] * 3, token_loss, measurements=[attention()], transform="vjp")
    assert record.transformer.steps == (0,)
    assert np.isfinite(record.transformer["h.0.attn"].gradients.query_grad).all()


def test_under_autocast_statistics_are_in_single_precision() -> None:
    model = gpt()

    def loss(output: Tensor) -> Tensor:
        return token_loss(output.float())

    def forward(m: nn.Module, step: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(tokens())

    record = gf.analyze_custom(model, forward, loss, steps=1, measurements=[attention()])
    exact = measured(gpt(), tokens())
    for name, stats in exact.transformer.stats.items():
        assert record.transformer.stats[name].mean_entropy == pytest.approx(stats.mean_entropy, abs=0.03)


def test_frozen_attention_has_statistics_and_no_gradients() -> None:
    model = gpt()
    model.wte.requires_grad_(False)
    model.wpe.requires_grad_(False)
    model.h[0].requires_grad_(False)
    found = measured(model, tokens()).transformer
    assert np.isfinite(found["h.0.attn"].entropy).all()
    assert np.isnan(found["h.0.attn"].gradients.query_grad).all()
    assert found["h.0.attn"].gradients.at == ""
    assert np.isfinite(found["h.1.attn"].gradients.query_grad).all()


def test_a_shared_block_is_told_call_by_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.attn = nn.Linear(8, 8), Attention("sdpa")

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            for _ in range(3):
                x = x + self.attn(x)
            return x

    torch.manual_seed(0)
    found = measured(Shared(), torch.randn(2, 5, 8), lambda y: y.square().mean()).transformer
    assert [a.name for a in found.attention] == ["attn", "attn@1", "attn@2"]
    assert {a.module for a in found.attention} == {"attn"}
    assert [b.name for b in found.branches] == ["attn", "attn@1", "attn@2"]


def test_statistics_by_layer_are_medians_of_the_last_third() -> None:
    nothing = np.full(6, np.nan)
    by_head = np.array([[9.0, 9.0]] * 3 + [[9.0, 9.0], [1.0, 2.0], [3.0, np.nan]])

    def empty(kind: type) -> dict[str, Any]:
        return {f.name: nothing for f in attrs.fields(kind) if f.name not in NAMES}

    fields = empty(AttentionRecord) | {"entropy": by_head, "output_residual": np.arange(6.0)}
    scores = AttentionScores(**(empty(AttentionScores) | {"logit_peak": by_head}))
    layer = AttentionRecord(
        name="a", module="a", type="A", op="softmax", num_heads=2, num_queries=3, scores=scores,
        gradients=AttentionGradients(**empty(AttentionGradients)), **fields,
    )  # fmt: skip
    stats = layer.stats()
    assert stats.mean_entropy == 2.25  # of 1.5 and 3
    assert stats.logit_peak == 2.5  # of 2 and 3
    assert stats.rank_collapse == 4.5
    assert math.isnan(stats.head_diversity)


NAMES = {"name", "module", "type", "op", "num_heads", "num_queries", "at", "scores", "gradients"}


def test_the_measurement_is_a_value() -> None:
    assert attention() == attention()
    assert hash(attention()) == hash(attention())
    assert isinstance(gpt(), GPT)
