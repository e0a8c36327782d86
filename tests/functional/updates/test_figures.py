"""Updates as applied, by hand; and what is read off the states of optimizers, against their formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import UnknownLayerError
from gradflow.functional.updates.figures import ages, remembered, sampled, update_figures
from gradflow.functional.updates.moments import moments

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], 0.01)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(32, 6, generator=g, dtype=torch.float64) for _ in range(6)]
    return [(x, x.sum(1, keepdim=True).sin()) for x in xs]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def by_hand(make: Make, at: int) -> dict[str, tuple[float, float, float, float]]:
    """Train plainly, and return (rms of update, of weight, of gradient, g·u) of one step by parameter."""
    model = net()
    optimizer = make(model.parameters())
    for step, (x, y) in enumerate(batches()):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        first: dict[str, Tensor] = {}

        def closure(x: Tensor = x, y: Tensor = y, first: dict[str, Tensor] = first) -> Tensor:
            model.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            if not first:
                first |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if step == at:
            return {
                n: (
                    rms(p.detach() - before[n]),
                    rms(before[n]),
                    rms(g),
                    float(((p.detach() - before[n]) * g).sum()),
                )
                for n, p in model.named_parameters()
                for g in [first[n]]
            }
    raise AssertionError


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 4])
def test_updates_are_those_of_a_plain_loop(name: str, at: int) -> None:
    model = net()
    held = OPTIMIZERS[name](model.parameters())
    record = gf.analyze(model, batches(), nn.MSELoss(), steps=6, optimizer=held)
    assert record.updates is not None
    assert record.updates.steps == (0, 4)
    assert record.updates.num_updates == 5
    expected = by_hand(OPTIMIZERS[name], at)
    look = record.updates.steps.index(at)
    for p in record.updates.parameters:
        found = (p.rms[look], p.weight_rms[look], p.gradient_rms[look], p.slope[look])
        assert found == pytest.approx(expected[p.name], rel=1e-9), p.name
        assert p.ratio[look] == pytest.approx(expected[p.name][0] / expected[p.name][1])
        assert p.held == (name != "Muon" or p.name.endswith("weight"))
        assert p.layer == p.name.partition(".")[0]


def test_the_effective_rate_of_plain_descent_is_its_rate() -> None:
    model = net()
    record = gf.analyze(
        model, batches(), nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), 0.05), clip=0.1
    )
    assert record.updates is not None
    for p in record.updates.parameters:
        assert p.effective_rate == pytest.approx(0.05, rel=1e-9)
    shares = np.array(record.updates.clipping[:-1])
    norms = np.sqrt(sum(p.grad_norm**2 for p in record.parameters))[:-1]
    assert shares == pytest.approx(np.minimum(1.0, 0.1 / (norms + 1e-6)))


def test_adams_figures_follow_its_formulas() -> None:
    """v̂ₜ = (1 − β₂) Σ β₂^(t−s) gₛ² / (1 − β₂ᵗ), from the gradients alone."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    adam = torch.optim.Adam([p], lr=0.01, betas=(0.8, 0.9), eps=0.5)
    gradients = [torch.randn(50, dtype=torch.float64) for _ in range(5)]
    for t, g in enumerate(gradients, start=1):
        was, aged = remembered({"p": p}), ages([adam], {"p": p})
        p.grad = g.clone()
        adam.step()
        (found,) = update_figures([adam], was, {"p": p}, {"p": g}, aged=aged).values()
        v = sum(0.1 * 0.9 ** (t - s) * gradients[s - 1] ** 2 for s in range(1, t + 1)) / (1 - 0.9**t)
        assert found.second_moment == pytest.approx(float(v.mean() / (g * g).mean()))
        assert found.under_epsilon == pytest.approx(float((v.sqrt() < 0.5).double().mean()))
        m = sum(0.2 * 0.8 ** (t - s) * gradients[s - 1] for s in range(1, t + 1)) / (1 - 0.8**t)
        assert found.rms == pytest.approx(rms(0.01 * m / (v.sqrt() + 0.5)))
        assert (found.age, found.epsilon, found.rate) == (t - 1, 0.5, 0.01)


SECOND: dict[str, tuple[Make, Callable[[Tensor], Tensor]]] = {
    "RMSprop": (lambda p: torch.optim.RMSprop(p, alpha=0.9), lambda g: 0.1 * g**2),
    "Adagrad": (lambda p: torch.optim.Adagrad(p), lambda g: g**2),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, rho=0.9), lambda g: 0.1 * g**2),
    "Adamax": (lambda p: torch.optim.Adamax(p), lambda g: (g.abs() + 1e-8) ** 2),
    "NAdam": (lambda p: torch.optim.NAdam(p), lambda g: g**2),
    "RAdam": (lambda p: torch.optim.RAdam(p), lambda g: g**2),
    "Adafactor": (
        lambda p: torch.optim.Adafactor(p),
        lambda g: (g**2).mean(1, keepdim=True) * (g**2).mean(0) / (g**2).mean(),
    ),
}


@pytest.mark.parametrize("name", SECOND)
def test_the_first_second_moment_of_every_kin(name: str) -> None:
    make, expected = SECOND[name]
    p = nn.Parameter(torch.ones(4, 5, dtype=torch.float64))
    optimizer, g = (
        make([p]),
        torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    p.grad = g.clone()
    optimizer.step()
    found = moments(optimizer.state[p], optimizer.param_groups[0], p.dtype)
    assert found.second is not None
    torch.testing.assert_close(found.second, expected(g))
    assert found.age == 1


def test_transformers_adafactor_is_read_as_pytorchs() -> None:
    transformers = pytest.importorskip("transformers")
    p = nn.Parameter(torch.ones(4, 5))
    adafactor = transformers.Adafactor([p], lr=0.01, relative_step=False, scale_parameter=False)
    p.grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    squares = p.grad.square() + 1e-30
    adafactor.step()
    found = moments(adafactor.state[p], adafactor.param_groups[0], p.dtype)
    assert found.second is not None
    expected = squares.mean(1, keepdim=True) * squares.mean(0) / squares.mean()
    torch.testing.assert_close(found.second, expected)


def test_updates_that_rounding_swallows_are_counted() -> None:
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 0.001], dtype=torch.bfloat16))
    sgd, was = torch.optim.SGD([p], lr=1.0), remembered({"p": p})
    p.grad = torch.tensor([1e-4, 0.0, 0.5, 1e-4], dtype=torch.bfloat16)
    sgd.step()
    (found,) = update_figures([sgd], was, {"p": p}, {"p": p.grad}).values()
    assert found.unchanged == pytest.approx(1 / 3)  # the first; the second has no gradient


def test_a_step_that_makes_nan_is_seen() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    adam, was = torch.optim.Adam([p], lr=0.01), remembered({"p": p})
    p.grad = torch.full((3,), 1e-5, dtype=torch.float16)  # whose square is zero, and so is ε
    adam.step()
    (found,) = update_figures([adam], was, {"p": p}, {"p": p.grad}).values()
    assert not found.finite
    assert found.under_epsilon == 1.0


def test_what_is_sampled_stands_for_all() -> None:
    x = torch.randn(300, 512, generator=torch.Generator().manual_seed(0))
    some = sampled(x, most=10_000)
    assert 5_000 < len(some) <= 10_000 * 1.2
    columns = torch.arange(512).expand(300, 512)
    assert len(sampled(columns.contiguous(), most=10_000).unique()) == 512  # no column is left out
    assert rms(some) == pytest.approx(rms(x), rel=0.03)
    assert sampled(x, most=None).shape == (300 * 512,)


def test_whole_and_sampled_values_agree() -> None:
    p = nn.Parameter(torch.randn(200, 200, generator=torch.Generator().manual_seed(0)))
    twin = copy.deepcopy(p)
    g = torch.randn(200, 200, generator=torch.Generator().manual_seed(1))
    found = []
    for parameter, most in ((p, None), (twin, 5_000)):
        adam, was = torch.optim.Adam([parameter], lr=0.01), remembered({"p": parameter}, most)
        parameter.grad = g.clone()
        adam.step()
        found.append(update_figures([adam], was, {"p": parameter}, {"p": g}, most=most)["p"])
    whole, some = found
    assert some.rms == pytest.approx(whole.rms, rel=0.03)
    assert some.slope == pytest.approx(whole.slope, rel=0.05)


def test_what_no_optimizer_holds_has_no_figures_of_one() -> None:
    p = nn.Parameter(torch.ones(3))
    (found,) = update_figures([], remembered({"p": p}), {"p": p}, {"p": None}).values()
    assert not found.held
    assert found.rms == 0.0
    assert math.isnan(found.rate)
    assert math.isnan(found.slope)


def test_the_record_survives_json_and_names_its_parameters() -> None:
    model = net()
    record = gf.analyze(model, batches(), nn.MSELoss(), optimizer=torch.optim.Adam(model.parameters()))
    assert gf.FlowRecord.from_json(record.to_json()) == record
    assert record.updates is not None
    assert record.updates["0.weight"].age.tolist() == [0, 4]
    with pytest.raises(UnknownLayerError, match="0.weight"):
        record.updates["0.weigth"]
    assert gf.analyze(model, batches(), nn.MSELoss()).updates is None


def test_what_the_optimizer_holds_of_no_module() -> None:
    model = net()
    stray = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    adam = torch.optim.Adam([{"params": model[0].parameters()}, {"params": [stray]}])
    record = gf.analyze(model, batches(), nn.MSELoss(), optimizer=adam)
    assert record.updates is not None
    assert record.updates.stale == ("tensor 0 of group 1, shape (2, 3)",)
    assert [p.held for p in record.updates.parameters] == [True, True, False, False]
