"""`GradflowCallback`: watches a training that the `Trainer` of Hugging Face runs, by its own loss.

    trainer.add_callback(GradflowCallback(trainer, every=200, path="history.jsonl"))

NOTE [How the batch is seen]
Callbacks of `Trainer` are handed no inputs and no loss. So for the length of `train()` the trainer's
`compute_loss` is wrapped, as an attribute of this one trainer, and the wrapper takes down what it was called
with and what it returned. There the inputs are on their device and prepared, whatever a subclass does before;
the collator would run in other processes, and a hook on the model would be seen by the model's other users.
What evaluation computes is not taken down: only what is between the beginning and the end of a step is.

NOTE [The trainer's stand-in]
`compute_loss` may log and count on the trainer (those of TRL keep lists of metrics there). So a look calls it
on a copy of the trainer whose containers are copies too, and whose `log` does nothing.
"""

from __future__ import annotations

import collections
import copy
import os
import types
from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor, nn

from gradflow.integrations.trackers import Tracker, Which
from gradflow.integrations.watched import Watched
from gradflow.watching.look import copied

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "gradflow.integrations.transformers needs Transformers: pip install 'gradient-flow[transformers]'."
    ) from error


class GradflowCallback(Watched, TrainerCallback):
    """Watches a training of Hugging Face's `Trainer`: its own loss, accumulation, half precision.

    A look runs the trainer's `compute_loss` (the model's own loss, `compute_loss_func`, label smoothing, a
    subclass's) once more on copies, on the last batch before an update: the weights come out the same bit for
    bit, and nothing is logged twice. Looks are numbered by the trainer's `global_step`; with `path` a
    training that is resumed from a checkpoint goes on in the same file. In a distributed training the first
    process looks at its own batches; models whose parameters are spread over processes (FSDP, ZeRO-3) cannot
    be watched so.

    Args:
        trainer: that the callback is added to.
        every: steps between two looks in the long run; more often at the start, and where the loss jumps.
        path: a file for the history, as for `gradflow.Monitor`.
        log: which scalars of the reports go to `trainer.log`: `few`, `all`, or None for none.
        pipeline: judges a look; as for `gradflow.diagnose`.

    Raises:
        ImportError: when this file is imported, if there is no Transformers.
        ValueError: if `log` is none of these.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        every: int = 200,
        path: str | os.PathLike[str] | None = None,
        log: Which | None = None,
        pipeline: Any = None,
    ) -> None:
        super().__init__(every, path, pipeline)
        self._trainer = trainer
        self._in_step = False
        self._call: _Call | None = None
        self._wrapper: Any = None
        self._own_loss: Any = None
        if log is not None:
            self.on_look(Tracker(lambda scalars, report, step: trainer.log(scalars), which=log))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to take down what `compute_loss` is called with."""
        if self._wrapper is not None:  # a training that has raised has not ended
            return
        compute_loss, attributes = self._trainer.compute_loss, vars(self._trainer)

        def wrapper(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return self._saw(inputs, args, kwargs, lambda: compute_loss(model, inputs, *args, **kwargs))

        self._own_loss, self._wrapper = attributes.get("compute_loss"), wrapper
        attributes["compute_loss"] = wrapper

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer its own `compute_loss` back."""
        attributes = vars(self._trainer)
        if self._wrapper is not None and attributes.pop("compute_loss", None) is not None:
            attributes.update({} if self._own_loss is None else {"compute_loss": self._own_loss})
        self._in_step = False
        self._call = self._wrapper = self._own_loss = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Expect the batches of a step."""
        self._in_step, self._call = True, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the last batch of the step to the monitor."""
        call, self._call, self._in_step = self._call, None, False
        if call is None or not state.is_world_process_zero:
            return
        monitor = self.watch("", self._trainer.model, self._forward, self._trainer.optimizer)
        monitor(call, loss=call.loss, step=state.global_step)

    def _saw(
        self, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Callable[[], Any]
    ) -> Any:
        """Call `compute_loss`, and take it down if it belongs to a step."""
        if not self._in_step:
            return result()
        given = dict(inputs) if isinstance(inputs, dict) else inputs  # of which labels may be taken out
        output = result()
        parts = 1
        if kwargs.get("num_items_in_batch") is not None:  # the loss is a part of that of several batches
            parts = getattr(self._trainer, "current_gradient_accumulation_steps", 1)
        self._call = _Call(given, args, kwargs, parts, _loss_of(output).detach() * parts)
        return output

    def _forward(self, model: nn.Module, call: _Call) -> Tensor:
        inputs = copied(call.inputs)
        trainer = _stand_in(self._trainer, self._own_loss)
        with trainer.compute_loss_context_manager():
            return _loss_of(trainer.compute_loss(model, inputs, *call.args, **call.kwargs)) * call.parts


@attrs.frozen(eq=False)
class _Call:
    """What `compute_loss` was called with.

    Args:
        inputs: as they were before the call.
        args: further arguments.
        kwargs: further arguments by name.
        parts: how many such losses make up that of a step.
        loss: what it returned, times the parts.
    """

    inputs: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parts: int
    loss: Tensor


def _loss_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _stand_in(trainer: Any, own_loss: Any) -> Any:
    """Return a copy of a trainer that can be counted on; see NOTE [The trainer's stand-in].

    Args:
        trainer: in training.
        own_loss: its `compute_loss` where that is an attribute of the trainer, before it was wrapped.
    """
    stand_in = object.__new__(type(trainer))
    own = vars(stand_in)
    left = ("train_dataset", "eval_dataset")
    own.update({name: value if name in left else _apart(value) for name, value in vars(trainer).items()})
    own.update(log=lambda *args, **kwargs: None, state=copy.copy(trainer.state), compute_loss=own_loss)
    if own_loss is None:
        del own["compute_loss"]
    elif getattr(own_loss, "__self__", None) is trainer:
        own["compute_loss"] = types.MethodType(own_loss.__func__, stand_in)
    return stand_in


_MOST = 10_000  # a container that is larger is data, which nobody counts in


def _apart(value: Any) -> Any:
    """Return a copy of nested containers; what is in them is the same."""
    kind = type(value)
    if kind not in (dict, list, set, collections.defaultdict, collections.OrderedDict, collections.deque):
        return value
    if len(value) > _MOST:
        return value
    made = copy.copy(value)
    if isinstance(made, dict):
        made.update({key: _apart(item) for key, item in value.items()})
    elif isinstance(made, (list, collections.deque)):
        for place, item in enumerate(value):
            made[place] = _apart(item)
    return made
