"""Trainings of models that are spread over processes, watched by all of them together."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.errors import ModelInputError
from tests.distributed.models import MODELS, Case, part
from tests.distributed.sharded import CASES, gathered, held, spread

STEPS = 8


def case(name: str) -> Case:
    """Return a model, two rounds of its batches, and a loss."""
    model, batches, loss_fn = CASES[name.partition("-")[0]](name.partition("-")[2] or "healthy")
    return model, [*batches, *batches][:STEPS], loss_fn


def trained(model: nn.Module, batches: list[Any], loss_fn: Any, **options: Any) -> dict[str, Any]:
    """Train a model and return what looks beside it show, and what they have changed.

    A look is taken before the gradients, between the passes, and after the update, in turns.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = gf.Monitor(model, loss_fn, optimizer, every=4, **options) if options else None
    changed: list[str] = []
    model(batches[0][0])  # `fully_shard` prepares itself in the first pass

    def look(step: int, at: int, x: Any, y: Any) -> None:
        if monitor is not None and step % 3 == at:
            before = held(model, optimizer)
            monitor((x, y), loss=1e9 * dist.get_rank() if dist.is_initialized() else None)
            after = held(model, optimizer)
            changed.extend(key for key, was in before.items() if after[key] != was)

    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        look(step, 0, x, y)
        loss = loss_fn(model(x), y)
        look(step, 1, x, y)
        loss.backward()
        optimizer.step()
        look(step, 2, x, y)
    names = dict(model.named_parameters())
    found: dict[str, Any] = {"weights": {n: v[2] for n, v in held(model, None).items() if n in names}}
    if monitor is not None:
        assert monitor.report is not None
        issues = [(i.layer, i.issue_type.value, i.severity.value) for i in monitor.report.issues]
        found |= {"record": monitor.report.record, "history": monitor.history, "issues": issues}
        found |= {"lines": monitor.report.lines, "changed": changed}
    return found


def watched(name: str, how: str, rank: int, size: int) -> dict[str, Any]:
    """Return what looks at a training show, and whether it went on as one that nobody watched."""
    found = []
    for options in ({"processes": "auto"}, {}):
        model, batches, loss_fn = case(name)
        model, mine, number = spread(model, how, rank, size)
        parts = [(x.chunk(number)[mine], y.chunk(number)[mine]) for x, y in batches]
        found.append(trained(model, parts, loss_fn, **options))
    return found[0] | {"same": found[0]["weights"] == found[1]["weights"]}


CASES_ON_TWO = {
    "sharded mlp-sick": True,
    "sharded gpt": False,
    "tensor heads-sick": True,
    "tensor mlp": False,
}


def _scenario(name: str) -> Any:
    how, _, model = name.partition(" ")
    return lambda rank, size: watched(model, how, rank, size)


globals().update({name: _scenario(name) for name in CASES_ON_TWO})


def refused(rank: int, size: int) -> dict[str, str]:
    """Return what is said to looks that do not take a sharded model."""
    model, batches, loss_fn = MODELS["mlp"]("healthy")
    model, said = gathered(model, init_device_mesh("cpu", (size,))), {}
    for name, look in {
        "inside": lambda: gf.Monitor(model, processes="auto").step(),
        "alone": lambda: gf.Monitor(model, loss_fn)(batches[0]),
    }.items():
        try:
            look()
        except ModelInputError as error:
            said[name] = str(error)
    return said


def jumped(rank: int, size: int) -> list[str]:
    """Return what is told of a loss that one sample of the last process has made jump."""
    model, batches, _ = MODELS["mlp"]("healthy")
    model, loss_fn = DistributedDataParallel(model), nn.MSELoss()
    monitor = gf.Monitor(model, loss_fn, every=1, processes="auto")
    mine = [(x, torch.zeros(len(x), 3).double()) for x, _ in part([*batches, *batches], rank, size)]
    if rank == size - 1:
        mine[-1][1][-2] = 1e3
    for batch in mine:
        monitor(batch)
    return [note for note in monitor.history.notes if "as is usual" in note]


def written(rank: int, size: int, folder: str = "") -> Any:
    """Return what the file of a history holds that all were given the name of, and the history."""
    found: list[Any] = [str(Path(tempfile.mkdtemp(), "history")) if rank == 0 else None]
    dist.broadcast_object_list(found)
    path = Path(found[0])
    model, batches, loss_fn = MODELS["mlp"]("healthy")
    model = gathered(model, init_device_mesh("cpu", (size,)))
    monitor = gf.Monitor(model, loss_fn, every=1, processes="auto", path=path)
    for batch in part(batches, rank, size):
        monitor(batch)
    dist.barrier()
    again = gf.Monitor(model, loss_fn, every=1, processes="auto", path=path)
    text = path.read_text().count("gradflow")
    dist.barrier()
    path.unlink(missing_ok=True)
    return monitor.history.steps.tolist(), again.history.steps.tolist(), text


OTHERS = ("refused", "jumped", "written")
