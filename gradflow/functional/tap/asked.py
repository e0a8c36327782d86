"""What is asked of one step, and those who listen to it while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from gradflow.functional.tap.calls import ActivationKey, Call

if TYPE_CHECKING:
    from gradflow.functional.tap.recorder import Recorder


class NeedsRetry(Exception):
    """The step must be run again, for a reason that the model's taps have noted; never seen by a user."""


class MoreSlots(NeedsRetry):
    """The step has more probes than it was given slots."""


class Listener:
    """Hears of what happens in a step. Here, every method does nothing.

    All but `differentiate` are called without grad mode (`recorder.grad_enabled` tells the model's own), and
    with functions unwatched.
    """

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start a step, or start it again: then forget what was heard of it.

        Args:
            step: its number.
            recorder: of this step; `recorder.calls` are the module calls so far, and `recorder.running()`
                those that are running.
        """

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Hear that a module call starts, with its arguments."""

    def left(self, call: Call, output: Any) -> None:
        """Hear that a module call has ended, with the output that its caller gets."""

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Hear that a PyTorch function is called; what is returned is called with its output."""

    def probed(self, output: Tensor, standing_in: Tensor) -> None:
        """Hear that a layer's output goes on as another tensor, which carries its probe."""

    def differentiate(self, loss: Tensor) -> None:
        """Hear that the forward pass is over, and the reverse pass comes next."""


@attrs.frozen(kw_only=True, eq=False)
class Asked:
    """What is asked of one step; handed to its recorder at its beginning.

    Args:
        look: the costlier statistics of the forward pass are taken.
        structural: containers are looked at as well, and where every call starts and ends.
        inputs: every call notes whether what enters it requires a gradient.
        watched: functions are watched, see `watch.py`.
        ordinary: nothing is taken of the forward pass, so that the records of its calls can be used again.
        captured: names of the calls whose gradients are captured; see NOTE [Captured gradients] in probes.py.
        rectifiers: the key of every call of a rectifier that is followed though nothing is watched.
        slots: those to use, under `torch.func.vjp`.
        listeners: are told of every call, and of every function that is called.
    """

    look: bool = False
    structural: bool = False
    inputs: bool = False
    watched: bool = False
    ordinary: bool = False
    captured: Collection[str] = ()
    rectifiers: Mapping[str, ActivationKey] = attrs.field(factory=dict)
    slots: list[Tensor] | None = None
    listeners: tuple[Listener, ...] = ()
