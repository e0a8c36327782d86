"""From a run to its record: what was seen, where the numbers come from, and what a reader must know."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Collection, Iterator

import numpy as np
import torch

from gradflow.functional.extras import measured
from gradflow.functional.model.layers import ancestors, owner, passed_by
from gradflow.functional.model.optimizers import learning_rates, optimized
from gradflow.functional.model.supported import standing_notes
from gradflow.functional.reach.findings import Wires
from gradflow.functional.run.assembly import activation_records, layer_records, parameter_records
from gradflow.functional.run.history import series
from gradflow.functional.run.run import Run
from gradflow.functional.tap.calls import type_name
from gradflow.functional.torch_private import BatchNorm
from gradflow.records import FlowRecord, KnowledgeRecord, Provenance, UpdatesRecord


def conclude(run: Run) -> None:
    """Note what a reader must know, and where the gradient was seen to arrive."""
    unprobed, history, held = run.program.taps.unprobed, run.history, run.program.learned.held
    history.merge_peaks()
    note = run.findings.note
    if skipped := run.updates.num_skipped:
        why = "so that the steps after them could still be measured"
        note(
            f"{skipped} updates with a non-finite loss or gradient were skipped, "
            f"{why if run.plan.loop.scaler is None else 'as the scaler has it'}."
        )
    for name in sorted(unprobed):
        note(
            f"No gradient could be measured at the output of {name!r}: it shares its storage with the "
            "layer's input, and is changed in place afterwards."
        )
    past = run.graph.bypassed
    if run.transform == "vjp" or run.program.learned.reentrant:  # which see what passes the probes alone
        past = past | run.program.taps.entered
    for name in sorted(past):
        if history.calls[name].module not in unprobed:
            note(
                f"Some gradient enters {name or '(model)'!r} elsewhere than by what it returned (something "
                "of it is kept on an attribute or used by a derivative that the model takes, or its output "
                "is of an unknown class). It is no part of the output gradient measured there."
            )
    if held and run.plan.loop.optimizers:
        note(
            f"{', '.join(map(repr, held))}: used past the module as well (a list, a closure or the loss "
            "holds the parameter itself), where it stays as it is while copies are stepped."
        )
    arrived = {str(name) for name, (_, n) in series(history, "grad").items() if (n > 0).any()}
    run.graph.conclude(arrived, {name for name, call in history.calls.items() if call.module in unprobed})


def assembled(run: Run, knowledge: KnowledgeRecord | None) -> FlowRecord:
    """Return the record of a run."""
    modules, parameters = run.program.taps.modules, run.program.state.parameters
    plan, history = run.plan, run.history
    called = {call.module for call in history.calls.values()}
    owners = {name: owner(name, modules) for name in parameters}
    owned: dict[str, list[str]] = {}
    reached = series(history, "pgrad")
    never: dict[str, bool] = {}  # by module that was never called: whether a parameter of it is used
    for name, module in owners.items():
        used = name in reached or name in run.graph.taken
        user = module
        if module not in called:
            user = next((a for a in ancestors(module) if a in called), "") if used else module
        owned.setdefault(user, []).append(name)
        if module not in called and parameters[name].requires_grad:
            never[module] = never.get(module, False) or used
    optimizers = plan.loop.optimizers
    chosen = optimized(optimizers, run.program.given.model) if optimizers else None
    idle = [name for name, used in never.items() if not used]
    found = measured(run.sessions)
    return FlowRecord(
        steps=len(history.rows),
        losses=np.array([row.loss for row in history.rows]),
        layers=layer_records(history, owned),
        parameters=parameter_records(history, owners, chosen),
        activations=activation_records(history),
        numerics=run.findings.numerics,
        never_called=idle,
        passed_by=passed_by(idle, called | {call.module for call in run.graph.calls}, modules),
        graph_record=run.graph.record(),
        reach=run.reach.account(_wires(run, idle)) if run.plan.closely else None,
        provenance=_provenance(run, found.notes, found.found),
        extras=found.extras,
        knowledge=knowledge,
        updates=_updates(run, owners) if optimizers else None,
        **found.fields,
    )


def _updates(run: Run, owners: dict[str, str]) -> UpdatesRecord:
    """Return what the optimizers did."""
    given = run.program.given
    known = [p for module in given.modules for p in module.parameters()]
    every = {**owners, **dict.fromkeys(run.program.state.loss_parameters, "")}
    return run.updates.record(len(run.history.rows), every, run.plan.loop.optimizers, known)


def _wires(run: Run, idle: Collection[str]) -> Wires:
    """Return what the wiring says of parameters to which no path leads.

    Args:
        run: at its end.
        idle: modules that no step ran or used.
    """
    cuts: dict[str, tuple[str, str]] = {}
    for cut in run.graph.severed:
        call = run.history.calls.get(cut.source)
        if call is not None and cut.reason:
            cuts.setdefault(call.module, (cut.reason, cut.target))
    called = {call.module for call in run.history.calls.values()}
    taps = run.program.taps
    return Wires(idle, called, cuts, taps.modules, taps.copied())


def _of_stage(run: Run) -> Iterator[str]:
    """Yield what a reader must know of a stage of a pipeline."""
    stage = run.stages.stage
    if stage is None or stage.microbatches < 2:
        return
    norms = any(isinstance(m, BatchNorm) and m.training for m in run.program.given.model.modules())
    if norms:
        yield (
            f"Batches went through the stages in one piece, not in {stage.microbatches} microbatches: batch "
            "norms have taken their statistics of more samples than they do in training."
        )


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("gradient-flow")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0"


def _provenance(run: Run, said: tuple[str, ...], chosen: tuple[str, ...]) -> Provenance:
    model, plan, steps = run.program.given.model, run.plan, len(run.history.rows)
    parameters = list(run.program.state.parameters.values())
    optimizers, staged = plan.loop.optimizers, not run.stages.alone
    notes = [*run.findings.notes, *standing_notes(model, optimizers, alone=run.line.alone, staged=staged)]
    notes += _of_stage(run)
    if run.graph.summed:
        notes.append(
            f"The loss is the plain sum or mean of an output of shape {run.graph.summed}: its elements all "
            "get one and the same gradient, whatever they are. If that output is for other layers (of the "
            "next stage of a pipeline, of the rest of a model), no verdict here is on training."
        )
    notes += said
    if run.program.taps.hooked and plan.detail == "full":
        notes.append(
            "The model puts hooks on tensors. The flow on the edges is without them; gradients are with them."
        )
    if steps < plan.steps:
        notes.append(f"The batches ended after {steps} of {plan.steps} steps.")
    if run.reach.failed:
        notes.append(f"Why gradient did not arrive at some numbers could not be found: {run.reach.failed}")
    if plan.detail == "full" and not run.graph.flows:
        why = (
            "a reentrant activation checkpoint hides a part of the graph; `use_reentrant=False` shows it."
            if run.program.learned.reentrant
            else "the transform `vjp` leaves no graph to walk; `fused` does."
        )
        notes.append(f"The flow on the edges could not be measured: {why}")
    return Provenance(
        versions={
            "gradflow": _version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        device=str(parameters[0].device),
        dtypes=sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        model=type_name(model if run.stages.stage is None else run.stages.stage.module),
        num_parameters=sum(p.numel() for p in parameters),
        seed=plan.seed,
        requested_steps=plan.steps,
        transform=run.transform,
        transform_reason=run.transform_reason,
        mode=plan.mode,
        detail=plan.detail,
        optimizer=plan.loop.name,
        clip=None if plan.loop.clip is None else float(plan.loop.clip),
        loop=plan.loop.described(),
        learning_rates=learning_rates(plan.loop.optimizers),
        notes=notes,
        chosen=chosen,
    )
