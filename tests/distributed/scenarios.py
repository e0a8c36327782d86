"""What runs on every process of a group: functions of (rank, size), whose results the tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from tests.distributed.models import MODELS, part
from tests.functional.snapshots import snapshot


def diagnosed(model: nn.Module, batches: list[Any], loss_fn: Any, *, moves: bool, **options: Any) -> Any:
    """Return the record and the verdicts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if moves else None
    report = gf.diagnose(
        model, batches, loss_fn, steps=len(batches), optimizer=optimizer, seed=0, **options
    )
    return report.record, [(i.layer.replace("module.", "").replace("module:", ""), i.issue_type.value, i.severity.value) for i in report.issues]


def compared(name: str, kind: str, rank: int, size: int, *, moves: bool, **options: Any) -> dict[str, Any]:
    """Return what a model under DistributedDataParallel shows, and whether all of it is as it was before."""
    model, batches, loss_fn = MODELS[name](kind)
    model = DistributedDataParallel(model)
    before = snapshot(model)
    record, verdicts = diagnosed(model, part(batches, rank, size), loss_fn, moves=moves, **options)
    return {"record": record, "verdicts": verdicts, "pure": before == snapshot(model)}


def _scenario(name: str, kind: str, moves: bool, options: dict[str, Any]) -> Any:
    def scenario(rank: int, size: int) -> dict[str, Any]:
        return compared(name, kind, rank, size, moves=moves, **options)

    return scenario


# name of the scenario: (model, kind, whether an optimizer moves the parameters, options)
COMPARED: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "mlp": ("mlp", "healthy", False, {"detail": "full"}),
    "mlp_moves": ("mlp", "healthy", True, {}),
    "mlp_sick": ("mlp", "sick", True, {}),
    "resnet": ("resnet", "healthy", True, {"detail": "full"}),
    "resnet_sick": ("resnet", "sick", False, {}),
    "gpt": ("gpt", "healthy", False, {"detail": "full"}),
    "gpt_moves": ("gpt", "healthy", True, {}),
    "gpt_sick": ("gpt", "sick", True, {}),
    "mixture": ("mixture", "healthy", True, {}),
    "mixture_sick": ("mixture", "sick", False, {}),
}
globals().update({name: _scenario(*case) for name, case in COMPARED.items()})
