"""What the user's own training loop does between two batches, as options."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch.optim import Optimizer

from gradflow.errors import ModelInputError

StepFunction = Callable[[Any, Any, Any], Any]


def _a_norm(loop: Loop, field: attrs.Attribute[float | None], value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{field.name} must be a positive number, the norm to clip to, got {value!r}.")


def _a_count(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(
            f"accumulate must be a whole number of at least 1, of batches to an update, got {value!r}."
        )
    return operator.index(value)


@attrs.frozen(kw_only=True, eq=False)
class Loop:
    """What the user's training loop does between two batches; see `gradflow.analyze` for the meaning of each.

    Raises:
        ValueError: if `clip` is no positive number, `accumulate` no whole number of at least 1, or one of
            them is given without an optimizer, or beside a `step_fn` that does it itself.
        ModelInputError: if `scheduler`, `scaler` or `step_fn` is not what it should be.
    """

    optimizer: Any = None
    clip: float | None = attrs.field(default=None, validator=_a_norm)
    accumulate: int = attrs.field(default=1, converter=_a_count)
    scheduler: Any = None
    scaler: Any = None
    step_fn: StepFunction | None = None

    def __attrs_post_init__(self) -> None:
        said = {
            "clip": (self.clip is not None, f"clip={self.clip!r} says how updates are clipped"),
            "accumulate": (self.accumulate > 1, f"accumulate={self.accumulate} says when updates are made"),
            "scheduler": (self.scheduler is not None, "scheduler says how their rates change"),
            "scaler": (self.scaler is not None, "scaler says how the loss is scaled for them"),
            "step_fn": (self.step_fn is not None, "step_fn says how they are made"),
        }
        for given, what in said.values():
            if given and not self.optimizers:
                raise ValueError(
                    f"{what}, and there is no optimizer: pass `optimizer=` as well, or leave it out."
                )
        for name in ("clip", "accumulate", "scaler") if self.step_fn is not None else ():
            if said[name][0]:
                raise ValueError(f"{said[name][1]}, and so does step_fn: leave one of them out.")
        if self.step_fn is not None and not callable(self.step_fn):
            raise ModelInputError(
                f"step_fn is {self.step_fn!r:.100}, which cannot be called. Pass a function that makes one "
                "step of training, `def step_fn(model, batch, optimizer): ...`."
            )
        for scheduler in self.schedulers:
            if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "optimizer"):
                raise ModelInputError(
                    f"scheduler holds a {type(scheduler).__name__}, which is no scheduler of rates. "
                    "Pass one of `torch.optim.lr_scheduler`, or several in a list."
                )
            if not any(scheduler.optimizer is optimizer for optimizer in self.optimizers):
                raise ModelInputError(
                    f"the {type(scheduler).__name__} steps another optimizer than the one given. Build it on "
                    "that one: `scheduler = CosineAnnealingLR(optimizer, ...)`."
                )
        if self.scaler is not None and not all(
            callable(getattr(self.scaler, name, None)) for name in ("scale", "unscale_", "step", "update")
        ):
            raise ModelInputError(
                f"scaler is a {type(self.scaler).__name__}, which scales no loss. Pass the scaler itself: "
                "`scaler=torch.amp.GradScaler()`."
            )

    @property
    def optimizers(self) -> tuple[Any, ...]:
        """All optimizers, of one, a mapping or a sequence."""
        return tuple(_several(self.optimizer, Optimizer))

    @property
    def schedulers(self) -> tuple[Any, ...]:
        """All schedulers, likewise."""
        return tuple(_several(self.scheduler, ()))

    @property
    def name(self) -> str:
        """The optimizers' class names; "" without any."""
        return ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)

    def like(self, optimizers: Sequence[Any]) -> Any:
        """Return other optimizers in the form in which these were given."""
        if isinstance(self.optimizer, Mapping):
            return dict(zip(self.optimizer, optimizers, strict=True))
        if isinstance(self.optimizer, (list, tuple)):
            return type(self.optimizer)(optimizers)
        return optimizers[0]

    def described(self) -> str:
        """Return what the loop is taken to do between two batches, in words; "" without an optimizer."""
        if not self.optimizers:
            return ""
        rates = "rates as the scheduler sets them" if self.schedulers else "rates as they stand"
        if self.step_fn is not None:
            return f"steps by step_fn, on copies; {rates}"
        every = f"{self.accumulate} batches, with their mean gradient"
        said = [
            f"an update after {'every batch' if self.accumulate == 1 else every}",
            "no clipping" if self.clip is None else "clipping as told",
            *(("loss scaled by the scaler",) if self.scaler is not None else ()),
            rates,
        ]
        options = {"clip": self.clip, "accumulate": self.accumulate > 1, "scheduler": self.scheduler}
        unsaid = [f"{name}=" for name, value in options.items() if not value]
        return f"{', '.join(said)}" + (f" (assumed without {', '.join(unsaid)})" if unsaid else "")


def _several(value: Any, one: Any) -> Iterator[Any]:
    if value is None:
        return
    if isinstance(value, Mapping) and not isinstance(value, one):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    else:
        yield value
