"""Looks from inside a model that exchanges gradients with other processes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import FileStore, HashStore

from gradflow.functional.inside.look import InsideLook
from tests.functional.inside.loops import MODELS, batch


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def steps(model: nn.Module, number: int, *, watched: bool, micro: int = 1) -> list[Any]:
    """Train a few steps; return the records of the looks."""
    optimizer, records = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(number):
        look = InsideLook.of(model)
        with look.listening() if watched else contextlib.nullcontext() as passes:
            optimizer.zero_grad()
            for part in range(micro):
                x, y = batch()
                last = part == micro - 1
                with contextlib.nullcontext() if last else model.no_sync():  # type: ignore[operator]
                    (F.cross_entropy(model(x), y) / micro).backward()
            gradient = next(p.grad.clone() for p in model.parameters() if p.grad is not None)
            optimizer.step()
        if passes is not None:
            assert passes.failed == ""
            records.append((look.record(), gradient))
    return records


def weights(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.parametrize("kind", ["residual", "words", "pictures"])
def test_the_reducer_is_not_disturbed(kind: str, options: dict[str, Any]) -> None:
    made = MODELS[kind]()
    models = [nn.parallel.DistributedDataParallel(copy.deepcopy(made), **options) for _ in range(2)]
    records = []
    for model, watched in zip(models, (False, True), strict=True):
        torch.manual_seed(3)
        records = steps(model, 5, watched=watched)
    assert all(map(torch.equal, weights(models[0]), weights(models[1])))
    record, gradient = records[-1]
    assert record.parameters[0].name.startswith("module.")
    assert record.parameters[0].grad_norm[0] == pytest.approx(float(gradient.double().norm()), rel=1e-6)
    assert any("the mean over the processes" in note for note in record.provenance.notes)


def _process(rank: int, folder: str) -> None:
    """Train the same model in one of two processes, watched and not, and write what came out."""
    torch.set_num_threads(1)
    store = FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    made, found = MODELS["pictures"](), {}
    for watched in (False, True):
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(made))
        torch.manual_seed(rank)
        found[watched] = weights(model), steps(model, 4, watched=watched, micro=2), weights(model)
    torch.save({k: (v[0], v[2]) for k, v in found.items()}, f"{folder}/{rank}.pt")
    for record, gradient in found[True][1]:
        told = record.parameters[0].grad_norm[-1]
        assert told == pytest.approx(float(gradient.double().norm()), rel=1e-6)
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_they_do_unwatched(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for found in (one, other):
        assert all(map(torch.equal, found[False][1], found[True][1]))
        assert not all(map(torch.equal, found[True][0], found[True][1]))
    assert all(map(torch.equal, one[True][1][:2], other[True][1][:2]))  # weight and bias of the first layer
