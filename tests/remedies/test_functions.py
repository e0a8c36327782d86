"""Remedies of single operations: what they let through, and where they are defined."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradflow as gf
import gradflow.remedies as r
from tests.remedies.models import applied, dead_net, drawn, x

# ----------------------------------------------------------------------------------------- functions


class Cut(nn.Module):
    """Loses its gradient in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "detach":
            h = h.detach()
        elif self.how == "data":
            h = h.data
        elif self.how == "no_grad":
            with torch.no_grad():
                h = self.first(x)
        elif self.how == "sign":
            h = torch.sign(h)
        elif self.how == "round":
            h = h.round()
        elif self.how == "sample":
            h = torch.distributions.Normal(h, h.exp()).sample()
        elif self.how == "checkpoint":
            h = checkpoint(self.first, x, use_reentrant=True)  # type: ignore[assignment]
        return self.last(h)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ("detach", r.attached()),
        ("data", r.attached()),
        ("no_grad", r.attached()),
        ("sign", r.straight_through()),
        ("round", r.straight_through()),
        ("sample", r.reparametrised()),
        ("checkpoint", r.inputs_with_gradient()),
    ],
)
def test_the_gradient_comes_through(how: str, remedy: r.Remedy) -> None:
    cut = Cut(how)
    cut(x()).sum().backward()
    assert cut.first.weight.grad is None or not cut.first.weight.grad.any()
    mended = applied(remedy, Cut(how))
    out = mended(x())
    out.sum().backward()
    gradient = mended.first.weight.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert gradient.any()
    if how != "sample":
        torch.testing.assert_close(out, Cut(how)(x()))
        straight = Cut("nothing")  # what the gradient is where nothing cuts it
        straight(x()).sum().backward()
        torch.testing.assert_close(gradient, straight.first.weight.grad)


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@pytest.mark.parametrize(
    ("op", "function", "at"),
    [
        ("sqrt", lambda t: t.sqrt(), 0.0),
        ("log", lambda t: torch.log(t), 0.0),
        ("exp", lambda t: t.exp(), 1e3),
        ("div", lambda t: t / (0 * t), 0.0),
        ("div", lambda t: 1.0 / t, 0.0),
        ("div", lambda t: t.sum() / torch.tensor(0), 1.0),
        ("mean", lambda t: F.mse_loss(t[None][1:], t[None][1:]) + t, 1.0),
        ("pow", lambda t: t**0.5, 0.0),
        ("std", lambda t: t[None].std(), 1.0),
        ("acos", lambda t: t.acos(), 1.0),
        ("softmax", lambda t: torch.softmax(torch.stack([t - math.inf, t - math.inf]), 0).square(), 0.0),
    ],
)
def test_inside_its_domain(op: str, function: Any, at: float) -> None:
    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.Parameter(torch.tensor(at))

        def forward(self) -> Tensor:
            return function(self.t).sum()

    def broken(model: Any) -> bool:
        out = model()
        out.backward()
        return not (torch.isfinite(out) and torch.isfinite(model.t.grad))

    assert broken(Edge())
    assert not broken(applied(r.guarded(op), Edge()))


def test_a_loss_is_guarded_too() -> None:
    loss = r.guarded("log").on_loss(lambda output: -torch.log(output).mean())
    assert loss(torch.zeros(3)).item() == pytest.approx(-math.log(1e-8), rel=1e-3)
    assert r.guarded("log").on_loss(None) is None


def test_scores_are_cooled_in_that_module_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Softmax(-1), nn.Softmax(-1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    found = applied(r.cooled("a", 10.0), Two())(x())
    torch.testing.assert_close(found[0], torch.softmax(x() / 10, -1))
    torch.testing.assert_close(found[1], torch.softmax(x(), -1))


def test_functions_are_smoothed_and_float_is_float() -> None:
    class Squashed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x)

    model = nn.Sequential(Squashed(), nn.Linear(4, 2))
    torch.testing.assert_close(applied(r.smooth(("sigmoid",)), model)(x()), model[1](F.gelu(x())))
    half = applied(r.wider_precision(), nn.Sequential(nn.Linear(4, 2)).half())
    assert half(x().half()).dtype == torch.float32


class Tokens(nn.Module):
    """Checkpointed behind a frozen table, in half precision on the way, or behind a mask that hides all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.how = nn.Embedding(5, 4), nn.Linear(4, 4), how
        self.table.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        if self.how == "checkpoint":
            return checkpoint(self.body, h, use_reentrant=True)  # type: ignore[return-value]
        h = self.body(h)
        if self.how == "half":
            return (h.half() * 1e4).half() * 1e4
        if self.how == "to half":
            return h.to(torch.float16) * 1e8
        hidden = torch.ones(len(h), len(h), dtype=torch.bool)
        if self.how == "masked_fill":
            return torch.softmax((h @ h.T).masked_fill(hidden, -math.inf), -1)
        if self.how == "masked attention":
            return F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=~hidden)
        return h


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ("checkpoint", r.inputs_with_gradient()),
        ("half", r.wider_precision()),
        ("to half", r.wider_precision()),
        ("masked_fill", r.guarded("softmax")),
        ("masked attention", r.guarded("softmax")),
    ],
)
def test_tokens_get_their_gradient_and_finite_numbers(how: str, remedy: r.Remedy) -> None:
    def good(model: nn.Module) -> bool:
        out = model(torch.arange(5))
        if not out.requires_grad:
            return False
        (out.float().square().mean() + 0 * model.body.weight.sum()).backward()  # type: ignore[union-attr, operator]
        return bool(torch.isfinite(out).all() and torch.isfinite(model.body.weight.grad).all())  # type: ignore[union-attr, arg-type]

    if how != "masked attention":  # some kernels give zeros there
        assert not good(Tokens(how))
    assert good(applied(remedy, Tokens(how)))


def test_where_there_is_nothing_to_mend_nothing_changes() -> None:
    """Neither the operations of a plain model nor those of the probes on it are touched."""
    model = dead_net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    given = model, drawn(), nn.MSELoss(), optimizer
    report = gf.diagnose(*given[:3], optimizer=optimizer, steps=4)
    remedies = [r.attached(), r.straight_through(), r.reparametrised(), r.guarded("log"), r.wider_precision()]
    for trial in r.try_remedies(report, *given, steps=6, seeds=1, remedies=remedies).trials:
        assert trial.steps == 6, trial.why
        np.testing.assert_array_equal(trial.losses_with, trial.losses_without)
