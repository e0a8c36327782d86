"""One step as a pure function: batch in, loss and gradients out, with its statistics still on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import GradflowError
from gradflow.functional.measurement import Session
from gradflow.functional.model.batches import checked_loss
from gradflow.functional.model.purity import ModuleState, RandomState
from gradflow.functional.model.state import Copy, Swap, Tensors, copy_buffers, copy_parameters
from gradflow.functional.model.trees import shapes
from gradflow.functional.reverse.autograd_graph import Structure, build
from gradflow.functional.reverse.reverse import (
    Flows,
    ReentrantCheckpoint,
    accumulated,
    check_walkable,
    fused,
    walked,
)
from gradflow.functional.tap.probes import arrival, sum_of_squares
from gradflow.functional.tap.recorder import NeedsRetry, Recorder
from gradflow.functional.tap.watch import Watch
from gradflow.functional.torch_private import gradient_hooks, num_writes

_MAX_RETRIES = 8


@attrs.define(eq=False)
class Outcome:
    """What one step gave."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    slots: list[Tensor | None]  # Σg² of each probe, in the order of the recorder's sites
    structure: Structure | None = None
    flows: Flows | None = None


@attrs.define(eq=False)
class Program:
    """The user's model and loss with working copies of their state, and how a batch becomes a loss.

    Args:
        model: the model.
        loss_module: the loss, if it is a module with a state of its own.
        evaluate: batch, step → loss, calling the user's model and loss once each.
        recorder: told of every layer call.
        inputs_of: batch → the model's input tensors by name.
        copy_of: makes the working copy of a tensor.
    """

    model: nn.Module
    loss_module: nn.Module | None
    evaluate: Callable[[Any, int], Any]
    recorder: Recorder
    inputs_of: Callable[[Any], Tensors]
    copy_of: Copy = torch.clone
    parameters: Tensors = attrs.field(factory=dict)
    loss_parameters: Tensors = attrs.field(factory=dict)
    buffers: Tensors = attrs.field(factory=dict)
    changing: set[str] = attrs.field(factory=set)  # buffers that a step was seen to change
    watching: bool = True  # whether functions must be watched in steps without a look as well
    torch_random: bool = False  # whether model or loss were seen to draw from torch's random numbers
    host_random: bool = False  # the like, from numpy's or Python's
    held: Tensors = attrs.field(factory=dict)  # parameters that are used past their modules: see `_reverse`
    reentrant: bool = False
    structure: Structure | None = None  # of the last step whose structure was taken
    _swaps: list[Swap] = attrs.field(factory=list)
    _originals: dict[int, str] = attrs.field(factory=dict)  # names of the user's parameters, by id

    def __attrs_post_init__(self) -> None:
        self.parameters = copy_parameters(self.model, self.copy_of)
        self.buffers = copy_buffers(self.model, self.copy_of)
        self._swaps = [Swap(self.model)]
        self._originals = {id(p): name for name, p in self.model.named_parameters()}
        if self.loss_module is not None:
            prefix, loss = "loss_fn.", self.loss_module
            shared = {id(p): name for name, p in self.model.named_parameters()}
            shared |= {id(b): name for name, b in self.model.named_buffers()}
            own = {n for n, t in (*loss.named_parameters(), *loss.named_buffers()) if id(t) not in shared}
            parameters, buffers = copy_parameters(loss, self.copy_of), copy_buffers(loss, self.copy_of)
            self.loss_parameters = {prefix + n: p for n, p in parameters.items() if n in own}
            self.buffers |= {prefix + n: b for n, b in buffers.items() if n in own}
            self._swaps.append(Swap(loss, prefix, shared))
            self._originals |= {id(p): prefix + n for n, p in loss.named_parameters() if n in own}

    @property
    def trainable(self) -> Tensors:
        """All working parameters that require a gradient, the loss's own included."""
        both = {**self.parameters, **self.loss_parameters}
        return {name: p for name, p in both.items() if p.requires_grad}

    @contextlib.contextmanager
    def swapped(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Put the working copies (or `tensors`) in the modules for the length of the context."""
        state = {**self.parameters, **self.loss_parameters, **self.buffers, **(tensors or {})}
        with contextlib.ExitStack() as stack:
            for swap in self._swaps:
                stack.enter_context(swap(state))
            yield

    def current_buffers(self) -> Tensors:
        """Return the buffers as they stand in the modules now."""
        found: Tensors = {}
        for swap in self._swaps:
            found |= swap.current(self.buffers)
        return found

    def loss(self, batch: Any, step: int, observer: Any = None) -> Tensor:
        """Call model and loss once; the recorder listens.

        An exception of the user's code keeps its type and gets a note with the step and the batch's shapes.
        """
        try:
            recorder = self.recorder
            recorder.watched = observer is not None or self.watching or recorder.look
            plain = not (recorder.watched or self.reentrant)
            recorder.ordinary = recorder.alike = plain and recorder.given_slots is None
            recorder.capturing = recorder.ordinary and not recorder.structural
            if not recorder.watched:
                return checked_loss(self.evaluate(batch, step))
            with Watch(recorder, observer):
                return checked_loss(self.evaluate(batch, step))
        except (NeedsRetry, GradflowError):
            raise
        except Exception as error:
            seen, where = self.recorder.failure or (None, "")
            place = f" in {where!r}" if where and seen is error else ""
            self.recorder.failure = None
            error.add_note(f"gradflow: raised at step {step}{place}; the batch holds {shapes(batch)}.")
            raise


@attrs.define(eq=False)
class Before:
    """What a step starts from, so that it can be run again: random states, buffers, and in the first step,
    which is run again most often, what modules hold outside of them (a counter, a part that they replace).
    """

    random: RandomState
    buffers: Tensors
    modules: ModuleState | None = None

    @classmethod
    def of(cls, program: Program, *, look: bool = True) -> Before:
        """Remember the present state: of the buffers, those that a step was seen to change.

        Between looks, only the random states that were seen to move are remembered.
        """
        held = program.buffers
        random = RandomState(torch=look or program.torch_random, host=look or program.host_random)
        return cls(random, {n: held[n].clone() for n in program.changing if n in held})

    def restore(self, program: Program) -> None:
        """Put it back."""
        if self.modules is not None:
            self.modules.restore()
        self.random.restore()
        for name, saved in self.buffers.items():
            program.buffers[name] = saved.clone()


def run_step(
    program: Program,
    batch: Any,
    step: int,
    *,
    transform: str,
    structural: bool,
    look: bool,
    full: bool = False,
    ranks: bool = False,
    observer: Any = None,
    before: Before | None = None,
    inspect: Callable[[Tensor, Structure | None], None] | None = None,
    sessions: Sequence[Session] = (),
) -> Outcome:
    """Run one step and return its outcome; the program's buffers move on.

    Args:
        program: model, loss and working state.
        batch: the batch, on the model's device.
        step: its number.
        transform: `fused` or `vjp`.
        structural: take the contracted autograd graph too (fused only).
        look: take the costlier statistics of the forward pass.
        full: measure the flow on every edge (fused only).
        ranks: and, of every layer, the effective rank of its output gradient.
        observer: told of every function call, see `Watch`.
        before: the state to return to where the step has to be run again.
        inspect: called with the loss and the graph between the forward and the reverse pass (fused only).
        sessions: that listen to the step (fused only); who runs it ends them, once it counts.
    """
    before = before or Before.of(program)
    for _ in range(_MAX_RETRIES):
        try:
            if transform == "vjp":
                return _vjp_step(program, batch, step, look=look, observer=observer)
            return _fused_step(
                program, batch, step, structural=structural, look=look, full=full, ranks=ranks,
                observer=observer, inspect=inspect, sessions=sessions,
            )  # fmt: skip
        except NeedsRetry:
            before.restore(program)
        except ReentrantCheckpoint:
            program.reentrant = True
            before.restore(program)
    raise RuntimeError("gradflow could not settle on the probes of this model; please report it")


def _fused_step(
    program: Program,
    batch: Any,
    step: int,
    *,
    structural: bool,
    look: bool,
    full: bool,
    ranks: bool,
    observer: Any,
    inspect: Callable[[Tensor, Structure | None], None] | None,
    sessions: Sequence[Session],
) -> Outcome:
    recorder = program.recorder
    recorder.begin_step(structural=structural or full, look=look)
    recorder.sessions = sessions
    for session in sessions:
        session.begin(step, recorder)
    versions = {name: (b, num_writes(b)) for name, b in program.buffers.items()}
    with program.swapped():
        try:
            loss = program.loss(batch, step, observer)
            recorder.check_aliases()
            program.buffers |= program.current_buffers()
            for name, (buffer, version) in versions.items():
                if program.buffers[name] is not buffer or num_writes(buffer) != version:
                    program.changing.add(name)
            recorder.in_backward = True
            structure = None
            if (structural or full) and loss.grad_fn is not None:
                named = {**program.parameters, **program.loss_parameters}
                structure = build(
                    loss, recorder, named, lambda: program.inputs_of(batch), before=program.structure
                )
                program.structure = structure
                names = program._originals
                program.held |= {names[id(p)]: p for p in structure.foreign if id(p) in names}
            if inspect is not None:
                inspect(loss, structure)
            for session in sessions:
                session.differentiate(loss)
            return _told(batch, step, lambda: _reverse(program, loss, structure, full, ranks))
        finally:
            recorder.active, recorder.sessions = False, ()


def _told(batch: Any, step: int, reverse: Callable[[], Outcome]) -> Outcome:
    """Run the reverse pass; what is raised in it (by a hook, a custom function) is told the step."""
    try:
        return reverse()
    except ReentrantCheckpoint:
        raise
    except Exception as error:
        where = f"raised at step {step} in the backward pass"
        error.add_note(f"gradflow: {where}; the batch holds {shapes(batch)}.")
        raise


def _reverse(program: Program, loss: Tensor, structure: Structure | None, full: bool, ranks: bool) -> Outcome:
    recorder, trainable = program.recorder, program.trainable
    if structure is not None and not program.reentrant:
        check_walkable(structure)
    # A parameter that the model also keeps in a list, or its loss in a closure, is there without the swap.
    held = list(program.held.values())
    leaves = [
        *trainable.values(),
        *held,
        *(source for s in recorder.sites if (source := s.edge or s.slot) is not None),
    ]
    number = len(trainable) + len(held)
    hooked = recorder.hooked
    if full and structure is not None and not program.reentrant:
        gradients = fused(loss, leaves, retain_graph=True) if hooked else []
        exact = any(site.exact for site in recorder.sites)
        flows = walked(loss, structure, exact=exact, ranks=ranks)
        _check_flat(program, trainable, len(leaves))
        slots = [flows.probes.get(id(site)) for site in recorder.sites]
        if hooked:  # hooks on tensors act in autograd's own pass, not in the walk
            slots = gradients[number:]
        else:
            gradients = [flows.leaves.get(id(p)) for p in (*trainable.values(), *held)]
        return Outcome(loss.detach(), _by_name(program, trainable, gradients), slots, structure, flows)
    if program.reentrant:
        ours = [leaf for leaf in leaves if id(leaf) not in program._originals]
        outside = accumulated(loss, ours, program._originals)
        found = {name: p.grad for name, p in trainable.items()}
        for key, gradient in outside.items():
            name = program._originals[key]
            found[name] = _sum(found[name], gradient)
        own = [site.slot for site in recorder.sites]  # those made while it ran included
        slots = [slot.grad if slot is not None else None for slot in own]
        for leaf in (*trainable.values(), *own):
            if leaf is not None:
                leaf.grad = None
        return Outcome(loss.detach(), found, slots, structure)
    gradients = fused(loss, leaves)
    _check_flat(program, trainable, len(leaves))
    slots = [
        g if site.edge is None or g is None else sum_of_squares(g, exact=site.exact)
        for site, g in zip(recorder.sites, gradients[number:], strict=True)
    ]
    return Outcome(loss.detach(), _by_name(program, trainable, gradients[:number]), slots, structure)


def _check_flat(program: Program, trainable: Tensors, num_leaves: int) -> None:
    """Raise if the reverse pass ran another one inside, as a reversible layer of its own making does.

    What that one found is in the `.grad` of our leaves, and the calls that it probed are new.
    """
    sites, parameters = program.recorder.sites, trainable.values()
    more = len(sites) + len(parameters) + len(program.held) > num_leaves
    if more or any(p.grad is not None for p in parameters):
        for leaf in (*parameters, *(site.slot for site in sites)):
            if leaf is not None:
                leaf.grad = None
        raise ReentrantCheckpoint


def _by_name(
    program: Program, trainable: Tensors, gradients: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Return the gradients of the working parameters by name, with those of `program.held` added."""
    found = dict(zip(trainable, gradients, strict=False))
    for name, other in zip(program.held, gradients[len(trainable) :], strict=False):
        found[name] = _sum(found[name], other)
    return found


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _vjp_step(program: Program, batch: Any, step: int, *, look: bool, observer: Any) -> Outcome:
    recorder = program.recorder
    number = recorder.num_slots or 4 * len(recorder.layer_names) + 64
    device = next(iter(program.parameters.values())).device
    slots = [torch.zeros(2, dtype=torch.float64, device=device) for _ in range(number)]
    # A transform gives zeros where no path leads; whether one does is told by a second argument.
    arrived = {name: torch.zeros((), dtype=torch.float64, device=device) for name in program.trainable}

    def pure(trainable: Tensors, arrived: Tensors, slots: list[Tensor]) -> tuple[Tensor, Any]:
        recorder.begin_step(structural=False, look=look, slots=slots)
        trainable = {name: arrival(p, arrived[name]) for name, p in trainable.items()}
        buffers = {name: b.clone() for name, b in program.buffers.items()}
        with program.swapped({**trainable, **buffers}):
            loss = program.loss(batch, step, observer)
            current: Tensors = {}
            for swap in program._swaps:
                current |= swap.current(buffers)
        recorder.active = False
        return loss, (list(recorder.values), current)

    leaves = {name: p.detach() for name, p in program.trainable.items()}
    try:
        result: Any = torch.func.vjp(pure, leaves, arrived, slots, has_aux=True)
        loss, pull, (recorder.values, buffers) = result
        gradients, arrivals, statistics = pull(torch.ones_like(loss))
    except NeedsRetry:
        recorder.num_slots = 2 * number
        raise
    except RuntimeError as error:
        if not isinstance(error, GradflowError):
            error.add_note(
                "gradflow: raised under the transform `vjp`, which takes fewer models than plain autograd: "
                "`transform='fused'`."
            )
        raise
    finally:
        recorder.active = False
    # Detached, since a leaf of the user's that requires a gradient joins all of it to autograd's graph.
    program.buffers |= {name: b.detach() for name, b in buffers.items()}
    program.changing |= set(buffers)
    used = [s.detach() for s in statistics[: len(recorder.sites)]]
    marks = [*(s[1] for s in used), *(s.detach() for s in arrivals.values())]
    seen = [mark > 0 for mark in torch.stack(marks).tolist()] if marks else []  # one transfer
    found = {
        name: _after_hooks(program.parameters.get(name), g.detach()) if there else None
        for (name, g), there in zip(gradients.items(), seen[len(used) :], strict=True)
    }
    return Outcome(
        loss.detach(), found, [s[0] if there else None for s, there in zip(used, seen, strict=False)]
    )


def _after_hooks(parameter: Tensor | None, gradient: Tensor) -> Tensor:
    """Return a parameter's gradient as its own hooks leave it."""
    for hook in gradient_hooks(parameter):
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient
