"""What a run keeps of its updates, step by step, and the record that comes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.optimizers import has_scheduler, is_left_alone, number_of, runs_hooks
from gradflow.functional.updates.figures import UpdateFigures
from gradflow.records import CurvatureRecord, UpdateRecord, UpdatesRecord

_SERIES = (
    "rate", "weight_rms", "rms", "gradient_rms", "slope", "shrink", "unchanged", "second_moment",
    "under_epsilon", "age", "finite",
)  # fmt: skip


@attrs.define(eq=False)
class UpdateLog:
    """The updates of a run so far; numbers of a step stay on the device until the record is made."""

    looks: dict[int, dict[str, UpdateFigures]] = attrs.field(factory=dict)
    clipping: dict[int, Tensor] = attrs.field(factory=dict)
    rates: dict[int, Sequence[float]] = attrs.field(factory=dict)
    loss_scale: dict[int, float] = attrs.field(factory=dict)
    curves: list[CurvatureRecord] = attrs.field(factory=list)
    undone: dict[int, dict[str, tuple[float, float]]] = attrs.field(factory=dict)
    num_skipped: int = 0

    def look(self, step: int, figures: dict[str, UpdateFigures]) -> None:
        """Keep the figures of the update after a step."""
        self.looks[step] = figures

    def put_back(self, step: int, shares: dict[str, tuple[float, float]]) -> None:
        """Keep what the model's own code put back of the update after a step, see `Stepped.undone`."""
        self.undone[step] = shares

    def updated(self, step: int, *, rates: Sequence[float], clipped: Tensor | None) -> None:
        """Hear of an update: the rates of all groups, and by what the gradient was clipped."""
        self.rates[step] = rates
        if clipped is not None:
            self.clipping[step] = clipped

    def scaled(self, step: int, scale: float) -> None:
        """Hear of the scale of the loss before an update, made or not."""
        self.loss_scale[step] = scale

    def skipped(self) -> None:
        """Hear of an update that was not made, since the loss or a gradient was not finite."""
        self.num_skipped += 1

    def bends(self, curve: CurvatureRecord) -> None:
        """Keep how the loss bends along an update."""
        self.curves.append(curve)

    def record(
        self, num_steps: int, owners: Mapping[str, str], optimizers: Iterable[torch.optim.Optimizer],
        known: Iterable[Tensor],
    ) -> UpdatesRecord:  # fmt: skip
        """Return the record.

        Args:
            num_steps: of the run.
            owners: the module that each parameter belongs to.
            optimizers: those that the user gave.
            known: the parameters of the model and the loss, as the user has them.
        """
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        steps, ids = sorted(self.looks), {id(p) for p in known}
        return UpdatesRecord(
            steps=steps,
            parameters=[self._of(name, layer, steps) for name, layer in owners.items() if self._has(name)],
            clipping=_series({step: float(share) for step, share in self.clipping.items()}, num_steps),
            rates=_series({step: _first(rates) for step, rates in self.rates.items()}, num_steps),
            group_rates=[
                _series({step: of[group] for step, of in self.rates.items() if group < len(of)}, num_steps)
                for group in range(max(map(len, self.rates.values()), default=0))
            ],
            loss_scale=_series(self.loss_scale, num_steps),
            num_updates=len(self.rates),
            num_skipped=self.num_skipped,
            stale=[
                f"tensor {place} of group {number}, shape {tuple(p.shape)}"
                for number, group in enumerate(groups)
                for place, p in enumerate(group["params"])
                if id(p) not in ids
            ],
            scheduled=any(map(_is_scheduled, optimizers)),
            left_alone=any(map(is_left_alone, optimizers)),
            curves=self.curves,
        )

    def _has(self, name: str) -> bool:
        return any(name in figures for figures in self.looks.values())

    def _of(self, name: str, layer: str, steps: list[int]) -> UpdateRecord:
        found = [self.looks[step].get(name) for step in steps]
        last = next(figures for figures in reversed(found) if figures is not None)
        numbers: dict[str, Any] = {
            field: [math.nan if figures is None else getattr(figures, field) for figures in found]
            for field in _SERIES
        }
        nothing, unknown = (0.0, math.nan), (math.nan, math.nan)
        back = [self.undone[step].get(name, nothing) if step in self.undone else unknown for step in steps]
        numbers["undone"] = [share for share, _ in back]
        numbers["levels"] = next((x for _, x in reversed(back) if not math.isnan(x)), math.nan)
        return UpdateRecord(
            name=name, layer=layer, held=last.held, group=last.group, epsilon=last.epsilon, **numbers
        )


def _first(rates: Sequence[float]) -> float:
    """Return the rate of the first group that has one."""
    return next((rate for rate in rates if not math.isnan(rate)), math.nan)


def _series(found: Mapping[int, float], num_steps: int) -> list[float]:
    return [found.get(step, math.nan) for step in range(num_steps)]


def _is_scheduled(optimizer: Any) -> bool:
    """Whether a rate was set below what it was built with; or all are zero, and hooks that may set them have
    not been run, or a scheduler holds the optimizer."""
    rates = [(number_of(g, "lr"), number_of(g, "initial_lr")) for g in optimizer.param_groups]
    idle = all(rate == 0 for rate, _ in rates) and (not runs_hooks(optimizer) or has_scheduler(optimizer))
    return idle or any(built > rate for rate, built in rates)
