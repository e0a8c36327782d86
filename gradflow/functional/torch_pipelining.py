"""All use of private names of `torch.distributed.pipelining`; see `torch_private.py`.

| name | for | without it |
| --- | --- | --- |
| `PipelineScheduleSingle._stage` | the stage of a schedule | an error: pass the stage |
| `PipelineScheduleMulti._stages` | its stages, which are refused | another error |
| `_PipelineSchedule._loss_fn` | the loss, where none is passed | the model's own loss |
| `_PipelineStage.pipe_info` | whether stages hand on to the next alone | what the next stage raises |
| `_PipelineSchedule._n_microbatches` | a note, and losses that are added up | no note, a loss too small |
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch.distributed as dist
from torch import nn

__all__ = ["Stage", "classes_of", "kept", "stages_of"]

_PIPELINING = "torch.distributed.pipelining"


@attrs.frozen(eq=False)
class Stage:
    """A stage of a pipeline, as a process has it.

    Args:
        index: its number, from 0.
        number: of the stages.
        module: what it runs.
        group: the processes of the stages.
        ranks: the rank of the process that has each stage.
        microbatches: into how many parts its schedule splits a batch; 1 if no schedule is known.
        averages: whether the schedule takes the mean of the losses of these parts, and not their sum.
        loss_fn: that of the schedule.
        is_chain: whether each stage takes what the one before returns, all of it and in that order.
    """

    index: int
    number: int
    module: nn.Module
    group: Any
    ranks: tuple[int, ...]
    microbatches: int = 1
    averages: bool = True
    loss_fn: Callable[..., Any] | None = None
    is_chain: bool = True


def classes_of(thing: object) -> list[str]:
    """Return the names of the classes of `torch.distributed.pipelining` that an object is of."""
    return [c.__name__ for c in type(thing).__mro__ if str(c.__module__).startswith(_PIPELINING)]


def stages_of(thing: Any) -> list[Stage]:
    """Return the stages that an object stands for: itself, or those that a schedule runs on this process."""
    if isinstance(thing, nn.Module) or not classes_of(thing):
        return []
    if isinstance(getattr(thing, "submod", None), nn.Module):
        return [_stage(thing)]
    one = getattr(thing, "_stage", None)
    found = [_stage(stage) for stage in (getattr(thing, "_stages", None) or ([] if one is None else [one]))]
    more: dict[str, Any] = {
        "microbatches": int(getattr(thing, "_n_microbatches", 1)),
        "averages": bool(getattr(thing, "scale_grads", True)),
        "loss_fn": getattr(thing, "_loss_fn", None),
    }
    return [attrs.evolve(stage, **more) for stage in found]


@contextlib.contextmanager
def kept(*things: Any) -> Iterator[None]:
    """Put back what stages and schedules keep of the batches that they run in the context.

    Args:
        things: stages, schedules, and what is neither.
    """
    found = {id(thing): thing for thing in things if not isinstance(thing, nn.Module) and classes_of(thing)}
    for thing in list(found.values()):
        inner = (getattr(thing, "_stage", None), *(getattr(thing, "_stages", None) or ()))
        found |= {id(stage): stage for stage in inner if stage is not None}
    saved = [(thing, dict(vars(thing))) for thing in found.values()]
    filled = [
        (value, copy.copy(value))
        for _, held in saved for value in held.values() if isinstance(value, (dict, list))
    ]  # fmt: skip
    try:
        yield
    finally:
        for thing, held in saved:
            vars(thing).clear()
            vars(thing).update(held)
        for value, before in filled:
            value.clear()
            value.update(before) if isinstance(value, dict) else value.extend(before)


def _stage(stage: Any) -> Stage:
    group = dist.group.WORLD if stage.group is None else stage.group
    places = stage.stage_index_to_group_rank
    ranks = dist.get_process_group_ranks(group)
    return Stage(
        index=stage.stage_index,
        number=stage.num_stages,
        module=stage.submod,
        group=group,
        ranks=tuple(ranks[places[i]] for i in range(stage.num_stages)),
        is_chain=_is_chain(getattr(getattr(stage, "pipe_info", None), "graph", None)),
    )


def _is_chain(graph: Any) -> bool:
    """Whether the stages of a traced model, as calls in a graph, hand on to the next alone."""
    calls = [] if graph is None else [node for node in graph.nodes if node.op == "call_module"]
    for before, node in itertools.pairwise(calls):
        parts = sum(1 for user in before.users if user.target is operator.getitem)
        taken = [
            (arg.args[0], arg.args[1]) if getattr(arg, "target", None) is operator.getitem else (arg, None)
            for arg in node.args
        ]
        whole = [(before, i) for i in range(parts)] if parts else [(before, None)]
        if taken != whole or node.kwargs:
            return False
    return True
