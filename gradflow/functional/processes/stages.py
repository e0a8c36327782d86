"""The stages of a pipeline: what each hands to the next in a pass, and what comes back.

NOTE [A pass through the stages]
Every process runs its own stage as a model of its own: what the stage before hands on is its batch, and in
the place of a loss it has a scalar that stands for all that comes behind, whose node hands back what the next
stage has found at its own inputs. So probes, graphs and walks see each stage as they see a model, and only
the two ends of it wait for others: a stage asks for the gradients before its reverse pass begins, when it is
known to which of its outputs a path has led at all. A batch is sent through in one piece: the mean
over the microbatches of a schedule is that over the batch.

A pass has the same course on all stages: one message forward and one back between each two, whatever comes of
it. A stage that must run its pass again (a probe did not fit) sends that there is nothing, and at the end of
a pass all learn whether any of them has to. So no stage is a pass ahead of another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional.processes.group import Axis, Processes
from gradflow.functional.processes.line import Line
from gradflow.functional.processes.messages import Message, Messages
from gradflow.functional.torch_pipelining import Stage, stages_of

_OR_WHOLE = (
    "Or pass the whole model, as it was before it was split into stages, with a batch that one process can "
    "hold."
)


class PassVoid(Exception):
    """Another stage cannot end the pass, so there is nothing to go on with; never seen by a user."""


@attrs.define(eq=False)
class Stages:
    """The way along the stages of a pipeline; see NOTE [A pass through the stages].

    Args:
        stage: that of this process; None where the model is no stage.
        line: to the processes of all stages.
    """

    stage: Stage | None = None
    line: Line = attrs.field(factory=Line)
    axis: Axis | None = None
    entry: Entry = attrs.field(factory=lambda: Entry())
    inputs: tuple[Tensor, ...] = ()  # of the stage, in the pass that runs or ran last; of the first, none
    # by number of an output, the calls of layers that feed it; None of one of whole numbers
    feeding: tuple[tuple[int, ...] | None, ...] = ()
    reached: tuple[int, ...] = ()  # the outputs to which a path has led, in the pass that runs or ran last
    beside: Mapping[str, str] = attrs.field(factory=dict)  # the classes of modules of other stages
    tries: bool = False  # a pass that may fail on a stage, which is no failure of the analysis
    _runs: bool = False
    _returns: bool = True
    _void: bool = False
    _handed: bool = False
    _back: Sequence[Tensor | None] | None = None  # what this stage hands back
    _back_scale: float = 1.0  # of the loss that this is of
    _loss: float = 0.0  # of the pass, once the next stage has told it
    _scale: float = 1.0  # of the loss that is what the next one has handed back
    _last: Tensor | None = None  # the loss, of the last stage
    _cotangents: list[Tensor | None] | None = None  # what the next one has handed back
    _messages: Messages = attrs.field(factory=Messages)

    @classmethod
    def of(cls, model: Any) -> Stages:
        """Return the way along the stages of a pipeline, without one if the model is no stage.

        Raises:
            ModelInputError: if a process has several stages.
        """
        found = stages_of(model)
        processes = len(set(found[0].ranks)) if found else 0
        if found and (len(found) > 1 or processes < found[0].number):
            raise ModelInputError(
                f"the {type(model).__name__} is of a pipeline of {found[0].number} stages on {processes} "
                "processes, so that a process has several of them, with others in between, for which what is "
                "one pass here would stop on its way forward and back. One stage a process is taken, as "
                "ScheduleGPipe and Schedule1F1B run them. The record is that of the "
                f"whole model, however it is cut: for the analysis cut it into {processes}, and pass "
                f"`PipelineStage(part, rank, {processes}, device)` on every process. {_OR_WHOLE}"
            )
        if found and not found[0].is_chain:
            raise ModelInputError(
                f"the {type(model).__name__} is of a traced model whose stages hand something on past the "
                f"next one. Stages are taken that hand on to the next alone. {_OR_WHOLE}"
            )
        return cls(next(iter(found), None))

    def connect(self, beside: Processes) -> None:
        """Make the line to all processes of the analysis.

        Args:
            beside: the processes that have the same stage, with other parts of the batch or of the layers.

        Raises:
            ModelInputError: if the stages and these do not span all processes.
        """
        if self.stage is None:
            return
        self.axis = Axis("stages", self.stage.group, "stages")
        number = self.stage.number * (dist.get_world_size(beside.group) if beside.axes else 1)
        if beside.axes and number != dist.get_world_size():
            raise ModelInputError(
                f"the {self.stage.number} stages and the processes that share a stage make {number} of the "
                f"{dist.get_world_size()} processes. Lay the stages out along one dimension of a DeviceMesh, "
                "and what shares a stage along the others."
            )
        group = dist.group.WORLD if beside.axes else self.stage.group
        self.line = Line(Processes((self.axis,), group))
        self._messages = Messages(self.line, self.stage.group)

    def meet(self, held: Mapping[str, str]) -> bool:
        """Tell the other stages what this one has, and return whether their layers have the same names.

        Args:
            held: by name of a module its class, if it holds others, or "", if it is a layer.
        """
        every = dict(self.line.gathered((self.index, dict(held))))
        alike = named_alike(every.values())
        if not alike:
            others = [of for index, of in every.items() if index != self.index]
            self.beside = {name: kind for of in others for name, kind in of.items() if kind}
        return alike

    @property
    def alone(self) -> bool:
        """Whether the model is no stage."""
        return self.stage is None

    @property
    def index(self) -> int:
        """The number of this process's stage."""
        return 0 if self.stage is None else self.stage.index

    @property
    def is_first(self) -> bool:
        """Whether this is the first stage, which takes the batch."""
        return self.stage is None or self.stage.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage, which has the loss."""
        return self.stage is None or self.stage.index == self.stage.number - 1

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules that are called in a pass beside those of the model."""
        return {} if self.is_first else {ENTRY: self.entry}

    # -------------------------------------------------------------------------------- a pass

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Run passes that may fail, for the length of the context: on one stage, or then on all."""
        self.tries = True
        try:
            yield
        finally:
            self.tries = False

    def begin(self, *, returns: bool = True) -> None:
        """Begin a pass, and take what the stage before hands on.

        Args:
            returns: whether it is a pass forward and back.
        """
        if self.stage is None or self._runs:
            return
        self._runs, self._returns, self._handed, self._void = True, returns, False, False
        self._back = self._cotangents = self._last = None
        self._loss, self._scale, self._back_scale = 0.0, 1.0, 1.0
        if not self.is_first:
            found = self.receive(-1)
            self._void = found is None
            tensors, asks = found if found is not None else ([], [])
            self.inputs = tuple(
                tensor.requires_grad_(asked and returns) for tensor, asked in zip(tensors, asks, strict=True)
            )

    def entering(self) -> tuple[Tensor, ...]:
        """Return what the stage before has handed on.

        Raises:
            PassVoid: if it has nothing to hand on.
        """
        if self._void:
            raise PassVoid
        return tuple(self.entry(tensor) for tensor in self.inputs)

    def named(self) -> dict[str, Tensor]:
        """Return what the stage before has handed on, by the names that it has in the stage's graph."""
        return {received(i): tensor for i, tensor in enumerate(self.inputs)}

    def hand_on(self, output: Any, feeding: Callable[[Tensor], Sequence[int]]) -> tuple[Tensor, ...]:
        """Hand an output to the next stage, and return its tensors.

        Args:
            output: of the stage.
            feeding: tells which calls of layers feed a tensor.

        Raises:
            ModelInputError: if it is neither a tensor nor several.
        """
        outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        if not outputs or not all(isinstance(tensor, Tensor) for tensor in outputs):
            raise ModelInputError(
                f"stage {self.index} returns a {type(output).__name__}: a stage hands on a tensor or a tuple "
                "of tensors."
            )
        asks = [bool(t.requires_grad and t.is_floating_point()) for t in outputs]
        self.send(1, [tensor.detach() for tensor in outputs], asks)
        self._handed = True
        self.feeding = tuple(tuple(feeding(t)) if t.is_floating_point() else None for t in outputs)
        return outputs

    def behind(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the scalar that stands for all that comes behind: of the outputs to which a path has led.

        Raises:
            PassVoid: if the next stage cannot end the pass.
        """
        cotangents = self.cotangents() if self._returns else [None] * len(outputs)
        self.reached = tuple(i for i, cotangent in enumerate(cotangents) if cotangent is not None)
        spoilt = not math.isfinite(self._loss) and all(bool(t.isfinite().all()) for t in outputs)
        loss = 0.0 if spoilt else self._loss  # what is not finite was born behind
        if not self.reached:
            return torch.tensor(loss, device=outputs[0].device)
        return HandedOn.apply(self, loss, *(outputs[i] for i in self.reached))  # type: ignore[return-value]

    def note(self, loss: Tensor) -> Tensor:
        """Return the loss, of which the stages before hear at the end of the pass."""
        self._last = loss.detach() if isinstance(loss, Tensor) and loss.numel() == 1 else None
        return loss

    def cotangents(self) -> list[Tensor | None]:
        """Return what the next stage hands back, of each output; None of those to which no path has led.

        Raises:
            PassVoid: if it cannot end the pass.
        """
        if self._cotangents is None:
            found = self.receive(1)
            self._void = found is None
            tensors, (there, self._loss, self._scale) = found if found is not None else ([], ([], 0.0, 1.0))
            parts = iter(tensors)
            self._cotangents = [next(parts) if known else None for known in there]
        if self._void:
            raise PassVoid
        return self._cotangents

    def scaled(self, factor: float) -> list[Tensor]:
        """Return what the next stage hands back where a path has led, of the loss multiplied by a factor."""
        known = [cotangent for cotangent in self.cotangents() if cotangent is not None]
        more = factor / self._scale
        if more == 1:
            return known
        wide = [(g, torch.promote_types(g.dtype, torch.float32)) for g in known]
        return [(g.to(dtype) * more).to(g.dtype) for g, dtype in wide]

    def hand_back(self, gradients: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Keep the gradients at the inputs, for the stage before, until the pass is over.

        Args:
            gradients: of the loss multiplied by the scale.
            scale: by which it was multiplied.
        """
        self._back, self._back_scale = list(gradients), scale

    def end(self, how: int) -> int:
        """End a pass, and return the largest of what the stages say of it.

        Args:
            how: 0 if all went well here.
        """
        if self.stage is None:
            return how
        if not self.is_last and not self._handed:
            self.send(1, None)
        if self._returns:
            if not self.is_last and self._cotangents is None:
                try:
                    self.cotangents()
                except PassVoid:
                    how = how or 1
            if not self.is_first:
                back = [] if self._back is None else self._back
                tensors = [tensor for tensor in back if tensor is not None]
                there = [tensor is not None for tensor in back] or [False] * len(self.inputs)
                loss = self._loss if self._last is None else float(self._last)
                self.send(-1, None if how else tensors, (there, loss, self._back_scale))
        self._runs = False
        return int(self.line.extremes(np.array([float(how)]))[0])

    # ------------------------------------------------------------------------------ messages

    def send(self, where: int, tensors: Sequence[Tensor] | None, more: Any = None) -> None:
        """Send something to the next stage (1) or the one before (−1); None says that there is nothing."""
        self._messages.send(self._place(where), tensors, more)

    def receive(self, where: int) -> Message | None:
        """Return what the next stage (1) or the one before (−1) has sent; None where there is nothing."""
        assert self.stage is not None
        found = self._messages.receive(self._place(where))
        if found is None:
            return None
        own = next((p.device for p in self.stage.module.parameters()), None)
        return [tensor if own is None else tensor.to(own) for tensor in found[0]], found[1]

    def _place(self, where: int) -> int:
        assert self.stage is not None
        return self.stage.ranks[self.stage.index + where]

    # --------------------------------------------------------------------- beside the passes

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest on any stage of this process's pipeline, of every number; no NaN."""
        if self.axis is None:
            return list(values)
        return self.line.reduced(np.array(values, float), self.axis, dist.ReduceOp.MAX).tolist()

    def added(self, value: float) -> float:
        """Return the sum over the stages of this process's pipeline."""
        return value if self.axis is None else float(self.line.reduced(np.array([value]), self.axis)[0])

    def from_last(self, *numbers: float, also: float = 0.0) -> list[float]:
        """Return numbers as the last stage has them, which may be NaN, and the largest of one more on any."""
        if self.axis is None:
            return [*numbers, also]
        mine = [float(n) for n in numbers] if self.is_last else [-np.inf] * len(numbers)
        flags = [float(np.isnan(n)) for n in mine]
        known = [0.0 if np.isnan(n) else n for n in mine]
        *found, most = self.largest([*known, *flags, also])
        pairs = zip(found[: len(mine)], found[len(mine) :], strict=True)
        return [*(np.nan if flag > 0 else n for n, flag in pairs), most]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return self.line.any(flag)


def named_alike(every: Iterable[Mapping[str, str]]) -> bool:
    """Whether layers of two stages have the same name, so that all are told apart by that of their stage.

    Args:
        every: what each stage has, as `meet` takes it.
    """
    layers = [name for of in every for name, kind in of.items() if not kind]
    return len(set(layers)) < len(layers) or "" in layers


ENTRY = "(received)"


def received(number: int) -> str:
    """Return the name, in a stage's graph, of what the stage before hands on."""
    return f"received.{number}"


class Entry(nn.Module):
    """Stands, as a layer, for whoever made what the stage before hands on: its name in a stage is `ENTRY`.

    It is called for each tensor, so that what a stage computes from it is known to come from a layer.
    """

    def forward(self, handed: Tensor) -> Tensor:
        """Return the tensor as it is."""
        return handed


class HandedOn(torch.autograd.Function):
    """A scalar that stands for all that comes behind a stage, from its outputs; back comes their gradient."""

    @staticmethod
    def forward(ctx: Any, stages: Stages, loss: float, *outputs: Tensor) -> Tensor:  # type: ignore[override]
        """Return the loss."""
        ctx.stages = stages
        return outputs[0].new_tensor(loss, dtype=torch.promote_types(outputs[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return what the next stage hands back, of the loss times what comes in."""
        return None, None, *ctx.stages.scaled(float(gradients[0]))
