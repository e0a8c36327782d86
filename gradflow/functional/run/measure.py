"""The run: draw a batch, call model and loss, read the numbers, update; and the looks into depth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.errors import ModelInputError, ModelNotCalledError, NoTrainableParametersError
from gradflow.functional.measurement import Session
from gradflow.functional.model.batches import detached_loss
from gradflow.functional.model.exclusive import exclusive, uncompiled
from gradflow.functional.model.layers import ancestors, callable_modules, is_layer, owner
from gradflow.functional.model.optimizers import copy_optimizer, update
from gradflow.functional.model.purity import ModuleState, RandomState, preserved, seed_all
from gradflow.functional.model.state import LazyCopies
from gradflow.functional.model.supported import check_supported, distributed
from gradflow.functional.reverse import numerics
from gradflow.functional.reverse.autograd_graph import Structure, bypassed, capturable
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.run.graph_record import cuts, graph_record, read_flows
from gradflow.functional.run.history import History, Row
from gradflow.functional.run.record import assembled, conclude
from gradflow.functional.run.run import Plan, Run
from gradflow.functional.run.step import Before, Outcome, Program, run_step
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.taps import tapped
from gradflow.functional.tap.watch import after_module
from gradflow.functional.torch_private import outside_transforms, transforms
from gradflow.records import FlowRecord

_MAX_TRACES = 3  # a NaN that comes back in every step is traced no more often than this


def measure(
    model: nn.Module,
    loss_module: nn.Module | None,
    evaluate: Callable[[Any, int], Any],
    draw: Callable[[int], Any],
    inputs_of: Callable[[Any], dict[str, Tensor]],
    plan: Plan,
) -> FlowRecord:
    """Run the plan and return what was measured; everything of the user's is put back.

    Args:
        model: the model.
        loss_module: the loss, where it is a module.
        evaluate: (batch, step) → loss, one call of model and loss each.
        draw: step → the next batch, on the model's device, or None at the end.
        inputs_of: batch → the model's input tensors by name.
        plan: how many steps, which optimizer, ...
    """
    roots = [model] if loss_module is None else [model, loss_module]
    check_supported(model)
    chosen = _choose_transform(plan.transform)
    outside = outside_transforms()  # a record holds plain numbers
    grad = torch.enable_grad()
    with (
        exclusive(), LazyCopies() as copies, preserved(*roots), outside, uncompiled(),
        torch.inference_mode(False), grad,
    ):  # fmt: skip
        _set_mode(model, plan.mode)
        for part in distributed(model):  # processes need not run in step; put back as any attribute is
            part.require_backward_grad_sync = part.require_forward_param_sync = False
            part.find_unused_parameters = part.static_graph = False
        if plan.seed is not None:
            seed_all(plan.seed)
        modules = callable_modules(model)
        recorder = Recorder(modules, {name for name, module in modules.items() if is_layer(module)})
        program = Program(model, loss_module, evaluate, recorder, inputs_of, copies)
        if not program.trainable:
            raise NoTrainableParametersError(
                f"none of the {len(program.parameters)} parameters of {type(model).__name__} requires a "
                "gradient, so there is no flow to measure. Unfreeze the part that is meant to train: "
                "`model.requires_grad_(True)`."
            )
        try:
            return _measured(program, plan, draw, chosen)
        finally:
            recorder.forget()
            del program  # its copies are gone before the originals are given their memory back


def _measured(
    program: Program, plan: Plan, draw: Callable[[int], Any], chosen: tuple[str, str]
) -> FlowRecord:
    """Run the plan on working copies; nothing that is made here outlives the call but the record."""
    model, loss_module, recorder = program.model, program.loss_module, program.recorder
    run = Run(program, plan, History(program), *chosen)
    run.sessions = [m.start(model, recorder.modules) for m in plan.measurements]
    optimizer = None
    if plan.optimizer is not None:
        known = {**program.parameters, **program.loss_parameters}
        optimizer = copy_optimizer(plan.optimizer, _Both.of(model, loss_module), known)
    with tapped(recorder):
        return _loop(run, draw, optimizer)


class _Both(nn.Module):
    """The model and the loss module, under the names that the program gives their parameters."""

    @staticmethod
    def of(model: nn.Module, loss_module: nn.Module | None) -> nn.Module:
        return model if loss_module is None else _Both(model, loss_module)

    def __init__(self, model: nn.Module, loss_module: nn.Module) -> None:
        super().__init__()
        self._both = (model, loss_module)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        model, loss_module = self._both
        yield from model.named_parameters()
        shared = {id(p) for p in model.parameters()}
        for name, parameter in loss_module.named_parameters():
            if id(parameter) not in shared:
                yield f"loss_fn.{name}", parameter


def _set_mode(model: nn.Module, mode: str) -> None:
    """Switch to train or eval; a model that is in that mode already keeps the modes of its parts."""
    if mode != "keep" and model.training != (mode == "train"):
        model.train(mode == "train")


def _choose_transform(asked: str) -> tuple[str, str]:
    if asked != "auto":
        return asked, "asked for"
    if transforms():
        return "vjp", "an outer torch.func transform is active"
    return "fused", "no outer transform is active, and fused kernels are kept"


# ------------------------------------------------------------------------------------ the loop


def _loop(run: Run, draw: Callable[[int], Any], optimizer: torch.optim.Optimizer | None) -> FlowRecord:
    program, plan = run.program, run.plan
    batch: Any = None
    before: Before | None = None
    skipped = 0
    for step in range(plan.steps):
        with program.swapped():  # closures that run the model see the parameters of this step
            drawn = draw(step)
            program.buffers |= program.current_buffers()
        if drawn is None:
            break
        look = plan.is_look(step)
        batch, before = drawn, Before.of(program, look=look)
        outcome = _step(run, batch, step, before)
        if look:
            program.torch_random |= before.random.torch_moved()
            program.host_random |= before.random.host_moved()
        _check_first(run, outcome, step)
        row = run.history.read(outcome, look=look, parameters_moved=optimizer is not None)
        if step == 0:
            program.recorder.captured = _captured(run)
        if look or run.history.settling:
            _learn_activations(run)
        if outcome.flows is not None and outcome.structure is not None:
            run.flows.append(read_flows(step, outcome.flows, outcome.structure))
            _add_structure(run, outcome.structure)
        if not row.finite:
            row = _trace(run, batch, step, before, row)
        elif run.history.in_doubt:
            row = _again(run, batch, step, before, row)
        run.history.rows.append(row)
        if outcome.structure is not None:
            outcome.structure.release()
        if optimizer is not None and step < plan.steps - 1:
            if row.finite:
                _update(run, optimizer, outcome, batch, step)
            else:
                skipped += 1
        del outcome  # its gradients would lie beside those of the next step
        if plan.progress is not None:
            plan.progress(step + 1, plan.steps)
    conclude(run, skipped)
    record = assembled(run)
    if plan.deepen is not None and before is not None and plan.detail == "cheap" and plan.deepen(record):
        return _deepened(run, batch, before, record)
    return record


def _step(run: Run, batch: Any, step: int, before: Before) -> Outcome:
    """Run one step; the first one also shows the structure."""
    program, full = run.program, run.plan.detail == "full" and run.transform == "fused"
    observer = None
    if step == 0:
        before.buffers = {n: b.clone() for n, b in program.buffers.items()}
        before.modules = ModuleState([m for m in (program.model, program.loss_module) if m is not None])
        run.dataflow = observer = DataFlow(program.recorder, program.inputs_of(batch))
    first = step == 0 and run.transform == "fused"
    if step == 0 and run.transform == "vjp":
        shown = run_step(
            program, batch, step, transform="fused", structural=True, look=False, observer=observer,
            before=before, sessions=run.sessions,
        )  # fmt: skip
        before.restore(program)
        if promoted := _promoted(program, shown):
            program.recorder.layer_names |= promoted
            return _step(run, batch, step, before)
        _check_first(run, shown, step)
        _end(run.sessions)
        _learn_structure(run, shown)
        if shown.structure is not None:
            shown.structure.release()
        if program.held:
            raise ModelInputError(
                f"{next(iter(program.held))!r} is used past the module that it belongs to: a list, a closure "
                "or the loss holds the parameter itself, taken beforehand, which the transform `vjp` cannot "
                "follow. Take it from its module when it is used, or pass `transform='fused'`."
            )
        observer = None
    look = run.plan.is_look(step)
    listening = run.sessions if look and run.transform == "fused" else []
    outcome = run_step(
        program, batch, step, transform=run.transform, structural=first, full=full, look=look,
        ranks=run.plan.is_end(step), observer=observer, before=before, sessions=listening,
    )  # fmt: skip
    if first:
        _learn_structure(run, outcome)
    if step == 0:
        program.recorder.on_enter = program.recorder.on_exit = None
        if first and (promoted := _promoted(program, outcome)):
            # A parent that uses a child's parameters without calling the child is the layer: start again.
            program.recorder.layer_names |= promoted
            before.restore(program)
            return _step(run, batch, step, before)
    _end(listening)
    return outcome


def _end(sessions: Iterable[Session]) -> None:
    """Have the sessions keep what they heard of a step, which now counts."""
    for session in sessions:
        session.end()


def _promoted(program: Program, outcome: Outcome) -> set[str]:
    """Return modules that use a never-called child's parameters although they are no layers themselves."""
    recorder = program.recorder
    called = {call.module for call in recorder.calls}
    promoted: set[str] = set()
    for name, gradient in outcome.gradients.items():
        module = owner(name, recorder.modules)
        if gradient is None or module in called or name not in program.parameters:
            continue
        above = next((a for a in ancestors(module) if a in called), None)
        if above is not None and above not in recorder.layer_names:
            promoted.add(above)
    return promoted


def _check_first(run: Run, outcome: Outcome, step: int) -> None:
    """Raise if the first step shows that there is nothing to measure."""
    recorder = run.program.recorder
    if step == 0 and not any(call.is_layer for call in recorder.calls):
        raise ModelNotCalledError(
            f"no layer of {type(run.program.model).__name__} was called in the first step. The function "
            "given must call this very model (a copy or another instance does not count): "
            "`lambda model, step: model(x)`."
        )
    if step == 0 and all(g is None for g in outcome.gradients.values()):
        raise detached_loss()


def _learn_structure(run: Run, outcome: Outcome) -> None:
    """Keep what the first step showed of the graph and the data flow."""
    structure, calls = outcome.structure, run.program.recorder.calls
    run.calls = calls
    run.structures = [structure] if structure is not None else []
    if run.dataflow is not None:
        run.severed = cuts(run.dataflow, structure, calls)
        run.dataflow.release()
    run.bypassed = set(bypassed(structure)) if structure is not None else set()
    run.capturable = capturable(structure) if structure is not None else set()


def _add_structure(run: Run, structure: Structure | None) -> None:
    """Keep the graph of a step, unless it is that of the step before."""
    kept = run.structures
    if structure is not None and not (kept and structure.groups is kept[-1].groups):
        kept.append(structure)


def _learn_activations(run: Run) -> None:
    """See to it that later steps are watched only while a rectifier applied as a function has units to come.

    Whether every unit of a rectifier fires at some time is followed in every step, until all have; other
    activations, at looks.
    """
    recorder, settled = run.program.recorder, run.history.settled
    keys = [key for key in run.history.peaks if key.kind == "rectifier" and key not in settled]
    run.program.watching = any(key.functional for key in keys)
    recorder.rectifiers = {key.layer: key for key in keys if not key.functional}
    recorder.after_module = functools.partial(after_module, recorder)


def _captured(run: Run) -> set[str]:
    """Return the calls whose output gradients are captured: the smallest, as far as memory goes.

    They may hold a million elements (some megabytes) or 1 percent of what the parameters do.
    """
    left = max(2**20, sum(p.numel() for p in run.program.parameters.values()) // 100)
    chosen = set()
    suited = [call for name, call in run.history.calls.items() if name in run.capturable - run.bypassed]
    for call in sorted(suited, key=lambda call: call.num_elements):
        left -= call.num_elements
        if left < 0:
            break
        chosen.add(call.name)
    return chosen


def _trace(run: Run, batch: Any, step: int, before: Before, row: Row) -> Row:
    """Run a step with a NaN or an Inf again, every operation watched, and keep its birth certificate.

    The sums of squares are in double precision this time: if nothing is found, only they had overflowed. The
    row that is returned stands in for the first one.
    """
    if run.traces >= _MAX_TRACES or run.program.reentrant:
        return row
    run.traces += 1
    program, recorder, history = run.program, run.program.recorder, run.history
    buffers, random = dict(program.buffers), RandomState()
    before.restore(program)
    recorder.exact.clear()
    tracer = numerics.Tracer(recorder)
    inputs = program.inputs_of(batch)
    owners = {name: owner(name, recorder.modules) for name in program.parameters}

    def certify(loss: Tensor, structure: Structure | None) -> None:
        run.numerics += numerics.certificates(
            tracer, loss, structure, step=step, inputs=inputs, parameters=program.parameters, owners=owners
        )  # fmt: skip

    outcome = run_step(
        program, batch, step, transform="fused", structural=True, look=True, observer=tracer, before=before,
        inspect=certify,
    )  # fmt: skip
    recorder.on_probe = None
    again = history.read(outcome, look=True, parameters_moved=run.plan.optimizer is not None)
    program.buffers = buffers
    random.restore()
    return again if _is_same(run, step, row.loss, again.loss) else row


def _is_same(run: Run, step: int, loss: float, again: float) -> bool:
    """Whether a step that was run again gave the same loss; a note is made if not."""
    same = bool(np.isclose(again, loss, rtol=1e-3, equal_nan=True))
    if not same:
        run.notes.append(
            f"Step {step} gave another loss when it was run again for a closer look: model or loss draw on "
            "something that had moved on (an iterator, a counter). Its numbers are those of the first run."
        )
    return same


def _again(run: Run, batch: Any, step: int, before: Before, row: Row) -> Row:
    """Run a step again with exact sums, where a fast one came out as zero and was not before.

    Zero may mean that the squares have underflowed. A sum that this happens to is exact from then on.
    """
    program = run.program
    if program.reentrant:
        return row
    buffers, random = dict(program.buffers), RandomState()
    before.restore(program)
    look = run.plan.is_look(step)
    outcome = run_step(
        program, batch, step, transform=run.transform, structural=False, look=look, before=before
    )
    exact = run.history.read(outcome, look=look, parameters_moved=run.plan.optimizer is not None)
    program.buffers = buffers
    random.restore()
    return exact if _is_same(run, step, row.loss, exact.loss) else row


def _update(run: Run, optimizer: torch.optim.Optimizer, outcome: Outcome, batch: Any, step: int) -> None:
    program = run.program

    def again() -> Tensor:
        recorder = program.recorder
        recorder.active = False
        with program.swapped():
            loss = program.loss(batch, step)
            gradients = torch.autograd.grad(loss, list(program.trainable.values()), allow_unused=True)
        for parameter, gradient in zip(program.trainable.values(), gradients, strict=True):
            parameter.grad = gradient
        return loss.detach()

    trainable = program.trainable
    update(optimizer, trainable, {n: outcome.gradients[n] for n in trainable}, again, outcome.loss)


def _deepened(run: Run, batch: Any, before: Before, record: FlowRecord) -> FlowRecord:
    """Measure the last step again with the flow on every edge, and return the record with it."""
    program, step = run.program, record.steps - 1
    before.restore(program)
    outcome = run_step(
        program, batch, step, transform="fused", structural=True, look=True, full=True, ranks=True,
        before=before,
    )  # fmt: skip
    if outcome.flows is None or outcome.structure is None:
        return record
    run.notes.clear()
    _is_same(run, step, float(record.losses[-1]), float(outcome.loss))
    flows = [read_flows(step, outcome.flows, outcome.structure)]
    assert run.dataflow is not None
    structures = [*run.structures, outcome.structure]
    graph = graph_record(structures, run.severed, run.calls, run.dataflow, flows, run.arrived)
    note = (
        f"The flow on every edge was measured at step {step}, run again with the same batch and random state."
    )
    notes = (*record.provenance.notes, note, *run.notes)
    return attrs.evolve(record, graph_record=graph, provenance=attrs.evolve(record.provenance, notes=notes))
