"""How the loss of one batch bends along an update: what the step should have done, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.measurement import Session
from gradflow.functional.tap.nodes import topological
from gradflow.records import CurvatureRecord

FACTORS = tuple(8.0**k for k in range(-4, 9))  # of the update, at which the loss along it is taken

SHARE = 2.0**-6  # of the update, by which a central difference goes to either side
_COARSE = 2.0**-11  # a dtype that rounds by more than this takes whole updates

LossOf = Callable[[Mapping[str, Tensor]], Tensor]


@attrs.frozen
class Curvature:
    """The measurement of how the loss bends along an update; see `curvature`."""

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return _Asking()


class _Asking(Session):
    """Asks a run for it, and measures nothing itself."""

    def listens(self, *, end: bool) -> bool:
        return False

    def wants_curvature(self) -> bool:
        return True


def curvature() -> Curvature:
    """Return the measurement of how the loss bends along the first and the last update of a run.

    The record has it as `record.updates.curves`; without an optimizer there is none. It costs about as much
    as twenty steps more, most of which are forward passes for the loss along the updates.

    >>> import gradflow as gf
    >>> model = nn.Linear(2, 1)
    >>> sgd = torch.optim.SGD(model.parameters(), 0.1)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> loss = lambda y: y.square().mean()
    >>> record = gf.analyze(model, [x] * 5, loss, optimizer=sgd, measurements=[curvature()])
    >>> [(curve.step, curve.how) for curve in record.updates.curves]
    [(0, 'hessian-vector product'), (4, 'hessian-vector product')]
    """
    return Curvature()


def curvature_along(
    loss_of: LossOf,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    step: int = 0,
    factors: Sequence[float] = FACTORS,
) -> CurvatureRecord:
    """Return how a loss bends along an update u = after − before; a pure function.

    To second order L(θ + u) = L + g·u + ½ uᵀHu. The last is one Hessian-vector product: the derivative of
    g·u, taken along u once more. For plain descent u = −ηg, so uᵀHu / −g·u = η gᵀHg / gᵀg: sharpness along
    the gradient times rate, which full-batch training drives to 2, the edge of stability; above 2 a step
    climbs the other side. For Adam it is the preconditioned sharpness, along its own step.

    Where no second derivative is to be had (fused attention, an autograd function of one's own), it is the
    central difference of g·u over ±u/64, or over ±u in dtypes that would round such steps away.

    Args:
        loss_of: parameters by name → scalar loss. Must give the same loss for the same parameters: the same
            batch, the same random state, the same buffers.
        before: parameters before the update, by name.
        after: the same after it.
        step: kept in the record.
        factors: lengths, in units of u, at which the loss along it is taken; one forward pass each.

    Returns:
        The record. Cost: one forward, one backward and one double backward pass, and a forward pass for the
        loss after the update and for each of `factors`.

    Raises:
        Exception: what `loss_of` raises.

    Sources: Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
    ICLR 2021; Cohen et al., "Adaptive Gradient Methods at the Edge of Stability", 2022; Pearlmutter, "Fast
    Exact Multiplication by the Hessian", 1994.

    >>> bowl = lambda p: 0.5 * (torch.tensor([1.0, 10.0]) * p["x"] ** 2).sum()
    >>> x = torch.tensor([1.0, 1.0])
    >>> found = curvature_along(bowl, {"x": x}, {"x": x - 0.3 * torch.tensor([1.0, 10.0])})
    >>> round(found.slope, 4), round(found.bend, 4), round(found.predicted, 4), round(found.actual, 4)
    (-30.3, 90.09, 14.745, 14.745)
    >>> round(found.sharpness, 4)           # 0.3 gᵀHg / gᵀg: above 2, so the loss rises
    2.9733
    """
    update = {name: after[name].detach() - p.detach() for name, p in before.items()}
    loss, slope, bend, why = _second_order(loss_of, before, update)
    if bend is None:
        bend = _central(loss_of, before, update)

    def at(parameters: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return float(loss_of(parameters).detach()) - loss

    def moved(factor: float) -> dict[str, Tensor]:
        return {name: p.detach() + factor * update[name] for name, p in before.items()}

    return CurvatureRecord(
        step=step,
        how="hessian-vector product" if not why else "central difference",
        why=why,
        loss=loss,
        slope=slope,
        bend=bend,
        actual=at({name: p.detach() for name, p in after.items()}),
        factors=factors,
        changes=[at(moved(factor)) for factor in factors],
    )


def _second_order(
    loss_of: LossOf, before: Mapping[str, Tensor], update: Mapping[str, Tensor]
) -> tuple[float, float, float | None, str]:
    """Return the loss, g·u, uᵀHu, and why the last is not to be had."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in before.items()}
    loss = loss_of(leaves)
    if own := _own_functions(loss):
        slope = _along(loss, leaves, update)
        return float(loss.detach()), float(slope.detach()), None, f"{own} may hide its second derivative"
    try:
        slope = _along(loss, leaves, update, keep=True)
        # Without a graph the loss is linear in the parameters.
        bend = float(_along(slope, leaves, update).detach()) if slope.grad_fn is not None else 0.0
    except RuntimeError as error:
        loss = loss_of(leaves)
        slope = _along(loss, leaves, update)
        return float(loss.detach()), float(slope.detach()), None, _first_line(error)
    return float(loss.detach()), float(slope.detach()), bend, ""


def _own_functions(loss: Tensor) -> str:
    """Return the name of an autograd function written in Python that the loss was computed by; "" if none.

    What such a function does with numbers that it has kept may be unknown to autograd, and a derivative of
    its derivative then lacks that part without a word.
    """
    nodes = topological(loss.grad_fn) if loss.grad_fn is not None else []
    return next((node.name() for node in nodes if hasattr(type(node), "_forward_cls")), "")


def _along(
    of: Tensor, leaves: Mapping[str, Tensor], update: Mapping[str, Tensor], *, keep: bool = False
) -> Tensor:
    """Return the derivative of a scalar along the update."""
    found = torch.autograd.grad(of, list(leaves.values()), create_graph=keep, allow_unused=True)
    parts = [(g * u).double().sum() for g, u in zip(found, update.values(), strict=True) if g is not None]
    device = parts[0].device if parts else of.device
    return torch.stack([part.to(device) for part in parts]).sum() if parts else torch.zeros((), device=device)


def is_coarse(parameters: Mapping[str, Tensor]) -> bool:
    """Whether a small share of an update would be rounded away in the dtypes of parameters."""
    return any(p.dtype.is_floating_point and torch.finfo(p.dtype).eps > _COARSE for p in parameters.values())


def _central(loss_of: LossOf, before: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> float:
    reach = 1.0 if is_coarse(before) else SHARE
    slopes = []
    for side in (reach, -reach):
        leaves = {n: (p.detach() + side * update[n]).requires_grad_() for n, p in before.items()}
        slopes.append(float(_along(loss_of(leaves), leaves, update).detach()))
    return (slopes[0] - slopes[1]) / (2 * reach)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
