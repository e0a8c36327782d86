"""A look at a training from inside: taps on the user's own modules, and a record of what its passes show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import attrs
from torch import nn

from gradflow.errors import ModelInputError, NoTrainableParametersError
from gradflow.functional.inside.listening import Ear, reverse_passes
from gradflow.functional.inside.passes import MOST, Passes
from gradflow.functional.measurement import Measurement, some_of
from gradflow.functional.model.layers import led
from gradflow.functional.model.state import Swap
from gradflow.functional.model.supported import check_model, distributed, standing_notes
from gradflow.functional.model.threads import uncompiled, unless_busy
from gradflow.functional.parts.chance import chance
from gradflow.functional.parts.measurement import parts
from gradflow.functional.processes.group import processes_of
from gradflow.functional.processes.line import Line
from gradflow.functional.processes.shards import is_distributed
from gradflow.functional.reach.findings import ReachFindings
from gradflow.functional.run.history import History, series
from gradflow.functional.run.program import Given, Program, WorkingState
from gradflow.functional.run.record import assembled
from gradflow.functional.run.run import Plan, Run
from gradflow.functional.run.together.facts import Facts, reducer_of
from gradflow.functional.run.together.joined import joined
from gradflow.functional.run.together.numbers import combine
from gradflow.functional.tap.tapped import TappedModel
from gradflow.functional.torch_private import is_compiled, transforms
from gradflow.records import FlowRecord

_ABSENT = (
    "Looked at from inside, in the passes of the training itself. Not to be had so: why gradient did not "
    "arrive at a number, what outputs are worth against guesses, where a NaN was born, and what takes "
    "gradients of its own, as those at queries and keys, through time and by heads of a policy."
)


@attrs.define(eq=False)
class InsideLook:
    """A look at one training step from inside, or at several, whose passes are the rows of one record.

    The modules and parameters are the user's own: what is placed on them is placed for the length of
    `listening` and changes no number, and nothing is copied but gradients that others are added to.

    Args:
        run: its rows.
        steps: training steps that were looked at.
    """

    run: Run
    steps: int = 0
    _notes: dict[str, None] = attrs.field(factory=dict)
    _untold: set[str] = attrs.field(factory=set)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        measurements: Iterable[Measurement] = (),
        *,
        closely: bool = True,
        processes: Any = "alone",
    ) -> InsideLook:
        """Return a look that has seen nothing yet.

        Args:
            model: the model, as it is trained.
            measurements: what else to measure; those are left out that need gradients of their own.
            closely: whether to ask as well at which numbers gradient arrived, and of the model's parts.
            processes: which look together, as for `gradflow.observer`.

        Raises:
            ModelInputError: if the model is of a kind that cannot be looked into while it is trained.
            NoTrainableParametersError: if no parameter requires a gradient.
        """
        check_open(model)
        standing = (parts(), chance()) if closely else ()
        plan = Plan(steps=1, mode="keep", closely=closely, measurements=(*standing, *measurements))
        taps, state = TappedModel.of(model), _own_state(model)
        started = [m.start(model, taps.modules) for m in plan.measurements]
        sessions = tuple(session for session in started if session.hears_alone())
        if not state.trainable:
            raise NoTrainableParametersError(
                f"none of the parameters of {type(model).__name__} requires a gradient, so there is no flow "
                "to measure. Unfreeze the part that is meant to train: `model.requires_grad_(True)`."
            )
        given = Given(model, None, _never, _never, _never)
        reach = ReachFindings(state.trainable, state.originals)
        history = History(state.parameters, taps, closely)
        program, why = Program(given, state, taps), "the reverse pass of the training itself"
        line, facts = Line(processes_of(model, processes)), Facts(reducer=reducer_of(model))
        if not line.alone:
            taps.keep_means()
        return cls(Run(program, plan, "fused", why, sessions, history, reach, line=line, facts=facts))

    @contextlib.contextmanager
    def listening(self, scale: Callable[[], float] = lambda: 1.0) -> Iterator[Passes]:
        """Listen to a training step, for the length of the context.

        What the user's code raises in it comes through, and the look has failed.

        Args:
            scale: returns what a GradScaler multiplies losses with at present.
        """
        passes = Passes(self.run, scale)
        try:
            with unless_busy() as free, contextlib.ExitStack() as stack:
                if free:
                    stack.enter_context(led(self.run.program.taps.modules, passes.lead))
                    stack.enter_context(reverse_passes(passes))
                    stack.enter_context(uncompiled())
                    stack.enter_context(Ear(passes))
                else:
                    passes.fail("another thread is measuring at this moment")
                yield passes
        except BaseException as error:
            passes.fail(f"the step raised {type(error).__name__}")
            raise
        finally:
            passes.end()
        try:
            self._took(passes)
        except Exception as error:
            passes.fail(error)

    def _took(self, passes: Passes) -> None:
        """Take in what a training step has shown."""
        if not passes.failed and not passes.factors and not passes.overflowed:
            passes.fail(
                "no reverse pass of the model was run. Its layers must be called inside the context, and "
                "`backward` after them"
            )
        self.steps += 1
        self._untold |= passes.untold
        self._notes |= dict.fromkeys(_notes(passes))

    def failed_anywhere(self, why: str) -> str:
        """Return why a look has failed, on this process or another; "" if it has not.

        Args:
            why: it has on this one.
        """
        with self.run.line.opened():
            every = self.run.line.gathered(why)
        ranks = [rank for rank, said in enumerate(every) if said]
        return why or (f"on process {ranks[0]}, {every[ranks[0]]}" if ranks else "")

    def record(self) -> FlowRecord:
        """Return the record of all passes so far, of all processes that look together; at the end, once."""
        with self.run.line.opened():
            return self._record()

    def _record(self) -> FlowRecord:
        run, history = self.run, self.run.history
        history.merge_peaks()
        told = combine(run)
        reached = {str(name) for name, (_, n) in series(history, "grad").items() if (n > 0).any()}
        run.graph.conclude(reached, self._untold)
        record = joined(run, assembled(run, None), told)
        model = run.program.given.model
        standing = {note for note in standing_notes(model, ()) if not note.startswith("TorchScript")}
        own = [note for note in record.provenance.notes if note not in standing]
        if untold := sorted(self._untold - reached):
            own.append(
                f"No gradient is told of at the output of {some_of(repr(n) for n in untold)}: it is a "
                "parameter or an input, handed on."
            )
        origin = attrs.evolve(
            record.provenance,
            notes=[_ABSENT, *self._notes, *own],
            requested_steps=record.steps,
        )
        return attrs.evolve(record, provenance=origin)


def check_open(model: nn.Module) -> None:
    """Raise if a model is of a kind that cannot be looked into while it is trained.

    Raises:
        ModelInputError: if it is.
    """
    if spread := [name for name, p in model.named_parameters() if is_distributed(p)]:
        raise ModelInputError(
            f"{spread[0]!r} is spread over processes, and passes in which these gather or compute with parts "
            "of it are not listened to. Look beside them, on every process: `report = monitor(batch)`, of a "
            "monitor with processes='auto'."
        )
    check_model(model)
    if transforms():
        raise ModelInputError(
            "the training step runs in a transform of torch.func (`grad`, `vmap`, ...), which leaves no "
            "`.grad` and takes none of our probes. Look beside it: `report = monitor(batch)`."
        )
    compiled = [name for name, module in model.named_modules() if is_compiled(module)]
    if compiled:
        raise ModelInputError(
            f"{compiled[0] or '(model)'!r} is compiled: its inside cannot be listened to, and run as it was "
            "written, it rounds otherwise than the training does. Look beside it: `report = monitor(batch)`."
        )


def _own_state(model: nn.Module) -> WorkingState:
    """Return the user's own parameters and buffers, as what a run works on."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    originals = {id(p): name for name, p in parameters.items()}
    return WorkingState(dict(parameters), {}, dict(buffers), originals, Swap(model))


def _never(*args: Any) -> NoReturn:
    raise AssertionError("a look from inside runs nothing of the user's")


def _notes(passes: Passes) -> Iterator[str]:
    """Yield what a reader must know of the passes of a training step."""
    scales = sorted({abs(factor) for factor in passes.factors} - {1.0})
    if scales:
        known = " and ".join(f"{scale:.6g}" for scale in scales)
        yield f"Gradients are those of the loss before it was multiplied with {known}."
    if len(passes.factors) > 1:
        yield "A training step held several reverse passes: each is a step of this record."
    if passes.accumulated:
        yield "Gradients were accumulated: those of parameters are what each reverse pass has added."
    model = passes.run.program.given.model
    if distributed(model):
        yield (
            "Gradients of parameters are the mean over the processes, where they were exchanged, with all "
            "that had accumulated before; those at outputs are "
            + ("this process's own." if passes.run.line.alone else "of all of them together.")
        )
    left = _left(passes)
    if 0 < left < 1 - 1e-3:
        yield (
            f"What was done to the gradients after the reverse pass left {left:.3g} of their norm, as "
            "clipping does. Those told of are from before that."
        )
    if passes.left_out:
        yield f"Only the first {MOST} reverse passes of a training step that ran the model are measured."
    if passes.aside:
        yield (
            f"{some_of(repr(name or '(model)') for name in sorted(passes.aside))} was called without grad "
            "mode as well, which is no part of the passes."
        )


def _left(passes: Passes) -> float:
    """Return the share that was left of the last gradient at the end of the step, but for a scale undone.

    The scale is what the loss was multiplied with. That of micro-batches, of which each has its part of the
    weight, is the sum of what theirs were.
    """
    factors = [abs(factor) for factor in passes.factors] or [1.0]
    scale = sum(factors) if passes.measured and passes.accumulated else factors[-1]
    return passes.left * scale if scale > 1 and passes.left * scale < 1 + 1e-3 else passes.left
