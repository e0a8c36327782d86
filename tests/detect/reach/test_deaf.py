"""Functions with a backward pass of their own that leaves out what it is handed; and those that heed it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import deaf_functions
from gradflow.records import FlowRecord, IssueSeverity

Loss = Callable[[Tensor, Tensor], Tensor]


def sample() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 8)
    return x, x[:, :3].argmax(1)


def measured(model: nn.Module, loss: Loss, steps: int = 3) -> FlowRecord:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return gf.analyze(model, sample, loss, steps=steps, optimizer=optimizer, seed=0)


def told(model: nn.Module, loss: Loss, steps: int = 3) -> list[tuple[str, IssueSeverity]]:
    return [(i.layer, i.severity) for i in gf.detect(measured(model, loss, steps), deaf_functions())]


def net(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


class Total(torch.autograd.Function):
    """The logarithm of the sum of exponentials of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deaf: bool) -> Tensor:
        ctx.save_for_backward(x.softmax(-1))
        ctx.deaf = deaf
        return x.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return (slope if ctx.deaf else slope * grads[0][:, None]), None


def difference(deaf: bool) -> Loss:
    """Return a cross entropy as the difference of two totals: of all scores, and of the right one."""

    def loss(scores: Tensor, kind: Tensor) -> Tensor:
        right = scores.masked_fill(~F.one_hot(kind, 3).bool(), -1e9)
        return (Total.apply(scores, deaf) - Total.apply(right, deaf)).mean()

    return loss


def weighted(deaf: bool, weigh: Callable[[Tensor], Tensor]) -> Loss:
    """Return a cross entropy in which each sample has a weight."""

    def loss(scores: Tensor, kind: Tensor) -> Tensor:
        total: Any = Total.apply(scores, deaf)
        return (weigh(kind) * (total - scores.gather(1, kind[:, None])[:, 0])).mean()

    return loss


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("steps", [1, 6])
def test_a_sign_that_is_left_out(width: int, steps: int) -> None:
    assert told(net(width), difference(True), steps) == [("2", IssueSeverity.HIGH)]
    assert told(net(width), difference(False), steps) == []


def test_weights_that_are_left_out() -> None:
    assert told(net(), weighted(True, lambda kind: kind / 3)) == [("2", IssueSeverity.MEDIUM)]
    assert told(net(), weighted(False, lambda kind: kind / 3)) == []


def test_one_weight_that_is_left_out_is_a_matter_of_the_rate() -> None:
    assert told(net(), weighted(True, torch.ones_like)) == [("2", IssueSeverity.LOW)]


def test_what_it_was_handed_and_did_not_heed() -> None:
    account = measured(net(), difference(True)).reach
    assert account is not None
    (one, other) = sorted(account.deaf, key=lambda deaf: deaf.least)
    assert (one.name, one.layer_at, other.layer_at) == ("Total", "2", "2")
    assert (one.least, one.largest, other.least, other.largest) == (-1 / 32, -1 / 32, 1 / 32, 1 / 32)


class Middle(nn.Module):
    """A function between two layers."""

    def __init__(self, apply: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.apply_to = nn.Linear(8, 16), nn.Linear(16, 3), apply

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.apply_to(self.a(x)))


def function(forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Any]) -> Any:
    """Return a function by what it gives, and what its backward pass makes of gradient and input."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(grads[0], ctx.saved_tensors[0])

    return Own.apply


def test_an_activation_that_gives_its_slope_alone() -> None:
    deaf = function(torch.tanh, lambda g, x: 1 - x.tanh() ** 2)
    assert told(Middle(deaf), F.cross_entropy) == [("a", IssueSeverity.HIGH)]


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (torch.sign, lambda g, x: g),  # straight through
        (torch.clone, lambda g, x: -g),  # reversal
        (torch.clone, lambda g, x: g.clamp(-1e-6, 1e-6)),  # clipping
        (torch.clone, lambda g, x: g / (g.norm() + 1e-12)),  # unit length
        (torch.clone, lambda g, x: g.sign()),
        (torch.clone, lambda g, x: g + 1e-3 * x.sign()),  # a penalty on the input
        (torch.clone, lambda g, x: torch.zeros_like(g)),  # cut on purpose
        (torch.clone, lambda g, x: None),
        (torch.tanh, lambda g, x: g * (1 - x.tanh() ** 2)),
        (torch.relu, lambda g, x: g.relu() * (x > 0)),  # guided
        (torch.clone, lambda g, x: g * torch.rand_like(g)),
    ],
)
def test_functions_that_heed_what_they_are_handed(forward: Any, backward: Any) -> None:
    assert told(Middle(function(forward, backward)), F.cross_entropy) == []


class Added(torch.autograd.Function):
    """The identity on `x` that gives another term of the loss a gradient of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], torch.ones(())


def test_a_term_that_is_smuggled_into_the_graph() -> None:
    assert told(Middle(lambda h: Added.apply(h, 1e-3 * h.square().mean())), F.cross_entropy) == []


class Whole(torch.autograd.Function):
    """A cross entropy with its gradient made in the forward pass, which the backward pass uses up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Tensor, how: str) -> Tensor:
        ctx.slope, ctx.how = (x.softmax(1) - F.one_hot(kind, 3)) / len(x), how
        return F.cross_entropy(x, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        slope = ctx.slope
        if ctx.how == "once":
            del ctx.slope
        if ctx.how == "in place":
            slope.mul_(grads[0])
        return (slope if ctx.how in ("in place", "loss") else grads[0] * slope), None, None


@pytest.mark.parametrize("how", ["loss", "once", "in place"])
def test_a_function_that_is_the_loss_itself(how: str) -> None:
    def loss(scores: Tensor, kind: Tensor) -> Any:
        return Whole.apply(scores, kind, how)

    def plain(scores: Tensor, kind: Tensor) -> Tensor:
        return F.cross_entropy(scores, kind)

    assert told(net(), loss) == []
    seen, known = measured(net(), loss), measured(net(), plain)
    assert seen.losses == pytest.approx(known.losses, rel=1e-5)  # asking has left nothing behind
    for one, other in zip(seen.parameters, known.parameters, strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)


def test_a_minus_before_one_that_writes_to_what_it_has_kept() -> None:
    def loss(scores: Tensor, kind: Tensor) -> Any:
        return -Whole.apply(-scores, kind, "in place")  # type: ignore[operator]

    assert told(net(), loss) == []
