"""The steps of a run: draw a batch, call model and loss, read the numbers, update."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import attrs

from gradflow.errors import ModelInputError, ModelNotCalledError
from gradflow.functional.measurement import Session
from gradflow.functional.model.layers import ancestors, owner
from gradflow.functional.model.supported import check_stage_loss
from gradflow.functional.processes.line import BatchesEnded
from gradflow.functional.reverse.autograd_graph import Structure, capturable, entered
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.run.again import (
    Closer,
    closer_look,
    deepened,
    follow_reach,
    heard_in_eval,
    learn_reach,
    looked_again,
    silent_traced,
    summed_exactly,
    traced,
    unscaled,
)
from gradflow.functional.run.knowledge import knowledge
from gradflow.functional.run.program import Before, Program
from gradflow.functional.run.record import assembled, conclude
from gradflow.functional.run.run import Run
from gradflow.functional.run.step import Outcome, Request, run_step
from gradflow.functional.run.together.gradients import averaged
from gradflow.functional.run.together.joined import joined
from gradflow.functional.run.together.numbers import combine
from gradflow.functional.run.together.over_stages import over_stages
from gradflow.functional.run.together.whole import agreed, agreed_without_batch, without_batch
from gradflow.functional.run.training.curves import Ends, bent
from gradflow.functional.run.training.stepper import Stepper
from gradflow.functional.updates.log import UpdateLog
from gradflow.records import FlowRecord


def run_plan(
    run: Run, draw: Callable[[int], Any], make_stepper: Callable[[UpdateLog], Stepper] | None
) -> FlowRecord:
    """Run the steps that the plan asks for, and return the record.

    Args:
        run: at its beginning.
        draw: step → the next batch, or None at the end.
        make_stepper: makes what steps the working parameters; None leaves them as they are.
    """
    program, plan, history = run.program, run.plan, run.history
    stepper = None if make_stepper is None else make_stepper(run.updates)
    request: Request | None = None
    first: Request | None = None
    output, alone = None, run.everyone.alone
    for step in range(plan.steps):
        with program.state.swapped():  # closures that run the model see the parameters of this step
            batch = draw(step)
            program.state.keep_buffers()
        if batch is None:
            run.everyone.end_batches()
            break
        last, request = request, _request(run, step, batch, stepper)
        first = request if first is None and stepper is not None else first
        closer = closer_look(run, request) if request.look else None  # the last step is a look
        request = request if closer is None else closer.request
        if program.learned.reentrant or not alone:
            program.taps.sum_exactly()  # its steps are not run again where a fast sum fails
        try:
            if not alone:
                run.everyone.go_on()  # a model may exchange something itself
            outcome = _first_step(run, request) if step == 0 else _step(run, request)
            shared = averaged(run, outcome)
        except BatchesEnded:
            request = last
            break
        outcome = shared.outcome
        row = history.read(outcome, look=request.look, parameters_moved=stepper is not None)
        row = attrs.evolve(row, broken=True) if shared.broken else row
        overflown = request.scale != 1.0 and not row.finite
        overflown = overflown and run.stages.any(not outcome.gradients.finite)
        follow_reach(run, outcome, row, look=request.look)
        if closer is not None:
            closer.look(run, outcome)
        if step == 0 and not plan.is_last(step) and outcome.structure is not None:
            program.learned.capture(_captured(run, outcome.structure))
        if request.look or history.settling or step + 1 == history.recent_from:
            program.learned.follow(history.followed_rectifiers(step + 1))
        run.graph.add(step, outcome)
        if not row.finite and request.scale != 1.0:
            row = unscaled(run, request, row)
        if not row.finite:
            row = traced(run, request, row)
        elif history.in_doubt:
            row = summed_exactly(run, request, row)
        history.keep(row)
        if request.look and not run.line.alone:
            run.facts.look(step, program.given.inputs_of(batch))
        output = outcome.output
        if outcome.structure is not None:
            outcome.structure.release()
        _end(run, request)
        if stepper is not None and not plan.is_last(step):
            if shared.loss is not outcome.loss:
                outcome = attrs.evolve(outcome, loss=shared.loss)
            stepper.after(program, request, outcome, finite=row.finite and not overflown, end=plan.end)
        del outcome, shared  # frees its gradients before the next step
        if plan.progress is not None:
            plan.progress(step + 1, plan.steps)
    if request is not None:
        looked_again(run, request)
        silent_traced(run, request)
        heard_in_eval(run, request)
    known = None if request is None else knowledge(program, request, output, history.rows[-1].loss)
    told = combine(run)
    conclude(run)
    record = over_stages(run, joined(run, assembled(run, known), told))
    if request is None:
        return record
    deepens = plan.deepen
    if deepens is not None and plan.detail == "cheap" and run.decides(lambda: deepens(record)):
        record = deepened(run, request, record)
    if first is None or stepper is None or make_stepper is None or not _asks_for_curves(run, record):
        return record
    return bent(run, Ends(first, request, stepper, lambda: make_stepper(UpdateLog())), record)


def _asks_for_curves(run: Run, record: FlowRecord) -> bool:
    """Whether to measure how the loss bends along an update: a session asks for it, or what was seen does."""
    asked = run.stages.any(any(session.wants_curvature() for session in run.sessions))
    bends = run.plan.bend
    return asked or (bends is not None and run.decides(lambda: bends(record)))


def _request(run: Run, step: int, batch: Any, stepper: Stepper | None) -> Request:
    """Return what the plan asks of a step."""
    plan, fused = run.plan, run.transform == "fused"
    look, first = plan.is_look(step), step == 0  # the first step and the last are looks
    return Request(
        batch=batch,
        step=step,
        before=Before.of(run.program, look=look, first=first),
        transform=run.transform,
        first=first and fused,
        structural=first and fused,
        look=look,
        full=plan.detail == "full" and fused,
        scale=stepper.loss_scale if fused and stepper is not None else 1.0,
        passing=first and fused and stepper is None and plan.end == 1 and run.everyone.alone,
        closely=plan.closely,
        ranks=look and plan.is_end(step),
        listeners=_listening(run, step) if look and fused else (),
        keep_output=look and fused and plan.is_last(step),
    )


def _listening(run: Run, step: int) -> tuple[Session, ...]:
    """Return the sessions that want to hear of a measured step: in the first one, all."""
    end = run.plan.is_end(step)
    return tuple(session for session in run.sessions if step == 0 or session.listens(end=end))


def _step(run: Run, request: Request) -> Outcome:
    """Run a step of the plan."""
    outcome = run_step(run.program, request)
    if request.look:
        run.program.learned.saw_random(request.before.random)
    return outcome


def _first_step(run: Run, request: Request) -> Outcome:
    """Run the first step, which shows the structure as well; `vjp` needs one more for that, beforehand."""
    program, vjp = run.program, run.transform == "vjp"
    closer = None
    if vjp:
        plain = attrs.evolve(request, transform="fused", first=True, look=False, listeners=run.sessions)
        closer = Closer.of(run, plain)
    shown, dataflow = _shown_whole(run, request if closer is None else closer.request)
    learn_reach(run, shown, dataflow)
    if closer is not None:
        follow_reach(run, shown, None, look=True)
        closer.look(run, shown)
        request.before.restore(program)
    _check_first(run, shown)
    run.graph.learn(shown, dataflow, program.state.leaves, run.stages)
    if run.graph.summed:
        check_stage_loss(program.given.model)
    if vjp:
        if shown.structure is not None:
            shown.structure.release()
        _check_not_held(program)
        shown = run_step(program, request)
        _check_first(run, shown)
    program.learned.saw_random(request.before.random)
    return shown


def _shown_whole(run: Run, request: Request) -> tuple[Outcome, DataFlow]:
    """Return what a structural step shows.

    On several processes the gradients of outputs that do not come from the batch are kept whole.
    """
    program, line = run.program, run.line
    shown, dataflow = structural_step(program, request)
    if line.alone or program.learned.reentrant or not request.look:
        return shown, dataflow
    calls, groups = without_batch(shown.structure, dataflow, shown.recorder)
    whole = agreed_without_batch(line, calls, shown.recorder)
    run.wholes.learn(whole, agreed(line, groups))
    program.taps.keep_whole(whole, run.wholes.groups)
    if not run.stages.any(bool(whole) or (request.full and bool(run.wholes.groups))):
        return shown, dataflow
    shown = _let_go(shown, dataflow)
    request.before.restore(program)
    return structural_step(program, request)


def _let_go(outcome: Outcome, dataflow: DataFlow) -> None:
    """Let go of a step that is run again, which would hold its activations beside those of the next."""
    if outcome.structure is not None:
        outcome.structure.release()
    dataflow.release()


def structural_step(program: Program, request: Request) -> tuple[Outcome, DataFlow]:
    """Run a structural step until it is known which modules are the layers, and where their outputs go.

    A parent that uses a child's parameters without calling the child is the layer: then it starts again. So
    it does where outputs are used past their probes.
    """
    stages = program.given.stages
    while True:
        program.taps.look_for_hooks()
        stages.begin()
        dataflow = DataFlow(program.given.inputs_of(request.batch))
        outcome = run_step(program, attrs.evolve(request, listeners=(dataflow, *request.listeners)))
        promoted = _promoted(program, outcome, dataflow.leaves)
        new = set() if outcome.structure is None else entered(outcome.structure) - program.taps.entered
        if not stages.any(bool(promoted) or (bool(new) and not program.learned.reentrant)):
            return outcome, dataflow
        outcome = _let_go(outcome, dataflow)
        program.taps.promote(promoted)
        program.taps.gather_whole(new)
        request.before.restore(program)


def _end(run: Run, request: Request) -> None:
    """Have the sessions keep what they heard of a step, which now counts; its graph was let go of."""
    for session in run.sessions if request.listeners or request.step == 0 else ():
        if request.step == 0 or any(session is heard for heard in request.listeners):
            session.end()


def _promoted(program: Program, outcome: Outcome, taken: Collection[int]) -> set[str]:
    """Return modules that use a never-called child's parameters although they are no layers themselves.

    Args:
        program: with its taps.
        outcome: of a step; a parameter that has a gradient is used.
        taken: ids of the parameters that functions took, which tell it where none has a gradient.
    """
    taps, gradients = program.taps, outcome.gradients
    called = {call.module for call in outcome.recorder.calls}
    promoted: set[str] = set()
    for name, gradient in gradients.parameters.items():
        module, parameter = owner(name, taps.modules), program.state.parameters.get(name)
        used = gradient is not None or (gradients.are_none and id(parameter) in taken)
        if not used or module in called or parameter is None:
            continue
        above = next((a for a in ancestors(module) if a in called), None)
        if above is not None and above not in taps.layer_names:
            promoted.add(above)
    return promoted


def _check_first(run: Run, outcome: Outcome) -> None:
    """Raise if the first step shows that there is nothing to measure."""
    if not outcome.recorder.calls:
        model, copied = run.program.given.model, sorted(run.program.taps.copied())
        seen = (
            f" Modules that are like {', '.join(name or 'the model itself' for name in copied[:3])}, and are "
            "no part of it, were called: a copy has parameters of its own, whose gradients do not come back."
            if copied
            else ""
        )
        raise ModelNotCalledError(
            f"no layer of {type(model).__name__} was called in the first step.{seen} The function "
            "given must call this very model (a copy or another instance does not count): "
            "`lambda model, step: model(x)`."
        )


def _check_not_held(program: Program) -> None:
    """Raise if a parameter is used past its module, which a transform cannot follow."""
    if program.learned.held:
        raise ModelInputError(
            f"{next(iter(program.learned.held))!r} is used past the module that it belongs to: a list, a "
            "closure or the loss holds the parameter itself, taken beforehand, which the transform `vjp` "
            "cannot follow. Take it from its module when it is used, or pass `transform='fused'`."
        )


def _captured(run: Run, structure: Structure) -> set[str]:
    """Return the calls whose output gradients later steps capture: the smallest, as far as memory goes.

    Together they hold at most a million elements (some megabytes), or 1 percent of the parameters' number.
    """
    if run.program.state.shards.groups:
        return set()  # `backward()` hands out no gradient at an edge
    left = max(2**20, sum(p.numel() for p in run.program.state.parameters.values()) // 100)
    chosen, wanted = set(), capturable(structure) - run.graph.bypassed
    suited = [call for name, call in run.history.calls.items() if name in wanted]
    for call in sorted(suited, key=lambda call: call.num_elements):
        left -= call.num_elements
        if left < 0:
            break
        chosen.add(call.name)
    return chosen
