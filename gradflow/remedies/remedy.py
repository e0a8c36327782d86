"""A remedy: a fix as a value, which has a name, words, code to paste, and a function that applies it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
from torch import nn
from torch.optim import Optimizer

from gradflow.errors import RemedyError
from gradflow.records import Cause, FlowRecord

Change = Callable[[nn.Module, Optimizer], tuple[nn.Module, Optimizer]]


def _always(cause: Cause, record: FlowRecord) -> bool:
    return True


def _as_it_is(value: Any) -> Any:
    return value


def _a_text(remedy: Remedy, field: attrs.Attribute[str], value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise RemedyError(f"Remedy: {field.name} must be a text that is not empty, got {value!r:.100}.")


def _callable(remedy: Remedy, field: attrs.Attribute[Any], value: Any) -> None:
    if not callable(value):
        raise RemedyError(
            f"Remedy: {field.name} is {value!r:.100}, which cannot be called. Pass a function"
            f"{' of (model, optimizer) that returns both' if field.name == 'apply' else ''}."
        )


@attrs.frozen(kw_only=True)
class Remedy:
    """A fix that can be tried: what it changes, in words, as code, and as a function on copies.

    `a + b` is the remedy that does `a`, then `b`.

    Args:
        name: short, and its own: `kaiming_normal_ on fc2`.
        words: what it changes, in one sentence.
        code: the same as code to paste.
        apply: (model, optimizer) → (model, optimizer). Both are copies, and it may change them in place.
            Random states are those of the trial's seed. Parameters that it makes join the optimizer's first
            group by themselves. What it raises is the reason why it could not be tried.
        applies: (cause, record) → whether it is worth a trial.
        on_batches: changes the batches that were drawn; as many come back, or fewer.
        on_loss: changes the loss; called with a copy of it that sees the model's copy.
        general: whether it makes most networks learn faster, sick or not, as norms, skips and better starts
            do. It then has to do twice as much until it counts.

    Raises:
        RemedyError: if a text is empty, or what must be a function cannot be called.

    >>> import torch
    >>> from torch import nn
    >>> def gelu(model, optimizer):
    ...     model[1] = nn.GELU()
    ...     return model, optimizer
    >>> remedy = Remedy(name="gelu", words="GELU for ReLU.", code="model[1] = nn.GELU()", apply=gelu)
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> remedy.apply(model, torch.optim.SGD(model.parameters(), lr=0.1))[0][1]
    GELU(approximate='none')
    """

    name: str = attrs.field(validator=_a_text)
    words: str = attrs.field(validator=_a_text)
    code: str = attrs.field(validator=_a_text)
    apply: Change = attrs.field(validator=_callable, repr=False)
    applies: Callable[[Cause, FlowRecord], bool] = attrs.field(
        default=_always, validator=_callable, repr=False
    )
    on_batches: Callable[[Sequence[Any]], Sequence[Any]] = attrs.field(
        default=_as_it_is, validator=_callable, repr=False
    )
    on_loss: Callable[[Any], Any] = attrs.field(default=_as_it_is, validator=_callable, repr=False)
    general: bool = False

    def __add__(self, other: Remedy) -> Remedy:
        """Return the remedy that does this one, then the other."""
        if not isinstance(other, Remedy):
            return NotImplemented
        return Remedy(
            name=f"{self.name} + {other.name}",
            words=f"{self.words} {other.words}",
            code=f"{self.code}\n{other.code}",
            apply=lambda model, optimizer: other.apply(*self.apply(model, optimizer)),
            applies=lambda cause, record: self.applies(cause, record) and other.applies(cause, record),
            on_batches=lambda batches: other.on_batches(self.on_batches(batches)),
            on_loss=lambda loss_fn: other.on_loss(self.on_loss(loss_fn)),
            general=self.general or other.general,
        )


def unchanged(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """Return both as they are: the change of a remedy that works on batches or loss alone."""
    return model, optimizer


def on_model(change: Callable[[nn.Module], nn.Module | None]) -> Change:
    """Return a change of the model alone as a change of both.

    Args:
        change: model → the model that takes its place; None where it was changed in place.
    """

    def apply(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        changed = change(model)
        return model if changed is None else changed, optimizer

    return apply


def on_optimizer(change: Callable[[Optimizer], Optimizer | None]) -> Change:
    """Return a change of the optimizer alone as a change of both.

    Args:
        change: optimizer → the one that takes its place; None where it was changed in place.
    """

    def apply(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        changed = change(optimizer)
        return model, optimizer if changed is None else changed

    return apply
