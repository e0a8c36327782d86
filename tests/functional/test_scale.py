"""The gradient scale: the identity forward, a factor on whatever derivative passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from gradflow.functional import GradientScale, analyze, gradient_scale

X = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SCALES = [0.0, 1.0, -1.0, 0.25, 3.0]
WAYS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "apply": GradientScale.apply,
    "function": gradient_scale,
}
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def cube(x: Tensor, scale: float, way: str = "function") -> Tensor:
    return (WAYS[way](x, scale) ** 3).sum()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", SCALES)
def test_identity_forward_and_a_factor_backward(way: str, scale: float) -> None:
    x = X.clone().requires_grad_()
    y = WAYS[way](x, scale)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad((y**3).sum(), [x])
    assert torch.equal(gradient, 3 * X**2 * scale)


@pytest.mark.parametrize("scale", SCALES)
def test_under_torch_func(scale: float) -> None:
    expected = 3 * X**2 * scale
    assert torch.equal(grad(cube)(X, scale), expected)
    _, pull = vjp(lambda x: cube(x, scale), X)
    torch.testing.assert_close(pull(torch.tensor(2.0, dtype=torch.float64))[0], 2 * expected)
    batch = torch.stack([X, 2 * X])
    torch.testing.assert_close(vmap(grad(cube), in_dims=(0, None))(batch, scale), 3 * batch**2 * scale)
    torch.testing.assert_close(jacrev(lambda x: gradient_scale(x, scale))(X), scale * torch.eye(4).double())


@FORWARD_MODE
@pytest.mark.parametrize("scale", SCALES)
def test_forward_mode_is_the_transpose_of_reverse_mode(scale: float) -> None:
    tangent = torch.linspace(-1, 1, 4, dtype=torch.float64)
    value, pushed = jvp(lambda x: gradient_scale(x, scale), (X,), (tangent,))
    assert torch.equal(value, X)
    assert torch.equal(pushed, scale * tangent)
    torch.testing.assert_close(jacfwd(lambda x: cube(x, scale))(X), jacrev(lambda x: cube(x, scale))(X))


@FORWARD_MODE
def test_second_derivatives_carry_the_factor_twice() -> None:
    # d/dx of s·3x² where the factor applies on every pass: s²·6x on the diagonal
    second = hessian(lambda x: cube(x, 0.5))(X)
    torch.testing.assert_close(second, torch.diag(0.25 * 6 * X))


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_numeric_derivatives_differ_from_it_by_the_factor_alone(factor: float) -> None:
    # central differences see the identity; gradcheck of the function divided by the factor passes
    assert torch.autograd.gradcheck(lambda x: gradient_scale(x, 1.0) ** 3, (X.clone().requires_grad_(),))
    step = 1e-6
    numeric = torch.stack(
        [(cube(X + e, factor) - cube(X - e, factor)) / (2 * step) for e in step * torch.eye(4).double()]
    )
    torch.testing.assert_close(grad(cube)(X, factor), factor * numeric, rtol=1e-6, atol=1e-9)


def test_a_reversal_layer_turns_the_gradient_round() -> None:
    model = nn.Linear(4, 3).double()
    (plain,) = torch.autograd.grad(model(X).sum(), [model.bias])
    (turned,) = torch.autograd.grad(gradient_scale(model(X), -1.0).sum(), [model.bias])
    assert torch.equal(turned, -plain)


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_in_a_model_that_is_measured(transform: str) -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 1), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.b(gradient_scale(self.a(x), self.scale))

    def measured(scale: float) -> list[float]:
        record = analyze(Scaled(scale).double(), [X[None]], lambda y: y.sum(), transform=transform)  # type: ignore[arg-type]
        return [float(record[name].grad_norm[0]) for name in ("a", "b")]

    one, small = measured(1.0), measured(0.125)
    assert small == [pytest.approx(one[0] / 8), one[1]]
    assert measured(0.0)[0] == 0.0
