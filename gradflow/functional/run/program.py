"""What a run works with: what was given, working copies of its state, the model's taps, and what was learned.

Each is a class of its own, which alone changes its fields.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.purity import ModuleState, RandomState
from gradflow.functional.model.state import (
    Copy,
    Swap,
    Swapped,
    Tensors,
    copy_buffers,
    copy_parameters,
    loss_prefix,
)
from gradflow.functional.processes.shards import Shards, local
from gradflow.functional.processes.stages import Stages
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.tap.calls import ActivationKey
from gradflow.functional.tap.tapped import TappedModel


@attrs.frozen(eq=False)
class Given:
    """What the user gave: model and loss, and how a batch becomes a loss.

    Args:
        model: the model.
        loss_module: the loss, if it is a module with a state of its own.
        forward: batch, step → the model's output, calling the user's model once.
        loss_of: output, batch → the user's loss of it, which is called once.
        inputs_of: batch → the model's input tensors by name.
        functions: of the user's that `loss_of` calls.
        own_loss: whether the output holds the loss already, since the model computes it.
        draws_itself: whether `forward` draws its own data, and is handed no batch.
        stages: the way along the stages of a pipeline, if the model is one of them.
        handed: what a `step_fn` is handed in the place of the model: the stage, or the schedule that runs it.
    """

    model: nn.Module
    loss_module: nn.Module | None
    forward: Callable[[Any, int], Any]
    loss_of: Callable[[Any, Any], Any]
    inputs_of: Callable[[Any], Tensors]
    functions: tuple[Any, ...] = ()
    own_loss: bool = False
    draws_itself: bool = False
    stages: Stages = attrs.field(factory=Stages)
    handed: Any = None

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the loss where it is a module."""
        return [self.model] if self.loss_module is None else [self.model, self.loss_module]


@attrs.define(eq=False)
class WorkingState:
    """Working copies of the parameters and buffers of model and loss, by qualified name."""

    parameters: Tensors
    loss_parameters: Tensors
    buffers: Tensors
    originals: dict[int, str]  # names of the user's parameters, by id
    _swap: Swap
    _loss_swap: Swap | None = None
    shards: Shards = attrs.field(factory=Shards)

    @classmethod
    def of(
        cls, given: Given, copy_of: Copy = torch.clone, shards: Shards | None = None, *, valued: bool = True
    ) -> WorkingState:
        """Return copies of the present state; what model and loss share belongs to the model.

        Args:
            given: model and loss.
            copy_of: makes the copy of a tensor.
            shards: parameters of the model that are taken as they are.
            valued: whether all must have values.
        """
        model, loss = given.model, given.loss_module
        shards = shards or Shards()
        kept = {id(p) for p in shards.gathered.values()}
        parameters = copy_parameters(model, copy_of, kept, valued=valued)
        buffers = copy_buffers(model, copy_of, valued=valued)
        originals = {id(p): name for name, p in model.named_parameters()}
        if loss is None:
            return cls(parameters, {}, buffers, originals, Swap(model), shards=shards)
        prefix = loss_prefix(model)
        shared = originals | {id(b): name for name, b in model.named_buffers()}
        own = {n for n, t in (*loss.named_parameters(), *loss.named_buffers()) if id(t) not in shared}
        loss_parameters = copy_parameters(loss, copy_of, valued=valued)
        loss_buffers = copy_buffers(loss, copy_of, valued=valued)
        return cls(
            parameters,
            {prefix + n: p for n, p in loss_parameters.items() if n in own},
            buffers | {prefix + n: b for n, b in loss_buffers.items() if n in own},
            originals | {id(p): prefix + n for n, p in loss.named_parameters() if n in own},
            Swap(model),
            Swap(loss, prefix, shared),
            shards,
        )

    @property
    def every_parameter(self) -> Tensors:
        """All working parameters, the loss's own included."""
        return {**self.parameters, **self.loss_parameters}

    @property
    def trainable(self) -> Tensors:
        """All working parameters that require a gradient."""
        every = self.every_parameter if self.loss_parameters else self.parameters
        return {name: p for name, p in every.items() if p.requires_grad}

    @property
    def leaves(self) -> Tensors:
        """What stands for a parameter in autograd's graph: of a sharded one, the leaf that is gathered."""
        return {**self.every_parameter, **self.shards.leaves()}

    @property
    def parts(self) -> Tensors:
        """The parameters of the model, and of a sharded one what this process holds of it."""
        return {name: local(p) for name, p in self.parameters.items()}

    def swapped(self, tensors: Mapping[str, Tensor] | None = None) -> AbstractContextManager[None]:
        """Put the working copies (or `tensors`) in the modules for the length of the context."""
        state = {**self.parameters, **self.loss_parameters, **self.buffers, **(tensors or {})}
        for name in self.shards.gathered:  # which the model puts in place by itself
            del state[name]
        return (
            self._swap(state) if self._loss_swap is None else _both(self._swap(state), self._loss_swap(state))
        )

    def current(self, buffers: Tensors) -> Tensors:
        """Return what the modules now hold in the place of some buffers."""
        found = self._swap.current(buffers)
        return found if self._loss_swap is None else found | self._loss_swap.current(buffers)

    def keep_buffers(self, buffers: Tensors | None = None) -> None:
        """Go on with the buffers as they stand in the modules now, or with those that are passed."""
        if buffers is not None:
            self.buffers |= buffers
        elif self.buffers:
            self.buffers |= self.current(self.buffers)


@contextlib.contextmanager
def _both(first: Swapped, second: Swapped) -> Iterator[None]:
    with first, second:
        yield


@attrs.define(eq=False)
class Learned:
    """What the steps so far have shown of the model that later ones need."""

    changing: set[str] = attrs.field(factory=set)  # buffers that a step was seen to change
    watching: bool = True  # whether functions must be watched in steps without a look as well
    torch_random: bool = False  # whether model or loss were seen to draw from torch's random numbers
    host_random: bool = False  # the same for numpy's and Python's
    held: Tensors = attrs.field(factory=dict)  # the user's own parameters, where used past their modules
    reentrant: bool = False  # whether the reverse pass must be by `reverse.accumulated`
    structure: Structure | None = None  # of the last step whose structure was taken
    num_slots: int = 0  # how many slots a step under `vjp` is given; 0 until it is known
    captured: Collection[str] = frozenset()  # see NOTE [Captured gradients] in tap/probes.py
    rectifiers: Mapping[str, ActivationKey] = attrs.field(factory=dict)  # modules to follow, by layer call

    def saw_buffers_change(self, names: Collection[str]) -> None:
        """Hear which buffers a step has changed."""
        self.changing.update(names)

    def saw_random(self, random: RandomState) -> None:
        """See which random numbers were drawn since a state was remembered."""
        self.torch_random |= random.torch_moved()
        self.host_random |= random.host_moved()

    def saw_structure(self, structure: Structure, originals: Mapping[int, str]) -> None:
        """Keep a step's structure, and which of the user's own parameters, not copies, it holds."""
        self.structure = structure
        self.held |= {originals[id(p)]: p for p in structure.foreign if id(p) in originals}

    def saw_reentrant(self) -> None:
        """Hear that `autograd.grad` does not take the model's graph."""
        self.reentrant = True

    def need_slots(self, number: int) -> None:
        """Give later steps under `vjp` so many slots."""
        self.num_slots = number

    def capture(self, names: Collection[str]) -> None:
        """Capture the output gradients of some calls from now on."""
        self.captured = names

    def follow(self, keys: Collection[ActivationKey]) -> None:
        """Follow these rectifiers, and no others, in steps without a look."""
        self.watching = any(key.functional for key in keys)
        self.rectifiers = {key.layer: key for key in keys if not key.functional}


@attrs.frozen(eq=False)
class Program:
    """All that a step runs on: what was given, its working state, the model's taps, and what was learned.

    Args:
        given: what was given.
        state: working copies of parameters and buffers.
        taps: of the model.
        held: what modules held before the run.
        learned: what earlier steps have shown.
    """

    given: Given
    state: WorkingState
    taps: TappedModel
    held: ModuleState | None = None
    learned: Learned = attrs.field(factory=Learned)

    def module_state(self) -> ModuleState:
        """Return what modules hold now, outside of parameters and buffers."""
        return ModuleState(self.given.modules, self.given.functions, self.held)


@attrs.frozen(eq=False)
class Before:
    """What a step starts from, so that it can be run again: random states and buffers.

    In the first step, which is run again most often, also what else modules hold (a counter, a part that
    they replace).
    """

    random: RandomState
    buffers: Tensors
    modules: ModuleState | None = None

    @classmethod
    def of(cls, program: Program, *, look: bool = True, first: bool = False) -> Before:
        """Remember the present state.

        Of the buffers, all in the first step, and later those that were seen to change. Between looks, only
        the random states that were seen to move.
        """
        held, learned = program.state.buffers, program.learned
        random = RandomState(torch=look or learned.torch_random, host=look or learned.host_random)
        names = held if first else [name for name in learned.changing if name in held]
        modules = program.module_state() if first else None
        return cls(random, {name: held[name].clone() for name in names}, modules)

    def restore(self, program: Program) -> None:
        """Put it back."""
        program.state.shards.rest()
        if self.modules is not None:
            self.modules.restore()
        self.random.restore()
        program.state.keep_buffers({name: saved.clone() for name, saved in self.buffers.items()})

    @contextlib.contextmanager
    def again(self, program: Program) -> Iterator[None]:
        """Go back to that state for the length of the context."""
        buffers, random = dict(program.state.buffers), self.random.now()
        self.restore(program)
        try:
            yield
        finally:
            random.restore()
            program.state.keep_buffers(buffers)
