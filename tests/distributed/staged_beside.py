"""Stages of a pipeline that several processes have, each with its part of the batch."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.errors import ModelInputError
from gradflow.functional.updates.curvature import curvature
from tests.distributed.models import part
from tests.distributed.pieces import pieces
from tests.distributed.sharded import gathered, held, split
from tests.distributed.staged import Picky, cut, whole


def raises_beside(rank: int, size: int) -> Any:
    """One of two processes that have the last stage raises; the same four go on afterwards."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
    stages, batches = pieces("plain")
    index, own_part = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    mine, began, said = part(batches, own_part, size // 2), time.monotonic(), ""

    def found(module: nn.Module) -> Any:
        module = DistributedDataParallel(module, process_group=mesh["dp"].get_group())
        stage = PipelineStage(module, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
        return gf.analyze(stage, mine, nn.CrossEntropyLoss(), steps=4)

    try:
        found(nn.Sequential(Picky("raises" if rank == size - 1 else "never"), stages[index]))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.monotonic() - began, found(stages[index]).losses


def spread_twice(rank: int, size: int) -> dict[str, Any]:
    """Two stages, each sharded over two processes along one dimension and split over two along another."""
    mesh = init_device_mesh("cpu", (2, size // 4, 2), mesh_dim_names=("pp", "dp", "tp"))
    model, batches, loss_fn = whole("heads-sick")
    index = mesh["pp"].get_local_rank()
    module = gathered(split(cut(model, index, 2), mesh["tp"]), mesh["dp"])
    stage = PipelineStage(module, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    mine = part(batches, mesh["dp"].get_local_rank(), size // 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    before = held(module, optimizer)
    report = gf.diagnose(stage, mine, loss_fn, steps=3, optimizer=optimizer, seed=0)
    after = held(module, optimizer)
    said = ""
    try:  # as a model of its own, beside which nobody knows what the other four processes have
        gf.analyze(module, mine, loss_fn)
    except ModelInputError as error:
        said = str(error)
    return {
        "said": said,
        "record": report.record,
        "verdicts": [(i.layer, i.issue_type.value, i.severity.value) for i in report.issues],
        "changed": [key for key in before if before[key] != after.get(key)],
    }


def told_on_one(rank: int, size: int) -> Any:
    """What each of four processes gets where one alone is told, which speaks for no stage; and without."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
    stages, batches = pieces("plain")
    index, own_part = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = DistributedDataParallel(stages[index], process_group=mesh["dp"].get_group())
    stage = PipelineStage(module, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    adam = torch.optim.Adam(module.parameters(), 1e-2)
    return [
        gf.analyze(
            stage, part(batches, own_part, size // 2), nn.CrossEntropyLoss(), steps=4, optimizer=adam,
            seed=0, processes=asked, deepen=lambda record: True, measurements=[curvature()],
        )
        for asked in ("auto", gf.OnRank(1))
    ]  # fmt: skip
