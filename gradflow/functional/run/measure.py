"""A run from its beginning to its end: what is the user's is put aside, measured on copies, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn

from gradflow.errors import ModelInputError, NoTrainableParametersError
from gradflow.functional.model.closures import reachable
from gradflow.functional.model.layers import held_by
from gradflow.functional.model.optimizers import asks_again
from gradflow.functional.model.purity import preserved, seed_all
from gradflow.functional.model.state import LazyCopies, loss_prefix
from gradflow.functional.model.supported import check_supported, distributed
from gradflow.functional.model.threads import exclusive, uncompiled
from gradflow.functional.processes.group import Processes, check_told
from gradflow.functional.processes.line import Line
from gradflow.functional.processes.prefixed import Prefixed
from gradflow.functional.processes.shards import Shards, processes_with
from gradflow.functional.processes.stages import Stages
from gradflow.functional.reach.findings import ReachFindings
from gradflow.functional.run.history import History
from gradflow.functional.run.loop import run_plan
from gradflow.functional.run.program import Given, Program, WorkingState
from gradflow.functional.run.run import Plan, Run
from gradflow.functional.run.together.facts import Facts, reducer_of
from gradflow.functional.run.training.stepper import Stepper, is_enabled
from gradflow.functional.tap.tapped import TappedModel
from gradflow.functional.tap.taps import tapped
from gradflow.functional.torch_pipelining import kept
from gradflow.functional.torch_private import outside_transforms, transforms
from gradflow.functional.updates.log import UpdateLog
from gradflow.records import FlowRecord

# NOTE [Memory that goes back and forth]
# The C library of Linux hands what is free at the end of its memory back to the system once that is more than
# twice the largest block that it ever handed back by itself, and the next step gets it anew, page by page.
# The gradients of a run, and its optimizer's scratch, come to lie at that end, where those of the training
# have its optimizer's state behind them: that took some runs a tenth of their time, others a third. A block
# that is made and let go of, and never touched, takes that bound up; to where any training on a CPU takes it
# that lets go of a tensor of this size. Other C libraries are not moved by it.

_KEPT = 31 * 2**20  # bytes; there is no such bound for blocks from 32 MiB on


def _keep_freed_memory() -> None:
    """Have the process keep what steps let go of; see NOTE [Memory that goes back and forth]."""
    np.empty(_KEPT, np.uint8)


def measure(given: Given, draw: Callable[[int], Any], plan: Plan) -> FlowRecord:
    """Run the plan and return what was measured; everything of the user's is put back.

    Args:
        given: model and loss.
        draw: step → the next batch, on the model's device, or None at the end.
        plan: how many steps, which optimizer, ...
    """
    stages = given.stages
    _keep_freed_memory()
    check_supported(given.model, spread=True)
    if stages.alone:
        return _on_processes(given, draw, plan)
    _check_stage(plan)
    among, step_fn = _processes(given, plan), plan.loop.step_fn
    if step_fn is not None and (among.batch_axes or distributed(given.model)):
        raise ModelInputError(
            f"step_fn was passed, and stage {stages.index} of the pipeline is on several processes that "
            "average its gradients. A schedule runs DistributedDataParallel and `fully_shard` by itself, by "
            "what these keep of your own parameters, and would leave them with half an exchange if it ran "
            "on copies. Say what the step does by optimizer=, clip=, accumulate=, scheduler= and scaler=, on "
            "all processes."
        )
    stages.connect(among)
    check_told(plan.processes, stages.line.processes)
    running = () if step_fn is None else (given.handed, *reachable((step_fn,)))
    with stages.line.opened(), kept(*running):
        _check_alike(stages, plan)
        if stages.meet(held_by(given.model)):
            given = attrs.evolve(given, model=Prefixed(f"stage{stages.index}", given.model))
        return _on_processes(given, draw, plan)


def _processes(given: Given, plan: Plan) -> Processes:
    """Return the processes that have the same model, or stage of one."""
    stage = given.stages.stage
    return processes_with(plan.among, *given.modules, stages=1 if stage is None else stage.number)


def _on_processes(given: Given, draw: Callable[[int], Any], plan: Plan) -> FlowRecord:
    """Run the plan on all processes that have the same model."""
    model, stages = given.model, given.stages
    shards = Shards.of(*given.modules)
    line = Line(_processes(given, plan), stages.line)
    if stages.alone:
        check_told(plan.processes, line.processes)
    facts = Facts(reducer=reducer_of(model))
    transform = _choose_transform(plan.transform)
    if shards and transform[0] == "vjp":
        raise ModelInputError(
            f"the transform is `vjp` ({transform[1]}), which does not take parameters that are spread over "
            f"processes, such as {next(iter(shards.spread))!r}. Pass transform='fused', outside of any "
            "transform of torch.func."
        )
    outside = outside_transforms()  # a record holds plain numbers
    grad = torch.enable_grad()
    with (
        line.opened(), exclusive(), shards.kept(stepped=bool(plan.loop.optimizers)),
        LazyCopies(*given.modules) as copies,
        preserved(*given.modules, also=given.functions) as held, outside, uncompiled(),
        torch.inference_mode(False), grad,
    ):  # fmt: skip
        set_mode(model, plan.mode)
        for part in distributed(model):  # waits for no other process; `preserved` puts the attributes back
            part.require_backward_grad_sync = part.require_forward_param_sync = False
            part.find_unused_parameters = part.static_graph = False
        if plan.seed is not None:
            seed_all(plan.seed)
        taps, state = TappedModel.of(model, stages.modules), WorkingState.of(given, copies, shards)
        if not stages.any(bool(state.trainable)):
            raise NoTrainableParametersError(
                f"none of the {len(state.parameters)} parameters of {type(model).__name__} requires a "
                "gradient, so there is no flow to measure. Unfreeze the part that is meant to train: "
                "`model.requires_grad_(True)`."
            )
        try:
            everyone = line if stages.alone else stages.line
            if not everyone.alone:
                plan = attrs.evolve(plan, num_batches=_fewest(everyone, plan))
            return _measured(Program(given, state, taps, held=held), plan, draw, transform, line, facts)
        finally:
            shards.rest()
            taps.forget()
            del state  # frees the copies before the originals are given their memory back


def _measured(
    program: Program,
    plan: Plan,
    draw: Callable[[int], Any],
    transform: tuple[str, str],
    line: Line,
    facts: Facts,
) -> FlowRecord:
    """Run the plan on working copies; nothing that is made here outlives the call but the record."""
    given, state, taps = program.given, program.state, program.taps
    sessions = tuple([m.start(given.model, taps.modules) for m in plan.measurements])
    for session in sessions:
        session.beside(given.stages.beside)
    reach = ReachFindings(state.trainable, state.originals, state.shards, line, given.stages)
    history = History(state.parameters, taps, plan.closely, plan.end)
    run = Run(program, plan, *transform, sessions, history, reach, line=line, facts=facts)
    if not line.alone:
        taps.keep_means()
        kinds = {"parameter": state.every_parameter, "buffer": state.buffers}
        alike = {
            kind: {n: t for n, t in of.items() if n not in state.shards.spread} for kind, of in kinds.items()
        }
        tensors = {n: (kind, t) for kind, of in alike.items() for n, t in of.items()}
        run.facts.compare(line, given.model, tensors)

    def make_stepper(log: UpdateLog) -> Stepper:
        both = _Both.of(given.model, given.loss_module)
        return Stepper.of(plan.loop, both, state.every_parameter, log, line)

    with tapped(taps):
        return run_plan(run, draw, make_stepper if plan.loop.optimizers else None)


def _fewest(line: Line, plan: Plan) -> int | None:
    """Return how many batches every process has, as far as that is known."""
    own = np.inf if plan.num_batches is None else plan.num_batches
    fewest = -float(line.extremes(np.array([-own]))[0])
    return None if np.isinf(fewest) else int(fewest)


def _check_stage(plan: Plan) -> None:
    """Raise if a plan asks for what is not to be had of the stages of a pipeline.

    Raises:
        ModelInputError: if it does.
    """
    asked = {
        "transform='vjp'": _choose_transform(plan.transform)[0] == "vjp",
        "processes='alone'": plan.among == "alone",
        "an optimizer that asks for the loss at other parameters": any(map(asks_again, plan.loop.optimizers)),
    }
    for what in (name for name, given in asked.items() if given):
        raise ModelInputError(
            f"the model is a stage of a pipeline, and {what} was passed{_INSTEAD[what.partition('=')[0]]}"
        )


def _check_alike(stages: Stages, plan: Plan) -> None:
    """Raise on all processes if they were not told the same of what a loop does to all stages at once.

    Raises:
        ModelInputError: if they were not.
    """
    loop = plan.loop
    scaler = loop.scaler if is_enabled(loop.scaler) else None
    told = {
        "optimizer": "one" if loop.optimizers else None,
        "clip": loop.clip,
        "accumulate": loop.accumulate,
        "a scaler with the scale": None if scaler is None else float(scaler.get_scale()),
        "step_fn": "one" if loop.step_fn is not None else None,
    }
    every = stages.line.agreed(told)
    for what in told if every is not None else ():
        found = {rank: said[what] for rank, said in zip(stages.line.ranks, every or (), strict=True)}
        first = stages.line.ranks[0]
        for rank in (rank for rank, value in found.items() if value != found[first]):
            raise ModelInputError(
                f"{what}: {found[first]} was passed on process {first}, and {found[rank]} on process {rank}, "
                "but a loop does that to all stages of a pipeline at once. Pass the same on every process, "
                "for a stage that is frozen an optimizer of its parameters as they are."
            )


_INSTEAD = {
    "transform": ", by which torch.func differentiates a model as one function of all its parameters, which "
    "no process has. Pass transform='fused', outside of any transform of torch.func.",
    "processes": ", which is for a model that a process has all of. Pass processes='auto', and call gradflow "
    "on the process of every stage.",
    "an optimizer that asks for the loss at other parameters": ". That of each stage would ask as often as "
    "it likes, at a point on a line of its own, and a loss takes a pass through all stages at one point. "
    "Leave it out, which holds the parameters fixed, or pass one that steps once a batch, such as "
    "`torch.optim.SGD`.",
}


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
        shared, prefix = {id(p) for p in model.parameters()}, loss_prefix(model)
        for name, parameter in loss_module.named_parameters():
            if id(parameter) not in shared:
                yield f"{prefix}{name}", parameter


def set_mode(model: nn.Module, mode: str) -> None:
    """Switch to train or eval; a model that is in that mode already keeps the modes of its parts."""
    if mode != "keep" and model.training != (mode == "train"):
        model.train(mode == "train")


def _choose_transform(asked: str) -> tuple[str, str]:
    if asked != "auto":
        return asked, "asked for"
    if transforms():
        return "vjp", "an outer torch.func transform is active"
    return "fused", "no outer transform is active, and fused kernels are kept"
