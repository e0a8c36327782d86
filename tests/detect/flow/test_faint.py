"""Plain stacks that hand on next to nothing, forward and back, and those whose steps make up for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import IssueType


def stack(depth: int, bound: float | None, norm: bool = False) -> nn.Sequential:
    """Return a plain network; its weights are uniform within a bound, or PyTorch's usual ones."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [
            nn.Linear(16 if i == 0 else 32, 32),
            nn.LayerNorm(32) if norm else nn.Identity(),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    for module in model.modules():
        if bound is not None and isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    return model


class Offset(nn.Module):
    """What a stack makes of a picture, added to a template that is given with it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Return the template, the first four numbers of x, with what is added."""
        return 3 * x[:, :4] + self.body(x)


def told(model: nn.Module, rate: float, *, offset: bool = False) -> list[tuple[object, str]]:
    """Return the serious issues of a model that is to learn a function of four numbers."""
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(16, 4, generator=g)
    batches = []
    for _ in range(20):
        x = torch.randn(64, 16, generator=g)
        batches.append((x, torch.tanh(x @ weights / 2) + (3 * x[:, :4] if offset else 0)))
    report = gf.diagnose(model, batches, F.mse_loss, optimizer=torch.optim.Adam(model.parameters(), rate))
    return [(i.issue_type, i.layer) for i in report.issues if i.severity.is_serious]


@pytest.mark.parametrize(("depth", "bound"), [(6, 0.05), (8, 0.05), (7, 0.04)])
def test_a_stack_that_starts_too_small_is_told(depth: int, bound: float) -> None:
    torch.manual_seed(0)
    assert (IssueType.VANISHING, "0") in told(stack(depth, bound), 1e-3)


def test_so_is_one_past_which_a_way_leads() -> None:
    torch.manual_seed(0)
    found = told(Offset(stack(16, None)), 1e-3, offset=True)
    assert (IssueType.VANISHING, "body.0") in found


@pytest.mark.parametrize(("depth", "rate"), [(4, 1e-3), (6, 1e-3), (10, 5e-3)])
def test_the_usual_start_is_not_told_of_where_steps_make_up_for_it(depth: int, rate: float) -> None:
    torch.manual_seed(0)
    assert not told(stack(depth, None), rate)
    assert not told(Offset(stack(depth, None)), rate, offset=True)


def test_nor_are_deep_stacks_with_norms() -> None:
    torch.manual_seed(0)
    assert not told(stack(16, None, norm=True), 1e-3)
