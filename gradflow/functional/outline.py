"""The outline of a model on the meta device: its graph and what would be measured, from shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional.model.batches import invoke, make_objective, prepared
from gradflow.functional.model.purity import preserved
from gradflow.functional.model.supported import check_module, check_supported
from gradflow.functional.model.threads import exclusive, uncompiled
from gradflow.functional.model.trees import named_tensors
from gradflow.functional.reach.findings import ReachFindings
from gradflow.functional.run.history import History
from gradflow.functional.run.loop import structural_step
from gradflow.functional.run.program import Before, Given, Program, WorkingState
from gradflow.functional.run.record import assembled
from gradflow.functional.run.run import Plan, Run
from gradflow.functional.run.step import Request
from gradflow.functional.tap.tapped import TappedModel
from gradflow.functional.tap.taps import tapped
from gradflow.functional.torch_private import outside_transforms
from gradflow.records import FlowRecord

_NOTE = (
    "The model is on the meta device, without values: this is its graph, and what would be measured of it. "
    "No step was measured, so nothing is said of its health."
)


def outline(model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None = None) -> FlowRecord:
    """Return the graph of a model on the meta device, and what would be measured of it; no value is needed.

    So a model too large for one process can be looked at before it has any weights: which layers there are,
    in which order they run, of which shapes, and which operations join them. One forward and one reverse
    pass run, on shapes alone. Pure, like `analyze`.

    Args:
        model: with all parameters and buffers on the meta device, as one that is built under
            `torch.device("meta")` has them.
        batch: one batch, as `analyze` takes them, on any device: its shapes count.
        loss_fn: as for `analyze`.

    Returns:
        A record of no steps: its graph, layers, parameters and activations, each without numbers over steps.

    Raises:
        ModelInputError: if the model has values, or asks for some on its way (`.item()`, a mask of indices).

    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(4, 100_000), nn.ReLU(), nn.Linear(100_000, 2))
    >>> record = outline(model, torch.randn(8, 4), lambda y: y.square().mean())
    >>> record.steps, [(layer.name, layer.shape) for layer in record]
    (0, [('0', (8, 100000)), ('1', (8, 100000)), ('2', (8, 2))])
    >>> list(record.graph.nx)
    ['input', '0', '1', '2', 'pow', 'mean', 'loss']
    """
    check_module(model)
    check_supported(model)
    _check_meta(model)
    objective, meta = make_objective(loss_fn), torch.device("meta")
    batch = prepared(batch, meta)
    inputs = dict(named_tensors(objective.inputs(batch), "input"))
    given = Given(
        model, loss_fn if isinstance(loss_fn, nn.Module) else None,
        lambda batch, step: invoke(model, objective.inputs(batch)), objective.loss, lambda batch: inputs,
        (loss_fn,), own_loss=loss_fn is None,
    )  # fmt: skip
    with (
        exclusive(), preserved(*given.modules, also=given.functions), outside_transforms(), uncompiled(),
        torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack,
    ):  # fmt: skip
        taps, state = TappedModel.of(model), WorkingState.of(given, valued=False)
        stack.callback(taps.forget)
        program, plan = Program(given, state, taps), Plan(steps=1, closely=False)
        reach = ReachFindings(state.trainable, state.originals)
        run = Run(program, plan, "fused", "no values", (), History(state.parameters, taps), reach)
        request = Request(
            batch=batch, step=0, before=Before.of(program, first=True), first=True, structural=True, look=True
        )
        with tapped(taps):
            return _told(run, request)


def _told(run: Run, request: Request) -> FlowRecord:
    """Run the step, and return what it shows."""
    try:
        outcome, dataflow = structural_step(run.program, request)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower() and "item" not in str(error):
            raise
        raise ModelInputError(
            "the model or the loss asks for a value where there are only shapes: "
            f"{str(error).splitlines()[0][:200]} An outline follows what does not depend on values. Leave "
            "that part out, or pass a small model of the same kind with values to `analyze`."
        ) from error
    run.graph.learn(outcome, dataflow, run.program.state.leaves)
    run.history.meet(outcome.recorder)
    run.graph.conclude({call.name for call in outcome.recorder.calls if call.sites}, ())
    record = assembled(run, None)
    provenance = attrs.evolve(record.provenance, notes=(_NOTE,), mode="keep")
    if outcome.structure is not None:
        outcome.structure.release()
    return attrs.evolve(record, provenance=provenance)


def _check_meta(model: nn.Module) -> None:
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if not tensor.is_meta:
            raise ModelInputError(
                f"{name!r} has values, on {tensor.device}. An outline is of a model without any: build it "
                "under `with torch.device('meta'):`, or pass `copy.deepcopy(model).to('meta')`. For a model "
                "with values, `analyze` measures too."
            )
