"""Which outputs a loss merely adds, which are held at zero, and which it asks for apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradflow.functional.reverse.constants import asked_apart, held_at_zero, merely_added, zero_by_steps


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


@pytest.mark.parametrize(("judges", "added"), [(True, []), (False, [1])])
def test_what_a_loss_looks_at_with_weights_of_its_own(judges: bool, added: list[int]) -> None:
    """A judge learns by the real samples that it is shown, also where no other slope hangs on them."""
    weight = torch.randn(2, 1, requires_grad=judges)

    def loss(y: list[Tensor]) -> Tensor:
        return y[0].square().mean() + (y[1] @ weight).sigmoid().log().neg().mean()

    assert merely_added(lambda y: loss(list(y)), outputs()) == added


def asked(loss: Callable[[Tensor, Tensor], Tensor], parts: list[Tensor]) -> list[float]:
    def loss_of(moved: Callable[[int, Tensor], Tensor]) -> float:
        return float(loss(moved(0, parts[0]), moved(1, parts[1])))

    found = asked_apart(loss_of, float(loss(*parts)), tuple(parts), {0, 1})
    return [found[id(part)] for part in parts] if found else []


APART: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "a divergence": (True, lambda a, b: 0.5 * (a.square() + b.exp() - b).sum(1).mean()),
    "a weighted one": (True, lambda a, b: 7.0 + 50 * a.square().mean() + 50 * (b.exp() - b).mean()),
    "two views": (False, lambda a, b: (a - b).square().mean()),
    "directions": (False, lambda a, b: -F.cosine_similarity(a, b).mean()),
    "likenesses": (False, lambda a, b: F.cross_entropy(a @ b.T, torch.arange(len(a)))),
    "a density": (False, lambda a, b: (b + 0.5 * ((3 - a) / b.exp()).square()).mean()),
    "one of them": (False, lambda a, b: a.square().mean() + 0 * b.mean()),
}


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("kind", APART)
def test_outputs_that_a_loss_asks_for_apart(kind: str, collapsed: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(64, 5), torch.randn(64, 5)]
    if collapsed:
        parts = [1 + 1e-6 * part for part in parts]
    apart, loss = APART[kind]
    assert bool(asked(loss, parts)) == apart


def test_the_price_of_a_mean_is_half_its_weight_a_number() -> None:
    parts = [torch.zeros(4000, 3), torch.zeros(4000, 3)]
    rises = asked(lambda a, b: 8 * 0.5 * (a.square() + b.exp() - 1 - b).sum(1).mean(), parts)
    assert rises[0] == pytest.approx(8 * 0.5 * 3, rel=0.05)


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
