"""Looks at the stages of a pipeline: what is refused, and how a jump of the loss makes all look.

The loss is known to the last stage alone; see NOTE [Who asks in time] in
`gradflow.functional.processes.appointments`.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import attrs
from torch import nn

from gradflow.errors import ModelInputError
from gradflow.functional.processes.appointments import Appointment
from gradflow.functional.processes.stages import Stages
from gradflow.functional.run.together.beside import connected
from gradflow.functional.torch_pipelining import classes_of
from gradflow.watching.schedule import is_jump
from gradflow.watching.state import ObserverState


def is_staged(model: Any) -> bool:
    """Whether a model is a stage of a pipeline, or a schedule that runs one."""
    return not isinstance(model, nn.Module) and bool(classes_of(model))


def check_staged(model: Any, processes: Any, forward_fn: Any = None, *, inside: bool = False) -> None:
    """Raise if a stage is to be looked at as none can be.

    Args:
        model: any.
        processes: which look together.
        forward_fn: as for `gradflow.observer`.
        inside: whether from inside the training's own passes.

    Raises:
        ModelInputError: if it is.
    """
    if not is_staged(model):
        return
    kind = type(model).__name__
    if isinstance(processes, str) and processes == "alone":
        raise ModelInputError(
            f"model is a {kind}, and processes='alone', but no stage of a pipeline can be looked at without "
            "the others. Pass processes='auto', and call the monitor on the process of every stage."
        )
    if forward_fn is not None:
        raise ModelInputError(
            f"model is a {kind}, and forward_fn was passed, but each stage takes what the one before hands "
            "on. Leave it out: a stage is called with that, and the first one with the inputs of its batch."
        )
    if inside:
        raise ModelInputError(
            f"model is a {kind}, whose schedule runs the passes of several microbatches by itself, in an "
            "order of its own, and these are not listened to. Look beside them, on the process of every "
            "stage: `report = monitor(batch)`, of a monitor with processes='auto'."
        )


def names_of(model: Any) -> set[str]:
    """Return the names that the modules of a model may have in a record; of a stage, those of its own."""
    stage = Stages.of(model).stage
    if stage is None:
        return {name for name, _ in model.named_modules()}
    names = [name for name, _ in stage.module.named_modules()]
    return {*names, *(f"stage{stage.index}.{name}".rstrip(".") for name in names)}


@attrs.frozen(eq=False)
class _Place:
    """Where a process stands among those that look together.

    Args:
        asked: which these are, as it was said.
        ranks: theirs.
        is_last: whether it has the last stage.
    """

    asked: Any
    ranks: tuple[int, ...]
    is_last: bool


_PLACES: weakref.WeakKeyDictionary[Any, _Place] = weakref.WeakKeyDictionary()  # to be asked in every step


def _place(model: Any, asked: Any) -> _Place:
    known = _PLACES.get(model)
    if known is None or known.asked is not asked:
        stages = Stages.of(model)
        connected(stages, asked)
        known = _PLACES[model] = _Place(asked, tuple(stages.line.ranks), stages.is_last)
    return known


def called(state: ObserverState, model: Any, asked: Any, step: int, loss: float | None) -> ObserverState:
    """Return the state with a look that is due because the loss has jumped two steps before, if it has.

    Where the last stage has its loss jump in this step, all others are asked to look.

    Args:
        state: the same on all processes.
        model: the stage of this process, or its schedule.
        asked: which processes look together.
        step: of the training.
        loss: of the step; None where it is not known.
    """
    if step >= state.due or state.ceiling == math.inf:
        return state
    place = _place(model, asked)
    appointment = _appointment(place, state)
    if place.is_last and loss is not None and is_jump(loss, state.ceiling):
        appointment.ask(step)
    since = appointment.since(step)
    return state if since is None else attrs.evolve(state, due=step, since=since)


def met(state: ObserverState, model: Any, asked: Any) -> None:
    """Forget what was asked for between two looks, of which the second is over.

    Args:
        state: of that time.
        model: the stage of this process, or its schedule.
        asked: which processes look together.
    """
    if state.ceiling < math.inf and (place := _place(model, asked)).is_last:
        _appointment(place, state).over()


def _appointment(place: _Place, state: ObserverState) -> Appointment:
    """Return what any of the processes has asked for since the last look."""
    last = state.history.steps[-1] if len(state.history) else -1
    return Appointment(place.ranks, f"{last}/{state.due}")
