"""What a look from inside tells: the numbers of the very passes that train."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.functional.analyze import analyzed_custom
from gradflow.functional.attention.automatic import AutomaticAttention
from gradflow.functional.inside.look import InsideLook
from gradflow.functional.inside.passes import Passes
from gradflow.functional.run.run import Plan
from gradflow.records import FlowRecord
from tests.functional.inside.looks import beside, check_layers, check_parameters, looked, pictures
from tests.functional.inside.loops import MODELS, batch

SHARED = {"residual": {"skip"}}  # hands on what others use as well


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"aliasing"}))
def test_numbers_are_those_of_a_look_beside(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]().to(dtype)
    x, y = batch()
    x, without = x.to(dtype), SHARED.get(kind, set())
    state = torch.get_rng_state()
    other = beside(copy.deepcopy(model), (x, y), measurements=(AutomaticAttention(),))
    torch.set_rng_state(state)
    look = InsideLook.of(model, (AutomaticAttention(),))
    with look.listening() as passes:
        F.cross_entropy(model(x), y).backward()
    assert passes.failed == ""
    record = look.record()
    rtol = 0 if dtype is torch.float64 and kind != "reentrant" else 1e-6
    check_layers(record, other, without, rtol)
    check_parameters(record, other, rtol)
    assert record.losses == pytest.approx(other.losses, rel=1e-6)
    assert record.activations == other.activations
    assert record.parts.norms == other.parts.norms
    assert record.parts.blocks == other.parts.blocks
    assert record.parts.dropouts == other.parts.dropouts
    assert record.transformer.branches == other.transformer.branches
    for a, b in zip(record.transformer.attention, other.transformer.attention, strict=True):
        assert a.entropy == pytest.approx(b.entropy)
        assert (a.input_residual, a.output_residual) == (b.input_residual, b.output_residual)
    assert record.reach is not None
    assert other.reach is not None
    # what arrived as rounding of a zero by mathematics is known for that beside alone
    assert record.reach.num_reached >= other.reach.num_reached
    assert {r.parameter for r in record.reach.unreached} <= {r.parameter for r in other.reach.unreached}
    if not without:
        assert set(record.graph.nx.edges) == set(other.graph.nx.edges)
    assert record.provenance.notes[0].startswith("Looked at from inside")
    assert FlowRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("kind", ["residual", "words", "recurrent", "pictures", "checkpoint", "aliasing"])
def test_numbers_are_those_of_plain_hooks(kind: str) -> None:
    model, (x, y) = MODELS[kind](), batch()
    other, naive = copy.deepcopy(model), {}
    state = torch.get_rng_state()

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad and not any(
                output is a for a in args if kind != "residual" or name != "relu"
            ):
                here, number = name, 0
                while here in naive:
                    number += 1
                    here = f"{name}@{number}"
                naive[here] = None
                output.register_hook(lambda g: naive.__setitem__(here, float(g.double().norm())))

        return hook

    for name, module in other.named_modules():
        if not list(module.children()):
            module.register_forward_hook(listen(name))
    F.cross_entropy(other(x), y).backward()
    torch.set_rng_state(state)
    record, _ = looked(model, lambda passes: F.cross_entropy(model(x), y))
    shared = [layer for layer in record if layer.name in naive and naive[layer.name] is not None]
    assert len(shared) >= 2
    for layer in shared:
        assert layer.grad_norm[0] == pytest.approx(naive[layer.name], rel=1e-6), layer.name
    for name, parameter in other.named_parameters():
        told = record.parameter(name)
        assert told.grad_norm[0] == pytest.approx(float(parameter.grad.double().norm()), rel=1e-6), name
        assert told.norm[0] == pytest.approx(float(parameter.detach().double().norm()), rel=1e-6), name


@pytest.mark.parametrize("hand", [True, False])
def test_micro_batches_are_rows_of_their_own(hand: bool) -> None:
    model = pictures().double()
    batches = [(x.double(), y) for x, y in (batch(8), batch(8))]
    other = beside(model, *batches)

    def loss(passes: Passes, number: int) -> Tensor:
        x, y = batches[number]
        found = F.cross_entropy(model(x), y)
        if hand:
            passes.hand(found)
        return found / 2

    record, passes = looked(model, lambda p: loss(p, 0), lambda p: loss(p, 1))
    share = 1.0 if hand else 0.5
    assert record.steps == 2
    assert passes.factors == [0.5 if hand else 1.0] * 2
    assert record.losses == pytest.approx(share * other.losses)
    for a, b in zip(record, other, strict=True):
        assert a.grad_norm == pytest.approx(share * b.grad_norm, rel=1e-12)
    for a, b in zip(record.parameters, other.parameters, strict=True):
        assert a.grad_norm == pytest.approx(share * b.grad_norm, rel=1e-9)
    assert any("what each reverse pass has added" in note for note in record.provenance.notes)
    assert any("before it was multiplied with 0.5" in note for note in record.provenance.notes) == hand


@pytest.mark.parametrize("hand", [True, False])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.bfloat16, 1e-6), (torch.float16, 0.02)])
def test_a_loss_scale_is_undone(hand: bool, dtype: torch.dtype, rel: float) -> None:
    model, (x, y) = pictures(), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def forward(model: nn.Module, step: int = 0) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.cross_entropy(model(x), y)

    other = analyzed_custom(model, forward, None, Plan(steps=1, mode="keep"))
    scale = 1.0 if hand else float(scaler.get_scale())

    def loss(passes: Passes) -> Tensor:
        found = forward(model)
        if hand:
            passes.hand(found)
        return scaler.scale(found)

    record, passes = looked(model, loss, scale=scale)
    assert passes.factors == [2.0**10]
    assert record.losses == pytest.approx(other.losses, rel=1e-6)
    for a, b in zip(record, other, strict=True):
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=rel), a.name
    for a, b in zip(record.parameters, other.parameters, strict=True):
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=rel), a.name


def test_an_overflow_of_the_scale_is_no_measurement() -> None:
    model, (x, y) = MODELS["pictures"](), batch()
    look = InsideLook.of(model)
    with look.listening() as passes:
        loss = F.cross_entropy(model(x), y)
        passes.hand(loss)
        (loss * 1e38 * 10).backward()
    assert (passes.overflowed, passes.failed, passes.factors) == (True, "", [])


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_what_clipping_leaves_is_told(scale: float) -> None:
    model, (x, y) = MODELS["pictures"](), batch()
    look = InsideLook.of(model)
    with look.listening(lambda: scale) as passes:
        (scale * F.cross_entropy(model(x), y)).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        total = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    record = look.record()
    measured = math.sqrt(sum(p.grad_norm[0] ** 2 for p in record.parameters))
    assert measured == pytest.approx(total, rel=1e-5)
    assert passes.left * scale == pytest.approx(0.01 / total, rel=1e-3)
    assert any(f"left {0.01 / total:.3g} of their norm" in note for note in record.provenance.notes)
    untouched, passes = looked(model, lambda p: F.cross_entropy(model(x), y))
    assert passes.left == pytest.approx(1.0)
    assert not any("of their norm" in note for note in untouched.provenance.notes)


@pytest.mark.parametrize("hand", [True, False])
def test_what_clipping_leaves_of_micro_batches_is_told(hand: bool) -> None:
    model, scale = pictures(), 64.0
    look = InsideLook.of(model)
    with look.listening(lambda: scale) as passes:
        for _ in range(2):
            x, y = batch(8)
            loss = F.cross_entropy(model(x), y)
            if hand:
                passes.hand(loss)
            (scale * loss / 2).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        total = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    assert any(f"left {0.01 / total:.3g} of their norm" in note for note in look.record().provenance.notes)


class Game(nn.Module):
    """A generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.d = nn.Linear(2, 8), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))


def test_two_players_with_two_optimizers_are_two_rows() -> None:
    game, (x, _) = Game(), batch()
    steps = {k: torch.optim.Adam(getattr(game, k).parameters(), lr=1e-2) for k in "gd"}
    noise, norms = torch.randn(16, 2), []
    look = InsideLook.of(game)
    with look.listening() as passes:
        steps["d"].zero_grad()
        fake = game.g(noise)
        loss = F.softplus(game.d(fake.detach())).mean() + F.softplus(-game.d(x)).mean()
        loss.backward()
        norms.append(float(game.d[0].weight.grad.double().norm()))
        steps["d"].step()
        steps["g"].zero_grad()
        before = game.d[0].weight.grad.clone()
        F.softplus(-game.d(game.g(noise))).mean().backward()
        norms.append(float((game.d[0].weight.grad - before).double().norm()))
        steps["g"].step()
    assert passes.failed == ""
    record = look.record()
    assert record.steps == 2
    assert record.parameter("g.weight").reached.tolist() == [False, True]
    assert record.parameter("d.0.weight").grad_norm == pytest.approx(norms, rel=1e-5)
    assert record["d.0@1"].called.tolist() == [True, False]
    assert {("g", "d.0"), ("d.0", "d.1")} <= set(record.graph.nx.edges)
    assert record.never_called == ()


def test_several_steps_go_into_one_record() -> None:
    model, look = MODELS["pictures"](), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    look, norms = InsideLook.of(model), []
    for _ in range(4):
        x, y = batch()
        norms.append(float(model.net[0].weight.detach().double().norm()))
        with look.listening() as passes:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert passes.failed == ""
    record = look.record()
    assert (look.steps, record.steps, record.provenance.requested_steps) == (4, 4, 4)
    assert record.parameter("net.0.weight").norm == pytest.approx(norms)
    assert np.isfinite(record["net.0"].grad_norm).all()
    assert len(set(record.losses.tolist())) == 4
