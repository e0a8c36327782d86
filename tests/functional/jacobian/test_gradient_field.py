"""Divergence and curl of gradient fields: closed forms, and the whole Jacobian by torch.func.jacrev."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import LossError, ModelInputError, NoTrainableParametersError, UnknownLayerError
from tests.functional.jacobian.models import Stateful, fingerprint


class Game(nn.Module):
    """Two vectors, one per player."""

    def __init__(self, width: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(width, dtype=dtype))
        self.y = nn.Parameter(torch.randn(width, dtype=dtype))


class Gan(nn.Module):
    """A generator and a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def gan_losses(noise: Tensor, real: Tensor) -> dict[str, Any]:
    def critic(model: Any) -> Tensor:
        return model.critic(model.generator(noise)).mean() - model.critic(real).mean()

    return {
        "critic": (critic, "critic"),
        "generator": (lambda model: -model.critic(model.generator(noise)).mean(), ["generator.*"]),
    }


def whole(model: nn.Module, losses: dict[str, Any]) -> Tensor:
    """Return the Jacobian of the field by plain autograd, one entry of the field at a time."""
    owned = {
        player: [p for n, p in model.named_parameters() if n.startswith(str(patterns).strip("[]'*."))]
        for player, (_, patterns) in losses.items()
    }
    field = []
    for player, (loss, _) in losses.items():
        field += torch.autograd.grad(loss(model), owned[player], create_graph=True)
    everything = [p for parameters in owned.values() for p in parameters]
    rows = []
    for entry in torch.cat([f.reshape(-1) for f in field]):
        grads = torch.autograd.grad(entry, everything, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("num_probes", [1, 16])
def test_the_bilinear_game_is_pure_rotation(width: int, num_probes: int) -> None:
    losses: Any = {"min": (lambda m: m.x @ m.y, "x"), "max": (lambda m: -(m.x @ m.y), "y")}
    field = gf.vector_field(Game(width), losses, num_probes=num_probes)
    assert (field.divergence, field.divergence_standard_error) == (0.0, 0.0)
    assert (field.curl, field.rotation) == (np.inf, 1.0)
    assert np.isnan(field.curl_standard_error)
    assert field.players == ("min", "max")
    estimated = gf.vector_field(Game(width), losses, max_exact=0)
    assert not estimated.is_exact
    assert estimated.divergence == 0.0


def test_one_loss_has_no_curl_and_the_laplacian_as_divergence() -> None:
    model, batch = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)),
        (torch.randn(8, 4), torch.randn(8, 2)),
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        model.to(dtype)
        data = tuple(t.to(dtype) for t in batch)
        field = gf.vector_field(model, nn.MSELoss(), data)
        assert field.curl < tolerance
        assert field.rotation < tolerance**2
        assert field.players == ("loss",)
        hessian = whole(
            model, {"loss": (lambda m, data=data: nn.functional.mse_loss(m(data[0]), data[1]), "")}
        )
        assert field.is_exact
        assert field.num_parameters == len(hessian) == 44
        assert field.divergence == pytest.approx(float(hessian.trace()), rel=1e-4)


def test_a_quadratic_field_of_known_parts() -> None:
    # F = (x + a y, y − a x): symmetric part 2 I, antisymmetric part a [[0, 1], [−1, 0]] twice over.
    for a in (0.0, 0.5, 3.0):
        losses: Any = {
            "one": (lambda m, a=a: (m.x @ m.x) / 2 + a * m.x @ m.y, "x"),
            "two": (lambda m, a=a: (m.y @ m.y) / 2 - a * m.x @ m.y, "y"),
        }
        field = gf.vector_field(Game(4, torch.float64), losses)
        assert field.divergence == pytest.approx(8.0)
        assert field.curl == pytest.approx(a)
        assert field.rotation == pytest.approx(a**2 / (1 + a**2))
        assert field.curl_standard_error == pytest.approx(0.0, abs=1e-9)


def test_a_field_that_does_not_change_has_neither() -> None:
    field = gf.vector_field(Game(3), lambda m: m.x.sum() + m.y.sum())
    assert (field.divergence, field.curl, field.rotation) == (0.0, 0.0, 0.0)


# ------------------------------------------------------------------------------- against the whole matrix


def test_a_gan_equals_its_whole_jacobian() -> None:
    model, losses = Gan().double(), gan_losses(torch.randn(5, 2).double(), torch.randn(5, 2).double())
    expected = whole(model, losses)
    jacobian = gf.field_jacobian(model, losses)
    torch.testing.assert_close(jacobian.dense(), expected)
    reverse: Any = torch.func.jacrev(jacobian.function)(jacobian.point)
    torch.testing.assert_close(reverse, expected)
    v = torch.randn(len(expected), dtype=torch.float64)
    h = 1e-5
    difference = (jacobian.function(jacobian.point + h * v) - jacobian.function(jacobian.point - h * v)) / (
        2 * h
    )
    torch.testing.assert_close(jacobian.jvp(v), difference, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jacobian.jvp(v), expected @ v)
    torch.testing.assert_close(jacobian.vjp(v), expected.T @ v)
    around, along = expected - expected.T, expected + expected.T
    field = gf.vector_field(model, losses, num_probes=400, seed=0, distribution="gaussian")
    assert field.divergence == pytest.approx(float(expected.trace()))
    drawn = torch.randn(len(expected), 4000, dtype=torch.float64)
    ratios = (around @ drawn).norm(dim=0) / (along @ drawn).norm(dim=0)
    assert field.curl == pytest.approx(float(ratios.mean()), abs=5 * field.curl_standard_error)
    shares = ratios**2 / (1 + ratios**2)
    assert field.rotation == pytest.approx(float(shares.mean()), abs=5 * field.rotation_standard_error)
    assert 0.05 < field.rotation < 1


def test_hutchinson_agrees_with_the_exact_trace() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(16, 4)
    loss = lambda y: y.square().mean()  # noqa: E731
    exact = gf.vector_field(model, loss, x)
    for distribution in ("rademacher", "gaussian"):
        found = gf.vector_field(
            model,
            loss,
            x,
            max_exact=0,
            num_probes=200,
            seed=0,
            distribution=distribution,  # type: ignore[arg-type]
        )
        assert found.divergence == pytest.approx(exact.divergence, abs=4 * found.divergence_standard_error)
        assert 0 < found.divergence_standard_error < 0.2 * exact.divergence
    assert np.isnan(gf.vector_field(model, loss, x, max_exact=0, num_probes=1).divergence_standard_error)


@pytest.mark.parametrize("kind", ["lstm", "attention", "batch_norm"])
def test_fused_layers_have_second_derivatives(kind: str) -> None:
    model: nn.Module
    if kind == "lstm":
        model, x = nn.LSTM(2, 3, batch_first=True), torch.randn(2, 3, 2)
    elif kind == "attention":
        model, x = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True), torch.randn(2, 3, 4)
    else:
        model, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), torch.randn(6, 2)
    before = fingerprint(model)
    field = gf.vector_field(
        model, lambda y: (y[0] if isinstance(y, tuple) else y).pow(3).mean(), x, num_probes=2, max_exact=0
    )
    assert field.curl < 1e-4
    assert fingerprint(model) == before


def test_the_same_random_numbers_at_every_evaluation() -> None:
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)), torch.randn(4, 3)
    one, two = (gf.vector_field(model, lambda y: y.square().mean(), x, seed=4) for _ in range(2))
    assert one == two
    assert one.curl < 1e-4


def test_an_actor_critic_on_a_batch() -> None:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = nn.Linear(3, 2), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.actor(x).log_softmax(-1), self.critic(x)

    def actor(output: Any, target: Any) -> Tensor:
        log_probabilities, value = output
        return -(log_probabilities.gather(1, target[0]) * (target[1] - value)).mean()

    def critic(output: Any, target: Any) -> Tensor:
        return (target[1] - output[1]).square().mean()

    model = ActorCritic()
    batch = torch.randn(8, 3), (torch.randint(0, 2, (8, 1)), torch.randn(8, 1))
    field = gf.vector_field(model, {"actor": (actor, "actor"), "critic": (critic, "critic")}, batch)
    assert 0 < field.rotation < 1  # the actor feels the critic, and the critic not the actor
    assert field.num_parameters == 12
    alone = gf.vector_field(model, {"critic": (critic, "critic.*")}, batch)
    assert alone.num_parameters == 4
    assert alone.curl < 1e-5


# ------------------------------------------------------------------------------------ purity and errors


@pytest.mark.parametrize("fail_at", [0, 1, 2, 4])
def test_everything_is_put_back(fail_at: int) -> None:
    model, x = Stateful(), torch.randn(6, 3)
    runs: list[int] = []

    def loss(output: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == fail_at:
            raise ZeroDivisionError("in the loss")
        return output.square().mean()

    before = fingerprint(model)
    with contextlib.suppress(ZeroDivisionError):
        gf.vector_field(model, loss, x, num_probes=2)
        assert not fail_at
    assert fingerprint(model) == before


def test_frozen_parameters_are_left_out() -> None:
    model = Game(2)
    model.y.requires_grad_(False)
    field = gf.vector_field(model, lambda m: (m.x @ m.x) * (m.y @ m.y))
    assert field.num_parameters == 2
    assert field.divergence == pytest.approx(4 * float(model.y @ model.y), rel=1e-5)
    with pytest.raises(NoTrainableParametersError, match="no parameter of Game requires a gradient"):
        gf.vector_field(model.requires_grad_(False), lambda m: m.x.sum())


def test_errors() -> None:
    model, loss = Game(2), lambda m: m.x @ m.y
    x = torch.randn(3, 2)
    with pytest.raises(ModelInputError, match="model is a dict, not a torch.nn.Module"):
        gf.vector_field({}, loss)  # type: ignore[arg-type]
    with pytest.raises(ModelInputError, match="the mapping of players is empty"):
        gf.vector_field(model, {})
    for player in (loss, (loss,), (loss, 3), (loss, [3])):
        with pytest.raises(ModelInputError, match=r"player 'a' is .* expected .its loss, its parameters."):
            gf.vector_field(model, {"a": player})  # type: ignore[dict-item]
    with pytest.raises(ModelInputError, match="parameter 'x' belongs to 'a' and to 'b'"):
        gf.vector_field(model, {"a": (loss, "x"), "b": (loss, "*")})
    with pytest.raises(UnknownLayerError, match="no entry named 'z'. The nearest of 2 names: x, y"):
        gf.vector_field(model, {"a": (loss, "z")})
    with pytest.raises(ModelInputError, match="without a batch a loss must be given"):
        gf.vector_field(model, None)
    with pytest.raises(ModelInputError, match="without a batch the loss of 'loss' is called as loss.model."):
        gf.vector_field(model, nn.MSELoss())
    with pytest.raises(LossError, match="the loss carries no gradient"):
        gf.vector_field(model, lambda m: (m.x @ m.y).detach())
    with pytest.raises(
        LossError, match="the loss carries no gradient"
    ):  # a player that is not in its own loss
        gf.vector_field(model, {"a": (lambda m: m.x.sum(), "y")})
    with pytest.raises(LossError, match="not one number"):
        gf.vector_field(nn.Linear(2, 2), lambda y: y, x)
    with pytest.raises(ValueError, match="num_probes must be a whole number"):
        gf.vector_field(model, loss, num_probes=0)
    with pytest.raises(ValueError, match="distribution must be"):
        gf.vector_field(model, loss, distribution="cauchy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional") as caught:
        gf.vector_field(nn.Linear(2, 2), lambda y: y.sum(), (x, x))
    assert "raised by the model or the loss of player 'loss'" in caught.value.__notes__[0]
