"""Which outputs a loss merely adds, and which are held at zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradflow.functional.reverse.constants import held_at_zero, merely_added, zero_by_steps


def outputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 2, requires_grad=True), torch.randn(6, 2), torch.zeros(6, 2, requires_grad=True)]


@pytest.mark.parametrize(
    ("weight", "product", "added"), [(1.0, 0.0, [1]), (1e-4, 0.0, []), (1.0, 1.0, []), (0.0, 1.0, [])]
)
def test_an_output_without_a_graph(weight: float, product: float, added: list[int]) -> None:
    def loss(y: list[Tensor]) -> Tensor:
        return y[0].square().mean() + weight * y[1].square().mean() + product * (y[0] * y[1]).mean()

    assert merely_added(lambda y: loss(list(y)), outputs()) == added


@pytest.mark.parametrize(("sharp", "product", "added"), [(1.0, 1.0, []), (1e3, 1.0, []), (1e3, 0.0, [1])])
def test_a_teacher_of_sure_outputs(sharp: float, product: float, added: list[int]) -> None:
    """A divergence at a low temperature is flat in what is sure, and no sum for that."""

    def loss(y: list[Tensor]) -> Tensor:
        own, held = (sharp * y[0]).log_softmax(-1), y[1].log_softmax(-1)
        gap = (own.exp() * (own - product * held)).sum(-1).mean() - (1 - product) * held.mean()
        return y[0].square().mean() + gap

    assert merely_added(lambda y: loss(list(y)), outputs()) == added


def test_a_loss_with_no_slope_elsewhere_tells_nothing() -> None:
    assert merely_added(lambda y: y[1].square().mean() + 0 * y[0].sum(), outputs()) == []


@pytest.mark.parametrize(("power", "held"), [(1, []), (2, [2])])
def test_an_output_that_is_zero(power: int, held: list[int]) -> None:
    assert held_at_zero(lambda y: (y[0].mean() + (1 + y[2]) ** power).mean(), outputs()) == held


def test_zeros_beside_zeros_tell_nothing() -> None:
    parts = [torch.zeros(6, 2, requires_grad=True), torch.zeros(6, 2, requires_grad=True)]
    assert held_at_zero(lambda y: (1 + y[0] + y[1]).square().mean(), parts) == []


@pytest.mark.parametrize("size", [1.0, 1e6, 1e30])
def test_a_target_beside_outputs_that_have_run_away(size: float) -> None:
    own, held, _ = outputs()
    parts = [(size * own).detach().requires_grad_(), held]
    assert merely_added(lambda y: (y[0] - y[1]).square().mean(), parts) == []


@pytest.mark.parametrize("asked", [0.0, 1.0])
def test_zeros_that_the_loss_asks_for_are_met(asked: float) -> None:
    """Only what no weight can make other than zero is held there all the same."""

    def loss(y: list[Tensor]) -> Tensor:
        return y[0].square().mean() + (y[2] - asked).square().mean()

    parts = outputs()
    assert held_at_zero(lambda y: loss(list(y)), parts) == ([2] if asked else [])
    assert held_at_zero(lambda y: loss(list(y)), parts, [2]) == [2]


@pytest.mark.parametrize(("activation", "stepped"), [("relu", [1]), ("tanh", [])])
def test_a_second_derivative_that_is_zero(activation: str, stepped: list[int]) -> None:
    x = torch.randn(6, 1, requires_grad=True)
    y = getattr(x * torch.randn(1, 4), activation)()
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    assert zero_by_steps([y, bend if stepped else 0 * y]) == stepped
