"""Divergence and curl of a gradient field in parameter space, for one loss or one per player."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import LossError, ModelInputError, UnknownLayerError
from gradflow.functional.jacobian.jacobian import Jacobian, check_count
from gradflow.functional.jacobian.sample_losses import no_trainable
from gradflow.functional.jacobian.singular import Distribution, make_generator, probe_vector
from gradflow.functional.model.batches import (
    checked_loss,
    detached_loss,
    invoke,
    make_objective,
    private_batch,
)
from gradflow.functional.model.setting import Held, Setting
from gradflow.functional.model.state import Tensors
from gradflow.functional.model.supported import check_model
from gradflow.functional.model.threads import measuring
from gradflow.functional.model.trees import map_tensors
from gradflow.records import float_field

Losses = Callable[..., Any] | Mapping[str, tuple[Callable[..., Any], str | Sequence[str]]] | None
_SHOW = '`{"generator": (g_loss, "generator"), "critic": (c_loss, "critic")}`'


@attrs.frozen(kw_only=True)
class VectorField:
    """Divergence and curl of a gradient field with the Jacobian J.

    Args:
        players: their names, in order; `("loss",)` for one loss.
        num_parameters: elements of the parameters that the field lives on.
        divergence: tr J, the sum of the curvatures along every parameter: positive where gradient descent
            draws nearby points together. Units: loss per squared unit of parameter.
        divergence_standard_error: 0 where the trace is exact.
        curl: mean over random v of ‖(J − Jᵀ)v‖ / ‖(J + Jᵀ)v‖. 0 for one loss, ∞ for pure rotation.
        curl_standard_error: of it; NaN with one probe or an infinite curl.
        rotation: mean of ‖(J − Jᵀ)v‖² / (‖(J − Jᵀ)v‖² + ‖(J + Jᵀ)v‖²), in [0, 1]: the share of the field's
            change that goes round instead of down.
        rotation_standard_error: of it; NaN with one probe.
        num_probes: random v used.
        is_exact: whether the trace is the sum of J's diagonal instead of an estimate.
    """

    players: tuple[str, ...]
    num_parameters: int
    divergence: float = float_field(math.nan)
    divergence_standard_error: float = float_field(math.nan)
    curl: float = float_field(math.nan)
    curl_standard_error: float = float_field(math.nan)
    rotation: float = float_field(math.nan)
    rotation_standard_error: float = float_field(math.nan)
    num_probes: int = 0
    is_exact: bool = False


@measuring()
def vector_field(
    model: nn.Module,
    losses: Losses,
    batch: Any = None,
    *,
    num_probes: int = 16,
    seed: int | None = None,
    distribution: Distribution = "rademacher",
    max_exact: int = 128,
) -> VectorField:
    """Return divergence and curl of the field of gradients that training follows, at the present parameters.

    The field is F(θ) = (∂L_1/∂θ_1, …, ∂L_p/∂θ_p): each player's loss by its own parameters, as in a GAN or
    an actor-critic; for one loss, its gradient. With J = ∂F/∂θ the divergence is tr J, by Hutchinson's
    estimate E vᵀJv; the curl compares the parts of J that are antisymmetric and symmetric, by JVP and VJP on
    random v. One loss has a symmetric J, its Hessian, and no curl. In a game the antisymmetric part makes
    simultaneous gradient descent cycle (Balduzzi et al., 2018, arXiv:1802.05642; Mescheder, Nowozin and
    Geiger, 2017, arXiv:1705.10461).

    Args:
        model: a module that holds all players, in the modes that it is to be measured in.
        losses: one loss, or a mapping from a player's name to (its loss, its parameters): globs or prefixes
            of qualified names, one or several. Every player minimises: who maximises L minimises −L.
            Parameters that belong to no player, or require no gradient, are fixed.
        batch: with a batch, a loss is called as `analyze` calls it, on the model's output, (output) or
            (output, target), None for the loss that the model computes itself. Without one, each loss is
            called as `loss(model)` and runs the model as it likes.
        num_probes: random v.
        seed: for the run and the probes; every evaluation sees the same random numbers.
        distribution: of the entries of v, `rademacher` or `gaussian`.
        max_exact: up to this many parameters the trace is the exact sum of the diagonal.

    Raises:
        ModelInputError: if the model, the losses or the batch cannot be used as such, or two players share
            a parameter.
        UnknownLayerError: if a player's pattern names no parameter that requires a gradient.
        LossError: if a loss is no scalar or carries no gradient.
        NoTrainableParametersError: if no parameter requires a gradient.
        ModelCallError: if a second derivative does not exist.
        ValueError: if `num_probes` or `distribution` is none of those above.

    >>> class Game(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.x, self.y = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
    >>> field = vector_field(Game(), {"min": (lambda m: m.x * m.y, "x"), "max": (lambda m: -m.x * m.y, "y")})
    >>> field.divergence, field.curl, field.rotation
    (0.0, inf, 1.0)
    """
    check_count("num_probes", num_probes)
    players, jacobian = _field(model, losses, batch, seed)
    generator = make_generator(seed)
    traces, curls, rotations = [], [], []
    for _ in range(num_probes):
        v = probe_vector(jacobian.point, distribution, generator)
        pushed, pulled = jacobian.jvp(v).double(), jacobian.vjp(v).double()
        around, along = float((pushed - pulled).norm()), float((pushed + pulled).norm())
        traces.append(float(v.double() @ pushed))
        curls.append(around / along if along else math.inf if around else 0.0)
        rotations.append(around**2 / (around**2 + along**2) if around or along else 0.0)
    number = jacobian.point.numel()
    exact = number <= max_exact
    divergence = (_trace(jacobian), 0.0) if exact else _mean(traces)
    curl, rotation = _mean(curls), _mean(rotations)
    return VectorField(
        players=players, num_parameters=number, divergence=divergence[0],
        divergence_standard_error=divergence[1], curl=curl[0], curl_standard_error=curl[1],
        rotation=rotation[0], rotation_standard_error=rotation[1], num_probes=num_probes, is_exact=exact,
    )  # fmt: skip


@measuring()
def field_jacobian(
    model: nn.Module, losses: Losses, batch: Any = None, *, seed: int | None = None
) -> Jacobian:
    """Return the Jacobian of the gradient field as a linear map; the Hessian, for one loss.

    Args:
        model, losses, batch, seed: as for `vector_field`.

    Returns:
        The map, on the parameters of all players in order, flat in one vector.

    Raises:
        GradflowError: those that `vector_field` raises.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> field_jacobian(model, lambda y: y.square().sum(), torch.tensor([[1.0, 2.0]])).dense()
    tensor([[2., 4.],
            [4., 8.]])
    """
    return _field(model, losses, batch, seed)[1]


def _trace(jacobian: Jacobian) -> float:
    total = 0.0
    for index in range(jacobian.point.numel()):
        unit = torch.zeros_like(jacobian.point)
        unit[index] = 1.0
        total += float(jacobian.jvp(unit)[index])
    return total


def _mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    if not bool(torch.isfinite(found).all()):
        return float(found.mean()), math.nan
    error = float(found.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(found.mean()), error


# ------------------------------------------------------------------------------------ the field


def _field(
    model: nn.Module, losses: Losses, batch: Any, seed: int | None
) -> tuple[tuple[str, ...], Jacobian]:
    """Return the players' names, and the Jacobian of their field."""
    check_model(model)
    players = _players(losses)
    calls = {name: _loss_call(model, name, loss, batch) for name, (loss, _) in players.items()}
    setting = Setting.of(model, *(loss for loss, _ in players.values()), seed=seed)
    if not setting.trainable:
        raise no_trainable(model)
    owned = _owned({name: patterns for name, (_, patterns) in players.items()}, setting.trainable)
    order = [parameter for parameters in owned.values() for parameter in parameters]

    def loss_of(player: str, parameters: Tensors) -> Tensor:
        with setting.evaluating(parameters):
            return checked_loss(calls[player]())

    def field(flat: Tensor) -> Tensor:
        parameters = _unflattened(flat, order, setting.trainable)
        gradients = []
        for player, names in owned.items():
            gradient = torch.func.grad(lambda own, player=player: loss_of(player, {**parameters, **own}))
            found: Tensors = gradient({name: parameters[name] for name in names})
            gradients += [found[name].reshape(-1).to(flat.dtype) for name in names]
        return torch.cat(gradients)

    with torch.inference_mode(False), torch.enable_grad():
        for player, names in owned.items():
            _check_loss(player, lambda own, player=player: loss_of(player, own), setting, names)
        point = torch.cat([setting.trainable[name].reshape(-1) for name in order])
    return tuple(players), Jacobian(Held(field, setting), point, name="the gradient field")


def _unflattened(flat: Tensor, order: list[str], like: Tensors) -> Tensors:
    parts = flat.split([like[name].numel() for name in order])
    return {
        name: part.reshape(like[name].shape).to(like[name].dtype)
        for name, part in zip(order, parts, strict=True)
    }


def _players(losses: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Return (loss, patterns) by the name of the player."""
    if not isinstance(losses, Mapping):
        return {"loss": (losses, ("*",))}
    players: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for name, player in losses.items():
        patterns = player[1] if isinstance(player, (tuple, list)) and len(player) == 2 else None
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            raise ModelInputError(
                f"vector_field: player {name!r} is {player!r:.100}; expected (its loss, its parameters), the "
                f"parameters by a glob or a prefix of their names: {_SHOW}."
            )
        players[str(name)] = (player[0], tuple(patterns))
    if not players:
        raise ModelInputError(
            f"vector_field: the mapping of players is empty. Pass one loss, or players: {_SHOW}."
        )
    return players


def _loss_call(model: nn.Module, player: str, loss: Any, batch: Any) -> Callable[[], Any]:
    """Return how a player's loss is computed."""
    if batch is None and loss is None:
        raise ModelInputError(
            "vector_field: without a batch a loss must be given, a function of the model: "
            "`lambda model: ...`. Pass `batch=` for the loss that the model computes itself."
        )
    objective = make_objective(loss)
    if batch is not None:
        held = private_batch(model, batch)

        def on_batch() -> Any:
            own = map_tensors(Tensor.clone, held)
            return objective.loss(invoke(model, objective.inputs(own)), own)

        return on_batch
    if objective.takes_target:
        raise ModelInputError(
            f"vector_field: without a batch the loss of {player!r} is called as loss(model), and this one "
            "takes two arguments. Pass `batch=(inputs, target)`, or a function of the model alone."
        )
    return lambda: loss(model)


def _owned(players: dict[str, tuple[str, ...]], trainable: Tensors) -> dict[str, list[str]]:
    """Return the parameters of every player."""
    taken: dict[str, str] = {}
    owned: dict[str, list[str]] = {}
    for player, patterns in players.items():
        for pattern in patterns:
            found = [name for name in trainable if _matches(name, pattern)]
            if not found:
                raise UnknownLayerError.at(pattern, list(trainable))
            for name in found:
                if taken.setdefault(name, player) != player:
                    raise ModelInputError(
                        f"vector_field: the parameter {name!r} belongs to {taken[name]!r} and to {player!r}. "
                        "A field has one gradient for each parameter: give it to one of them, or to none."
                    )
        owned[player] = [name for name in trainable if taken.get(name) == player]
    return owned


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(pattern.rstrip(".") + ".")


def _check_loss(player: str, loss: Callable[[Tensors], Tensor], setting: Setting, names: list[str]) -> None:
    """Run a loss once as it is: what the user's code raises is seen before any transform."""
    leaves = {name: setting.trainable[name].clone().requires_grad_() for name in names}
    try:
        found = loss(leaves)
    except LossError:
        raise
    except Exception as error:
        error.add_note(f"gradflow: raised by the model or the loss of player {player!r}.")
        raise
    if not found.requires_grad:
        raise detached_loss()
