"""Trainings of which one process is unlike the others, or that lose something between them, and twins."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.records import OwnIssueType
from tests.distributed.models import Mixture, gpt, mixture, mlp, part, resnet

Found = list[tuple[str, str, str, str, dict[str, Any]]]


def told(model: nn.Module, batches: list[Any], loss_fn: Any, **options: Any) -> Found:
    """Return the issues of types that are about processes."""
    wrapped = DistributedDataParallel(model, **options)
    return issues(wrapped, batches, loss_fn)


def issues(model: nn.Module, batches: list[Any], loss_fn: Any) -> Found:
    report = gf.diagnose(model, batches, loss_fn, steps=len(batches))
    return [
        (i.issue_type.value, i.severity.value, i.layer, i.description, dict(i.metrics))
        for i in report.issues
        if isinstance(i.issue_type, OwnIssueType)
    ]


def unequal_parameter(rank: int, size: int) -> Found:
    model, batches, loss_fn = mlp("healthy")
    wrapped = DistributedDataParallel(model)
    if rank == size - 1:
        with torch.no_grad():
            model[2].weight[0, 0] += 1e-9  # type: ignore[index,operator]
    return issues(wrapped, part(batches, rank, size), loss_fn)


def unequal_buffer(rank: int, size: int, *, broadcast: bool = False) -> Found:
    model, batches, loss_fn = mlp("healthy")
    model.register_buffer("scale", torch.ones(3))
    wrapped = DistributedDataParallel(model, broadcast_buffers=broadcast)
    model.scale.fill_(1.0 + rank)  # type: ignore[union-attr,operator]
    return issues(wrapped, part(batches, rank, size), loss_fn)


def broadcast_buffer(rank: int, size: int) -> Found:
    return unequal_buffer(rank, size, broadcast=True)


def torn_data(rank: int, size: int) -> Found:
    model, batches, loss_fn = mlp("healthy")
    mine = part(batches, rank, size)
    if rank == 1:
        mine[2][0][0, 0] = torch.nan
    mine = [mine[0], mine[2], mine[1]]  # the second and the last step are looked at
    return told(model, mine, loss_fn)


def torn_loss(rank: int, size: int) -> Found:
    model, batches, loss_fn = mlp("healthy")

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return loss_fn(output, target) * (torch.inf if rank == 1 else 1.0)

    return told(model, part(batches, rank, size)[:2], loss_of)


def other_scale(rank: int, size: int) -> Found:
    model, batches, loss_fn = mlp("healthy")
    mine = [(x * (255.0 if rank == 1 else 1.0), y) for x, y in part(batches, rank, size)]
    return told(model, mine, loss_fn)


class Branches(nn.Module):
    """Runs one of two branches, by a choice of its own."""

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.first, self.branches = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[self.chosen](F.relu(self.first(x)))


def partly_used(rank: int, size: int, *, finds: bool = False) -> Found:
    _, batches, loss_fn = mlp("healthy")
    torch.manual_seed(0)
    model = Branches(int(rank == 1)).double()
    return told(model, part(batches, rank, size)[:3], loss_fn, find_unused_parameters=finds)


def found_unused(rank: int, size: int) -> Found:
    return partly_used(rank, size, finds=True)


def never_used(rank: int, size: int) -> Found:
    _, batches, loss_fn = mlp("healthy")
    torch.manual_seed(0)
    return told(Branches(0).double(), part(batches, rank, size)[:3], loss_fn)


def same_data(rank: int, size: int) -> Found:
    model, batches, loss_fn = mlp("healthy")
    return told(model, part(batches, 0, size), loss_fn)


def plain_norms(rank: int, size: int) -> Found:
    model, batches, loss_fn = resnet("plain")
    return told(model, part(batches, rank, size), loss_fn)


def synchronised_norms(rank: int, size: int) -> Found:
    model, batches, loss_fn = resnet("healthy")
    return told(model, part(batches, rank, size), loss_fn)


def unfed_expert(rank: int, size: int) -> Found:
    model, batches, loss_fn = mixture("healthy")
    for module in model.modules():
        if isinstance(module, Mixture):
            with torch.no_grad():
                module.router.bias[2] = -100.0
    return told(model, part(batches, rank, size), loss_fn)


def fed_experts(rank: int, size: int) -> Found:
    model, batches, loss_fn = mixture("healthy")
    return told(model, part(batches, rank, size), loss_fn)


def words(rank: int, size: int) -> Found:
    model, batches, loss_fn = gpt("healthy")
    return told(model, part(batches, rank, size), loss_fn)


FINDINGS = (
    "unequal_parameter", "unequal_buffer", "broadcast_buffer", "torn_data", "torn_loss", "other_scale",
    "partly_used", "found_unused", "never_used", "same_data", "plain_norms", "synchronised_norms",
    "unfed_expert", "fed_experts", "words",
)  # fmt: skip
FEW = ("unequal_parameter", "other_scale", "partly_used", "same_data")  # of which more than two matter
