"""Weights that lie at the bounds of what they go through, where it has no slope; and those cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf


class Grid(torch.autograd.Function):
    """Weights on a grid of three values; the gradient passes at its bounds too, or inside of them alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: float, at_bounds: bool) -> Tensor:
        whole = (weight / step).round()
        ctx.save_for_backward(whole.abs() <= 1 if at_bounds else whole.abs() < 1)
        return whole.clamp(-1, 1) * step

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None


class Sparse(torch.autograd.Function):
    """Weights of which the small ones are cut off, and get nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, least: float) -> Tensor:
        kept = weight.abs() > least
        ctx.save_for_backward(kept)
        return weight * kept

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None


class Through(nn.Module):
    """A linear layer whose weight goes through something first; it is uniform up to one over four."""

    def __init__(self, through: Callable[[Tensor], Tensor], normal: bool = False) -> None:
        super().__init__()
        self.lin, self.through = nn.Linear(16, 24), through
        if normal:
            nn.init.normal_(self.lin.weight, std=0.25)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.through(self.lin.weight), self.lin.bias)


def told(through: Callable[[Tensor], Tensor], normal: bool) -> list[gf.Issue]:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    kinds = [torch.randint(6, (48,), generator=g) for _ in range(8)]
    centres = 2 * torch.randn(6, 16, generator=g)
    batches = [(centres[k] + torch.randn(48, 16, generator=g), k) for k in kinds]
    model = nn.Sequential()
    model.add_module("layer", Through(through, normal))
    model.add_module("act", nn.GELU())
    model.add_module("head", nn.Linear(24, 6))
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    found = gf.diagnose(model, batches, nn.CrossEntropyLoss(), optimizer=sgd)
    return [i for i in found.issues if i.layer.startswith("layer") and i.severity.is_serious]


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize(
    "through",
    [lambda w: Grid.apply(w, 0.18, False), lambda w: w.clamp(-0.1, 0.1)],
    ids=["a grid without slope at its bounds", "bounds that most weights are beyond"],
)
def test_most_of_a_matrix_lies_at_bounds(through: Callable[[Tensor], Tensor], normal: bool) -> None:
    (issue,) = told(through, normal)
    assert issue.layer == "layer.lin"
    assert (issue.issue_type, issue.severity) == (gf.IssueType.DEAD, gf.IssueSeverity.MEDIUM)
    assert "at its bounds or beyond" in issue.description


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize(
    "through",
    [
        lambda w: Grid.apply(w, 0.18, True),
        lambda w: w.clamp(-0.2, 0.2),
        lambda w: Sparse.apply(w, 0.17),
        lambda w: F.hardshrink(w, 0.17),
        lambda w: F.softshrink(w, 0.17),
        lambda w: w * (w.detach().abs() > 0.17),
        lambda w: w.clamp(min=0.0),
    ],
    ids=["grid", "few beyond", "cut off", "hardshrink", "softshrink", "mask", "above zero"],
)
def test_few_at_bounds_and_small_ones_that_are_cut_off_are_usual(
    through: Callable[[Tensor], Tensor], normal: bool
) -> None:
    assert told(through, normal) == []
