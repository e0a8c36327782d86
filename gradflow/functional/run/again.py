"""Closer looks at a step. It is run again to find the birth of a NaN, with exact sums, or with the flow on
every edge; the last one tells why gradient has not arrived at every number."""

from __future__ import annotations

import logging

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.errors import ProcessError
from gradflow.functional.model.layers import owner
from gradflow.functional.reach.origins import Origins
from gradflow.functional.reach.products import known_cotangents
from gradflow.functional.reach.terms import constant_terms, outside_records
from gradflow.functional.reverse import numerics
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.run.rows import Row
from gradflow.functional.run.run import Run
from gradflow.functional.run.step import Outcome, Request, evaluated, run_step
from gradflow.functional.run.together.gradients import averaged
from gradflow.functional.run.together.joined import joined_graph
from gradflow.functional.run.together.over_stages import graph_over_stages
from gradflow.functional.tap.asked import Asked
from gradflow.functional.tap.nodes import exchanges
from gradflow.functional.tap.recorder import Recorder
from gradflow.records import FlowRecord, OutsideRecord

logger = logging.getLogger("gradflow")


def traced(run: Run, request: Request, row: Row) -> Row:
    """Run a step with a NaN or an Inf again, told of every operation, and keep its birth certificate.

    Sums are taken in double precision this time: if nothing is found, only the sums had overflowed. The row
    returned replaces the first one.
    """
    program, taps = run.program, run.program.taps
    if program.learned.reentrant or not run.findings.may_trace():
        return row
    with request.before.again(program):
        taps.sum_exactly()
        run.stages.begin()
        tracer = numerics.Tracer()
        inputs = program.given.inputs_of(request.batch)
        owners = {name: owner(name, taps.modules) for name in program.state.parameters}
        bad = _not_finite(run)

        def certify(loss: Tensor, structure: Structure | None) -> None:
            nodes = [] if structure is None or run.line.alone else structure.nodes
            split = run.line.processes.model_axes or any(map(exchanges, nodes))  # a walk may end early
            found = numerics.certificates(
                tracer, loss, None if split else structure, step=request.step, inputs=inputs, bad=bad,
                owners=owners,
            )  # fmt: skip
            run.findings.certify(found)

        closely = Request(
            batch=request.batch, step=request.step, before=request.before, structural=True, look=True,
            listeners=(tracer,), inspect=certify,
        )  # fmt: skip
        shared = averaged(run, run_step(program, closely))
        moved = bool(run.plan.loop.optimizers)
        again = run.history.read(shared.outcome, look=True, parameters_moved=moved)
        again = attrs.evolve(again, broken=shared.broken)
    return again if _is_same(run, request.step, row.loss, again.loss) else row


def silent_traced(run: Run, request: Request) -> None:
    """Run the last step again, told of every operation, where it has handed back exactly nothing to all that
    some layer has: something that is not finite may have been swallowed on the way.

    Only where one process runs the whole model.
    """
    program, row = run.program, run.history.rows[-1]
    traceable = request.transform == "fused" and not program.learned.reentrant and run.everyone.alone
    if not (traceable and row.finite):
        return
    arrived: dict[str, float] = {}
    for (kind, name), number in zip(row.layout.places, row.values.tolist(), strict=True):
        if kind == "pgrad":
            layer = owner(str(name), program.taps.modules)
            arrived[layer] = max(arrived.get(layer, 0.0), number)
    if all(arrived.values()):
        return
    tracer = numerics.Tracer()
    closely = Request(batch=request.batch, step=request.step, before=request.before, listeners=(tracer,))
    with request.before.again(program):
        try:
            run_step(program, closely)
            run.findings.certify(numerics.swallowed(tracer, request.step))
        except Exception as error:  # the user's code cannot run the step a second time
            logger.debug("the last step cannot be traced: %r", error)


def _not_finite(run: Run) -> dict[str, int]:
    """Return, by name of a parameter that is not finite on any process, how bad it is."""
    parts = run.program.state.parts
    found = torch.tensor([numerics.badness(part) for part in parts.values()], dtype=torch.uint8)
    if run.program.state.shards:
        found = run.line.largest(found)
    return {name: bad for name, bad in zip(parts, found.tolist(), strict=True) if bad}


def summed_exactly(run: Run, request: Request, row: Row) -> Row:
    """Run a step again with exact sums, where a fast one is so small that its squares may have underflowed.

    Such a sum is taken exactly from then on.
    """
    program = run.program
    if program.learned.reentrant:
        return row
    with request.before.again(program):
        plainly = attrs.evolve(request, first=False, structural=False, full=False, ranks=False, listeners=())
        outcome, moved = run_step(program, plainly), bool(run.plan.loop.optimizers)
        exact = run.history.read(outcome, look=request.look, parameters_moved=moved)
    return exact if _is_same(run, request.step, row.loss, exact.loss) else row


def unscaled(run: Run, request: Request, row: Row) -> Row:
    """Run a step again as it is without the scale of the loss, which may be all that made it overflow."""
    program = run.program
    if program.learned.reentrant:
        return row
    with request.before.again(program):
        plainly = attrs.evolve(
            request, first=False, structural=False, full=False, ranks=False, listeners=(), scale=1.0
        )
        shared = averaged(run, run_step(program, plainly))
        plain = run.history.read(shared.outcome, look=request.look, parameters_moved=True)
        plain = attrs.evolve(plain, broken=shared.broken)
    return plain if _is_same(run, request.step, row.loss, plain.loss) else row


def heard_in_eval(run: Run, request: Request) -> None:
    """Run the last batch once more in eval mode, without gradients, for the sessions that ask for it.

    Models and losses need not take eval mode: what they raise in it ends the pass, and is no finding.
    """
    program, model = run.program, run.program.given.model
    sessions = tuple(session for session in run.sessions if session.wants_eval())
    if not run.stages.any(bool(sessions)):
        return
    modes = [(module, module.training) for module in model.modules()]
    recorder = Recorder(program.taps, Asked(watched=True, listeners=sessions))
    with request.before.again(program):
        run.stages.begin(returns=False)
        try:
            model.eval()
            with program.taps.heard_by(recorder), program.state.swapped(), torch.no_grad():
                for session in sessions:
                    session.begin(request.step, recorder)
                evaluated(program.given, request, recorder)
        except ProcessError:
            raise
        except Exception as error:
            logger.debug("the pass in eval mode ended early: %s", error)
        finally:
            for module, training in modes:
                module.training = training
        run.stages.end(0)


def deepened(run: Run, request: Request, record: FlowRecord) -> FlowRecord:
    """Measure the last step again with the flow on every edge, and return the record with it."""
    program, step = run.program, request.step
    with request.before.again(program):
        deeply = Request(
            batch=request.batch, step=step, before=request.before, structural=True, look=True, full=True,
            ranks=True,
        )  # fmt: skip
        shared = averaged(run, run_step(program, deeply))
    graph = run.graph.record_of(step, shared.outcome)
    if not run.line.alone:
        graph = joined_graph(run, run.line.gathered(graph, run.speaker))
    graph = graph_over_stages(run, graph)
    if graph is None:
        return record
    notes = [
        *record.provenance.notes,
        f"The flow on every edge was measured at step {step}, run again with the same batch and random "
        "state.",
    ]
    if (other := _other_loss(step, float(record.losses[-1]), float(shared.loss))) is not None:
        notes.append(other)
    return attrs.evolve(record, graph_record=graph, provenance=attrs.evolve(record.provenance, notes=notes))


def _is_same(run: Run, step: int, loss: float, again: float) -> bool:
    """Whether a step that was run again gave the same loss; a note is made if not."""
    if (other := _other_loss(step, loss, again)) is not None:
        run.findings.note(other)
    return other is None


def _other_loss(step: int, loss: float, again: float) -> str | None:
    """Return what a reader must know if a step that was run again gave another loss."""
    if np.isclose(again, loss, rtol=1e-3, equal_nan=True):
        return None
    return (
        f"Step {step} gave another loss when it was run again for a closer look: model or loss draw on "
        "something that had moved on (an iterator, a counter). Its numbers are those of the first run."
    )


# --------------------------------------------------------------------------------------------- reach


def learn_reach(run: Run, outcome: Outcome, dataflow: DataFlow) -> None:
    """Keep what the graph of the first step shows beside the parameters."""
    structure, given = outcome.structure, run.program.given
    outside: list[OutsideRecord] = []
    if structure is not None and structure.foreign:
        groups = [group for optimizer in run.plan.loop.optimizers for group in optimizer.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        known = {id(p) for module in given.modules for p in module.parameters()}
        outside = outside_records(structure.foreign, given.model, known, held)
    run.reach.learn(structure, outside, constant_terms(structure, dataflow))


def follow_reach(run: Run, outcome: Outcome, row: Row | None, *, look: bool) -> None:
    """Take in at which numbers gradient has arrived in a step.

    Args:
        run: the run.
        outcome: of the step.
        row: its numbers; None if they are not read yet.
        look: whether to ask as well which parameters are settled now.
    """
    if not run.plan.closely:
        return
    if row is None:
        run.reach.arrived.doubt_all()
    elif not run.history.rows:  # most parameters are settled by a number that the first step takes anyway
        numbers = list(zip(row.layout.places, row.values.tolist(), strict=True))
        run.reach.arrived.settle({str(name) for (kind, name), n in numbers if kind == "pzeros" and n == 0})
        norms = {str(name): n for (kind, name), n in numbers if kind == "pgrad"}
        largest = max(norms.values(), default=0.0)
        if not run.stages.alone:
            (largest,) = run.stages.largest([0.0 if np.isnan(largest) else largest])
        run.reach.arrived.doubt(norms, largest)
    run.reach.arrived.add(outcome.gradients.parameters, look=look)


@attrs.frozen(eq=False)
class Closer:
    """What a step is asked and listened to for, so that its zeros can be explained when it is over."""

    request: Request
    origins: Origins

    @classmethod
    def of(cls, run: Run, request: Request) -> Closer:
        """Return the closer look at the step of a request."""
        origins = Origins(list(run.program.state.buffers.values()))
        listeners = (*request.listeners, origins)
        return cls(attrs.evolve(request, structural=True, look=True, keep=True, listeners=listeners), origins)

    def look(self, run: Run, outcome: Outcome) -> None:
        """Find out why gradient did not arrive, where it did not; the step's graph is kept for that."""
        structure, program = outcome.structure, run.program
        run.reach.agree()
        if run.reach.is_open:
            inputs, known = program.given.inputs_of(self.request.batch), {}
            if structure is not None and outcome.gradients.products:
                gradients = outcome.gradients
                known = known_cotangents(
                    structure, gradients.products, gradients.parameters, program.state.leaves
                )
            with program.state.swapped():  # a checkpoint calls the model again
                run.reach.look(self.request.step, structure, self.origins, inputs, known)
        if run.reach.asks:
            with program.state.swapped():
                run.reach.ask(structure)
        self.origins.release()


def closer_look(run: Run, request: Request) -> Closer | None:
    """Return the closer look that a step gets if it is the last and something is not reached, else None."""
    plan = run.plan
    if request.transform != "fused" or run.program.learned.reentrant or not plan.is_last(request.step):
        return None
    if not plan.closely:
        return None
    run.reach.agree()
    asked = request.first or run.reach.is_open or run.reach.asks
    return Closer.of(run, request) if asked else None


def looked_again(run: Run, request: Request) -> None:
    """Look closely at the last step by running it again, where that was not done and something is open.

    So it is where nobody knew that it would be the last.
    """
    program, reach = run.program, run.reach
    if not run.plan.closely or program.learned.reentrant or request.transform != "fused":
        return
    reach.agree()
    if not run.stages.any(reach.asks or (reach.closely is None and not reach.failed and reach.is_open)):
        return
    closer = Closer.of(run, Request(batch=request.batch, step=request.step, before=request.before))
    with request.before.again(program), run.stages.trying():
        try:
            closer.look(run, run_step(program, closer.request))
        except ProcessError:
            raise
        except Exception as error:  # the user's code cannot run the step a second time
            reach.fail(f"{type(error).__name__}: {error}"[:200])
