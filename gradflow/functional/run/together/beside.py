"""What the stages of a pipeline tell one another beside an analysis of them: what became of their weights."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from gradflow.functional.model.layers import held_by
from gradflow.functional.processes.group import Processes
from gradflow.functional.processes.shards import processes_with
from gradflow.functional.processes.stages import Stages, named_alike

_T = TypeVar("_T")


def module_of(model: Any) -> nn.Module:
    """Return the module that a stage of a pipeline, or a schedule of one, runs; any other model as it is."""
    stage = Stages.of(model).stage
    return model if stage is None else stage.module


def told_by_stages(model: Any, asked: Any, told: _T) -> list[tuple[str, _T]]:
    """Return what each stage of a pipeline has to tell, in their order, and what its names begin with.

    Args:
        model: the stage of this process; of any other model, it alone tells.
        asked: which processes look together; as for `gradflow.analyze`.
        told: by this stage; of several processes that have it, the first speaks.
    """
    stages = Stages.of(model)
    if stages.stage is None:
        return [("", told)]
    among = connected(stages, asked)
    speaks = not among.axes or dist.get_rank(among.group) == 0
    with stages.line.opened():
        mine = stages.index, held_by(stages.stage.module), (told,) if speaks else ()
        every = stages.line.gathered(mine)
    held = {index: of for index, of, _ in every}
    alike = named_alike(held.values())
    return [
        (f"stage{index}." if alike else "", found)
        for index, _, said in sorted(every, key=lambda entry: entry[0])
        for found in said
    ]


def is_first(asked: Any, model: Any) -> bool:
    """Whether this process is the first of those that look at a model together."""
    if isinstance(asked, str) and asked == "alone":
        return True
    stages = Stages.of(model)
    processes = processes_with(asked, model) if stages.alone else Processes()
    if not stages.alone:
        connected(stages, asked)
        processes = stages.line.processes
    return not processes.axes or dist.get_rank(processes.group) == 0


def connected(stages: Stages, asked: Any) -> Processes:
    """Make the line to the processes of all stages, and return those that have the same stage."""
    stage = stages.stage
    assert stage is not None
    among = processes_with(asked, stage.module, stages=stage.number)
    stages.connect(among)
    return among
