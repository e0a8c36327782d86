"""One step as a pure function: batch in, loss and gradients out, with its statistics still on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.errors import GradflowError, ProcessError
from gradflow.functional.model.batches import checked_loss
from gradflow.functional.model.state import Tensors
from gradflow.functional.model.trees import iter_tensors, map_tensors, shapes
from gradflow.functional.processes.stages import PassVoid
from gradflow.functional.reverse.autograd_graph import Structure, build
from gradflow.functional.reverse.constants import zero_by_steps
from gradflow.functional.reverse.passing import passing
from gradflow.functional.reverse.reverse import ReentrantCheckpoint
from gradflow.functional.run.program import Before, Given, Program
from gradflow.functional.run.reverse_pass import Gradients, reverse_pass
from gradflow.functional.tap.asked import Asked, Listener
from gradflow.functional.tap.ignorance import InnerLoss
from gradflow.functional.tap.probes import arrival, site_of
from gradflow.functional.tap.recorder import MoreSlots, NeedsRetry, Recorder
from gradflow.functional.tap.watch import Watch
from gradflow.functional.torch_private import gradient_hooks, num_writes

_MAX_RETRIES = 8
_AGAIN, _REENTRANT, _FAILED = 1, 2, 3  # why a step is run again, or not


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """One step, as it is asked for.

    Args:
        batch: the batch, on the model's device.
        step: its number.
        before: the state to return to where the step has to be run again.
        transform: `fused` or `vjp`.
        first: it is the first of a run: calls note whether their inputs require a gradient.
        structural: take the contracted autograd graph too (fused only).
        look: take the costlier statistics of the forward pass.
        full: measure the flow on every edge (fused only).
        ranks: and, of every layer, the effective rank of its output gradient.
        listeners: told of what happens in the step (fused only).
        inspect: called with the loss and the graph between the forward and the reverse pass (fused only).
        keep_output: keep the model's output in the outcome (fused only), as leaves.
        keep: the autograd graph outlives the reverse pass, so that it can be walked (fused only).
        scale: what the loss is multiplied by before it is differentiated, and gradients are divided by
            afterwards (fused only, where the flow on every edge is not measured).
        passing: gradients of parameters are let go as they arrive (fused only, likewise).
        closely: then it is asked where they are zero.
    """

    batch: Any
    step: int
    before: Before
    transform: str = "fused"
    first: bool = False
    structural: bool = False
    look: bool = False
    full: bool = False
    ranks: bool = False
    listeners: tuple[Listener, ...] = ()
    inspect: Callable[[Tensor, Structure | None], None] | None = None
    keep_output: bool = False
    keep: bool = False
    scale: float = 1.0
    passing: bool = False
    closely: bool = True


@attrs.frozen(eq=False)
class Outcome:
    """What one step gave."""

    loss: Tensor
    gradients: Gradients
    recorder: Recorder
    structure: Structure | None = None
    output: Kept | None = None  # the model's, if asked for


def run_step(program: Program, request: Request) -> Outcome:
    """Run one step and return its outcome; the program's buffers move on."""
    run = _vjp_step if request.transform == "vjp" else _fused_step
    stages = program.given.stages
    for _ in range(_MAX_RETRIES):
        stages.begin()
        outcome: Outcome | None = None
        failure: Exception = PassVoid("another stage of the pipeline could not run the pass")
        try:
            outcome, how = run(program, request), 0
        except (NeedsRetry, PassVoid):
            how = _AGAIN
        except ReentrantCheckpoint:
            how = _REENTRANT
        except ProcessError:
            raise
        except Exception as error:
            if not stages.tries or stages.alone:
                raise
            failure, how = error, _FAILED
        how = stages.end(how)  # one stage's reason is that of all
        if how == 0 and outcome is not None:
            return outcome
        if how == _REENTRANT:
            program.learned.saw_reentrant()
        if how == _FAILED:
            raise failure
        request.before.restore(program)
    raise RuntimeError("gradflow could not settle on the probes of this model; please report it")


def _asked(program: Program, request: Request, slots: list[Tensor] | None = None) -> Asked:
    """Return what is asked of a step's recorder."""
    learned = program.learned
    listeners = request.listeners if slots is None else ()
    structural = slots is None and (request.structural or request.full)
    watched = learned.watching or request.look or bool(listeners)
    ordinary = slots is None and not (watched or learned.reentrant)
    return Asked(
        look=request.look,
        structural=structural,
        inputs=request.first and slots is None,
        watched=watched,
        ordinary=ordinary,
        captured=learned.captured if ordinary and not structural else (),
        rectifiers=learned.rectifiers,
        slots=slots,
        listeners=listeners,
    )


def evaluated(given: Given, request: Request, recorder: Recorder | None = None) -> tuple[Tensor, Kept | None]:
    """Call model and loss once, and return the loss, and the output where it is to be kept.

    An exception of the user's code keeps its type and gets a note with the step and the batch's shapes.

    Args:
        given: model and loss.
        request: the step.
        recorder: of the step, if it is one that is measured.
    """
    batch, step = request.batch, request.step
    try:
        if recorder is None or not recorder.asked.watched:
            return _called(given, request)
        with Watch(recorder):
            return _called(given, request)
    except (NeedsRetry, PassVoid, GradflowError):
        raise
    except Exception as error:
        seen, where = (recorder.failure if recorder is not None else None) or (None, "")
        place = f" in {where!r}" if where and seen is error else ""
        error.add_note(f"gradflow: raised at step {step}{place}; the batch holds {shapes(batch)}.")
        raise


@attrs.frozen
class Kept:
    """A model's output, what made it, and the loss of it.

    Of a model that computes its own loss, whoever hands it on, it is what the loss function in it took.

    Args:
        value: with leaves for tensors, that require a gradient where those had one.
        ends: names of the autograd nodes that made its tensors, but for views of what they made and probes.
        loss_of: such an output → its loss.
        stepped: which of its tensors are `zero_by_steps`.
    """

    value: Any
    ends: tuple[str, ...]
    loss_of: Callable[[Any], Any]
    stepped: tuple[int, ...] = ()

    @classmethod
    def of(cls, output: Any, loss_of: Callable[[Any], Any]) -> Kept:
        """Return an output without its graph."""
        parts = list(iter_tensors(output))
        stepped = zero_by_steps(parts) if len(parts) > 1 else ()
        ends = tuple(_maker(tensor.grad_fn) for tensor in parts)
        return cls(map_tensors(_leaf, output), ends, loss_of, tuple(stepped))


_VIEWS = (
    "View",
    "Squeeze",
    "Unsqueeze",
    "Reshape",
    "Alias",
    "Transpose",
    "Permute",
    "Expand",
    "Select",
    "Slice",
)


def _maker(node: Any) -> str:
    while node is not None and node.next_functions:
        name = node.name()
        if site_of(node) is None and not name.startswith(_VIEWS):
            return name
        node = node.next_functions[0][0]
    return ""


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _called(given: Given, request: Request) -> tuple[Tensor, Kept | None]:
    batch = request.batch
    if not request.keep_output:
        return checked_loss(given.loss_of(given.forward(batch, request.step), batch)), None
    with InnerLoss() as inner:
        output = given.forward(batch, request.step)
    loss = checked_loss(given.loss_of(output, batch))
    heard = inner.heard(loss)
    if heard is not None:
        return loss, Kept.of(*heard)
    return loss, None if given.own_loss else Kept.of(output, lambda guess: given.loss_of(guess, batch))


def _fused_step(program: Program, request: Request) -> Outcome:
    given, state, learned = program.given, program.state, program.learned
    recorder = Recorder(program.taps, _asked(program, request))
    versions = {name: (b, num_writes(b)) for name, b in state.buffers.items()}
    with program.taps.heard_by(recorder), state.swapped():
        for listener in request.listeners:
            listener.begin(request.step, recorder)
        loss, output = evaluated(given, request, recorder)
        recorder.check_aliases()
        state.keep_buffers()
        if versions:
            learned.saw_buffers_change(
                [
                    name
                    for name, (buffer, version) in versions.items()
                    if state.buffers[name] is not buffer or num_writes(buffer) != version
                ]
            )
        recorder.start_backward()
        structure = None
        if recorder.asked.structural:
            structure = build(
                loss,
                recorder,
                state.leaves,
                lambda: given.inputs_of(request.batch),
                before=learned.structure,
            )
            structure.gather_by(state.shards)
            learned.saw_structure(structure, state.originals)
        if request.inspect is not None:
            request.inspect(loss, structure)
        for listener in request.listeners:
            listener.differentiate(loss)
        gradients = _reverse(program, request, recorder, loss, structure)
    return Outcome(loss.detach(), gradients, recorder, structure, output)


def _reverse(
    program: Program, request: Request, recorder: Recorder, loss: Tensor, structure: Structure | None
) -> Gradients:
    """Run the reverse pass; an exception in it (of a hook, a custom function) gets a note with the step."""
    whole = request.full or request.scale != 1.0 or program.learned.held or program.learned.reentrant
    leaves = {} if whole or not request.passing else program.state.trainable
    try:
        reverse = functools.partial(
            reverse_pass, program, recorder, loss, structure, full=request.full, ranks=request.ranks,
            keep=request.keep, scale=request.scale,
        )  # fmt: skip
        if not leaves:
            return reverse()
        with passing(leaves, closely=request.closely) as known:
            found = reverse()
        return attrs.evolve(found, parameters={n: known(n, g) for n, g in found.parameters.items()})
    except (ReentrantCheckpoint, PassVoid, ProcessError):
        raise
    except Exception as error:
        where = f"raised at step {request.step} in the backward pass"
        error.add_note(f"gradflow: {where}; the batch holds {shapes(request.batch)}.")
        raise


def _vjp_step(program: Program, request: Request) -> Outcome:
    state, learned = program.state, program.learned
    number = learned.num_slots or 4 * len(program.taps.layer_names) + 64
    device = next(iter(state.parameters.values())).device
    slots = [torch.zeros(2, dtype=torch.float64, device=device) for _ in range(number)]
    # A transform gives zeros where no path leads; whether one does is told by a second argument.
    arrived = {name: torch.zeros((), dtype=torch.float64, device=device) for name in state.trainable}
    recorders: list[Recorder] = []

    def pure(trainable: Tensors, arrived: Tensors, slots: list[Tensor]) -> tuple[Tensor, Any]:
        recorder = Recorder(program.taps, _asked(program, request, slots))
        recorders.append(recorder)
        trainable = {name: arrival(p, arrived[name]) for name, p in trainable.items()}
        buffers = {name: b.clone() for name, b in state.buffers.items()}
        with program.taps.heard_by(recorder), state.swapped({**trainable, **buffers}):
            loss, _ = evaluated(program.given, request, recorder)
            current = state.current(buffers)
        return loss, ([observation.value for observation in recorder.observations], current)

    leaves = {name: p.detach() for name, p in state.trainable.items()}
    try:
        result: Any = torch.func.vjp(pure, leaves, arrived, slots, has_aux=True)
        loss, pull, (values, buffers) = result
        gradients, arrivals, statistics = pull(torch.ones_like(loss))
    except MoreSlots:
        learned.need_slots(2 * number)
        raise
    except RuntimeError as error:
        if not isinstance(error, GradflowError):
            error.add_note(
                "gradflow: raised under the transform `vjp`, which takes fewer models than plain autograd: "
                "`transform='fused'`."
            )
        raise
    (recorder,) = recorders
    recorder.renew(values)
    # Detached, since a leaf of the user's that requires a gradient joins all of it to autograd's graph.
    state.keep_buffers({name: b.detach() for name, b in buffers.items()})
    learned.saw_buffers_change(buffers)
    used = [s.detach() for s in statistics[: len(recorder.sites)]]
    marks = [*(s[1] for s in used), *(s.detach() for s in arrivals.values())]
    seen = [mark > 0 for mark in torch.stack(marks).tolist()] if marks else []  # one transfer
    found = {
        name: _after_hooks(state.parameters.get(name), g.detach()) if there else None
        for (name, g), there in zip(gradients.items(), seen[len(used) :], strict=True)
    }
    norms = [s[0] if there else None for s, there in zip(used, seen, strict=False)]
    return Outcome(loss.detach(), Gradients(found, norms), recorder)


def _after_hooks(parameter: Tensor | None, gradient: Tensor) -> Tensor:
    """Return a parameter's gradient as its own hooks leave it."""
    for hook in gradient_hooks(parameter):
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient
