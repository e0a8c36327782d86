"""What runs on every process of a group: functions of (rank, size), whose results the tests compare."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.errors import ModelInputError, ProcessError
from gradflow.functional.processes import line
from tests.distributed import findings
from tests.distributed.models import MODELS, part
from tests.functional.snapshots import snapshot


def diagnosed(model: nn.Module, batches: list[Any], loss_fn: Any, *, moves: bool, **options: Any) -> Any:
    """Return the record and the verdicts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if moves else None
    report = gf.diagnose(model, batches, loss_fn, steps=len(batches), optimizer=optimizer, seed=0, **options)
    return report.record, [
        (i.layer.replace("module.", "").replace("module:", ""), i.issue_type.value, i.severity.value)
        for i in report.issues
    ]


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


def plain_norm(rank: int, size: int) -> dict[str, Any]:
    return compared("resnet", "plain", rank, size, moves=True)


def clipped(rank: int, size: int) -> dict[str, Any]:
    return compared("mlp", "healthy", rank, size, moves=True, clip=0.3, accumulate=2)


def by_step_fn(rank: int, size: int) -> dict[str, Any]:
    return compared("mlp", "healthy", rank, size, moves=True, step_fn=one_step)


def one_step(model: nn.Module, batch: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()


def runs_out(rank: int, size: int) -> Any:
    """The last process has fewer batches, and nobody knows beforehand."""
    model, batches, loss_fn = MODELS["mlp"]("healthy")
    mine = part(batches, rank, size)[: 3 if rank == size - 1 else 5]
    report = gf.diagnose(DistributedDataParallel(model), iter(mine), loss_fn, steps=5)
    return report.record


def raises(rank: int, size: int) -> Any:
    """The last process raises in its third step; the same processes go on afterwards."""
    model, batches, loss_fn = MODELS["mlp"]("healthy")
    model, calls, began = DistributedDataParallel(model), [], time.monotonic()

    def loss_of(output: Any, target: Any) -> Any:
        calls.append(0)
        if rank == size - 1 and len(calls) == 3:
            raise ValueError("the data of this process is torn")
        return loss_fn(output, target)

    before, said = snapshot(model), ("", "")
    try:
        gf.diagnose(model, part(batches, rank, size), loss_of, steps=5)
    except Exception as error:
        said = type(error).__name__, str(error)
    seconds, pure = time.monotonic() - began, before == snapshot(model)
    again = gf.analyze(model, part(batches, rank, size), loss_fn, steps=2)
    return said, seconds, pure, again.losses


class Joined(torch.autograd.Function):
    """A product with a scale of each unit, whose gradient is joined as by a batch norm's statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (x, scale) = gradients, ctx.saved_tensors
        dist.all_reduce(mean := gradient.mean(0))
        return gradient * scale + mean, (gradient * x).sum(0)


class SyncBatchNorm(Joined):
    """By the name of PyTorch's, which there is on a GPU alone."""


def zeros_of_one(rank: int, size: int) -> Any:
    """Why one unit gets no gradient, where the gradient of one process has zeros of another kind beside."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
            self.scale, self.shift = nn.Parameter(torch.ones(4)), torch.tensor([9.0, 9.0, 9.0, -50.0])

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = SyncBatchNorm.apply(self.first(x), self.scale)
            return self.last(torch.relu(h + self.shift) * mask)

    torch.manual_seed(0)
    model, mask = DistributedDataParallel(Net()), torch.ones(8, 4)
    mask[:, 1] = float(rank > 0)
    record = gf.analyze(model, [((torch.randn(8, 3), mask), torch.randn(8, 1))], nn.MSELoss(), steps=1)
    assert record.reach is not None
    return [(part.parameter, part.reason, part.slices) for part in record.reach.unreached]


def absent(rank: int, size: int) -> Any:
    """Only the first process calls it."""
    if rank:
        return None
    model, batches, loss_fn = MODELS["mlp"]("healthy")
    line.PATIENCE, patience = 1.0, line.PATIENCE
    try:
        gf.analyze(model, batches, loss_fn, processes=dist.group.WORLD)
    except ProcessError as error:
        return str(error)
    finally:
        line.PATIENCE = patience


class Token:
    """Lives as long as the graph of a pass."""


class Marked(torch.autograd.Function):
    """The identity, whose node holds a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: Any) -> Tensor:  # type: ignore[override]
        ctx.token = Token()
        alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def lets_go(rank: int, size: int) -> list[int]:
    """How many graphs of earlier passes are alive when one begins."""
    alive, found = weakref.WeakSet[Token](), []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            found.append(len(alive))
            return self.last(Marked.apply(self.first(x), alive))  # type: ignore[arg-type]

    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(3)]
    gf.analyze(DistributedDataParallel(Net()), batches, nn.MSELoss(), steps=3, detail="full")
    return found


def told_on_one(rank: int, size: int) -> Any:
    """What each process gets where the last alone is told, what all get without that, and who judged."""
    model, batches, loss_fn = MODELS["mlp"]("sick")
    model, mine = DistributedDataParallel(model), part(batches, rank, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    judged: list[int] = []

    def seen(record: Any) -> Any:
        judged.append(0)
        return gf.flow()(record)

    given: dict[str, Any] = {"optimizer": optimizer, "steps": len(mine), "seed": 0}
    everywhere = gf.diagnose(model, mine, loss_fn, pipeline=gf.flow(), **given)
    before = snapshot(model)
    report = gf.diagnose(
        model, mine, loss_fn, pipeline=[gf.flow(), seen], processes=gf.OnRank(size - 1), **given
    )
    pure = before == snapshot(model)
    again = gf.analyze(model, mine, loss_fn, processes=gf.OnRank(0, dist.group.WORLD))
    return everywhere.record, report and report.record, len(judged), pure, again is None


def told_on_none(rank: int, size: int) -> list[str]:
    """What is said where the process that is to be told takes no part."""
    model, batches, loss_fn = MODELS["mlp"]("healthy")
    spread, said = DistributedDataParallel(model), []
    for given, asked in ((model, gf.OnRank(0)), (spread, gf.OnRank(size))):
        try:
            gf.analyze(given, part(batches, rank, size), loss_fn, processes=asked)
        except ModelInputError as error:
            said.append(str(error))
    return said


OTHERS = (
    "plain_norm",
    "clipped",
    "by_step_fn",
    "runs_out",
    "zeros_of_one",
    "raises",
    "absent",
    "lets_go",
    "told_on_one",
    "told_on_none",
    "watched",
    "watched_inside",
    "trains_on",
)
globals().update({name: _scenario(*case) for name, case in COMPARED.items()})


def _killed(rank: int, size: int, name: str, *, first: bool = False) -> Any:
    """The last process, or the first, is killed in its third step."""
    model, batches, loss_fn = MODELS[name]("healthy")
    calls: list[float] = []

    def loss_of(output: Any, target: Any) -> Any:
        calls.append(time.monotonic())
        if rank == (0 if first else size - 1) and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(output, target)

    try:
        gf.diagnose(DistributedDataParallel(model), part(batches, rank, size), loss_of, steps=4)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - calls[-1]
    return None


def killed(rank: int, size: int) -> Any:
    return _killed(rank, size, "mlp")


def killed_with_store(rank: int, size: int) -> Any:
    """The first holds the store through which they find one another."""
    return _killed(rank, size, "mlp", first=True)


def killed_in_exchange(rank: int, size: int) -> Any:
    """The others wait for it in an exchange of the model's own, its batch norm."""
    return _killed(rank, size, "resnet")


globals().update({name: getattr(findings, name) for name in findings.FINDINGS})


def trains_on(rank: int, size: int) -> Any:
    """The reducer and its communication hook after an analysis, against one that was never analysed."""
    found, calls = [], []

    def hooked(state: Any, bucket: Any) -> Any:
        calls.append(0)
        return default_hooks.allreduce_hook(state, bucket)

    for analysed in (False, True):
        model, batches, loss_fn = MODELS["mlp"]("healthy")
        model = DistributedDataParallel(model, find_unused_parameters=True)
        model.register_comm_hook(None, lambda state, bucket: hooked(state, bucket))
        mine, notes = part(batches, rank, size), ()
        for x, y in mine[:3]:
            if analysed:
                before = len(calls)
                notes = gf.analyze(model, mine[:2], loss_fn).provenance.notes
                assert len(calls) == before
            model.zero_grad()
            loss_fn(model(x), y).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return all(map(torch.equal, *found)), len(calls), notes


def watched(rank: int, size: int, *, inside: bool = False) -> Any:
    """A training watched from beside or from inside by all processes together."""
    model, batches, loss_fn = MODELS["mlp"]("sick")
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gf.Monitor(model, loss_fn, optimizer, every=4, processes="auto")
    report = None
    for x, y in part(batches, rank, size):
        with monitor.step() if inside else contextlib.nullcontext():
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            report = None if inside else monitor((x, y), loss=1e9 * rank)  # a jump makes no look
            optimizer.step()
        report = monitor.report
    assert report is not None
    return report.record, monitor.history, model.module[0].weight.detach().clone()


def watched_inside(rank: int, size: int) -> Any:
    return watched(rank, size, inside=True)
