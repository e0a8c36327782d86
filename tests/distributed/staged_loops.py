"""Pipelines whose loops scale their losses, or make a step of their own, as an analysis repeats them."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.errors import ModelInputError
from tests.distributed.models import part
from tests.distributed.pieces import pieces
from tests.distributed.sharded import held
from tests.distributed.staged import Picky, cut, staged, whole
from tests.distributed.staged_watched import spread


def loop_of(kind: str, module: nn.Module, loss_fn: Any, schedule: Any = None) -> dict[str, Any]:
    """Return the options of a loop, of a stage or of the whole model."""
    adam = torch.optim.AdamW(module.parameters(), lr=1e-2)
    name = kind.partition(" ")[0]
    if name == "function":
        return {"optimizer": adam, "step_fn": step_of(loss_fn, schedule)}
    options: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 2}
    if name == "overflowing":  # until what is scaled fits, and again when it has grown
        options = {"init_scale": 2.0**126, "backoff_factor": 2.0**-20, "growth_interval": 3}
        options["growth_factor"] = 2.0**20
    more = {"clip": 0.1} if "clipped" in kind else {"accumulate": 2} if "summed" in kind else {}
    return {"optimizer": adam, "scaler": torch.amp.GradScaler("cpu", **options), **more}


def step_of(loss_fn: Any, schedule: Any) -> Any:
    """Return a step: two norms as its loop has them, a rate that changes, gradients that are left."""

    def step(model: Any, batch: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        if schedule is None:
            loss_fn(model(batch[0]), batch[1]).backward()
        else:
            run = model if hasattr(model, "step") else schedule
            stage = schedule._stage
            given = {"target": batch[1]} if stage.is_last else {}
            run.step(*((batch[0],) if stage.is_first else ()), **given)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-0.05, 0.05)
            group["lr"] *= 0.9
        optimizer.step()

    return step


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def large(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), target) + 1e5


def small(kind: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Any]:
    """Return a model in single precision, in which a scale may overflow, batches and a loss."""
    model, batches, loss_fn = whole("mlp")
    if "half" in kind:  # a loss that is more than the format of what is handed on can hold
        first, relu, *others = model.float()  # type: ignore[misc]
        model = nn.Sequential(first, relu, Cast(torch.float16), Cast(torch.float32), *others)
        return model, [(x.float(), y) for x, y in batches] * 2, large
    if "overflowing" in kind:
        model = model.float()
        layers = [m for m in model if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
        batches = [(x.float(), y) for x, y in batches]
        with torch.no_grad():  # so that gradients overflow in one of the stages alone
            if "first" in kind:
                layers[0].weight.mul_(1e-4)
                batches = [(x * 1e4, y) for x, y in batches]
            else:
                layers[0].weight.mul_(1e4)
                layers[-1].weight.mul_(1e-4)
    return model, batches * 2, loss_fn


def shown(kind: str, rank: int, size: int) -> dict[str, Any]:
    """Return what a pipeline shows, and whether all of the loop is as it was."""
    if "whole" in kind:
        model, batches, loss_fn = whole(kind.split()[-1])
    else:
        model, batches, loss_fn = small(kind)
    module = cut(model, rank, size)
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    kinds = Schedule1F1B if "1F1B" in kind else ScheduleGPipe
    schedule = kinds(stage, 2, loss_fn=loss_fn)
    options = loop_of(kind, module, loss_fn, schedule)

    def state() -> Any:
        inner = [sorted(vars(thing)) for thing in (stage, schedule)]
        chunks = list(stage.output_chunks), list(stage.fwd_cache), dict(stage.args_recv_info)
        scaler = options["scaler"].state_dict() if "scaler" in options else None
        return {**held(module, options["optimizer"]), "scaler": scaler, "inner": inner, "chunks": chunks}

    before = state()
    given = (stage, batches, loss_fn) if "by stage" in kind else (schedule, batches)
    report = gf.diagnose(*given, steps=len(batches), seed=0, **options)
    after = state()
    x, y = batches[0]
    x, y = torch.cat([x, x]), torch.cat([y, y])  # a training of other batches
    losses: list[Tensor] = []
    schedule.step(
        *((x,) if rank == 0 else ()), **({"target": y, "losses": losses} if rank == size - 1 else {})
    )
    return {
        "record": report.record,
        "verdicts": [(i.layer, i.issue_type.value, i.severity.value) for i in report.issues],
        "changed": [key for key in before if before[key] != after[key]],
    }


KINDS = (
    "scaled", "scaled clipped", "scaled summed", "scaled half",
    "scaled whole mlp-sick", "scaled whole born-late",
    "overflowing first", "overflowing last", "overflowing clipped", "overflowing summed",
    "function", "function by stage", "function 1F1B whole gpt-sick", "function whole mlp-sick",
)  # fmt: skip


def _scenario(kind: str) -> Any:
    return lambda rank, size: shown(kind, rank, size)


globals().update({f"loop {kind}": _scenario(kind) for kind in KINDS})


def frozen(rank: int, size: int) -> Any:
    """A scaler over two stages, of which the first gets no gradient."""
    stages, batches = pieces("frozen")
    optimizer = torch.optim.SGD(stages[rank].parameters(), 0.1)
    return gf.analyze(
        staged(rank, size, stages[rank]), batches, nn.CrossEntropyLoss(), optimizer=optimizer, seed=0,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1),
    )  # fmt: skip


def unlike(rank: int, size: int) -> dict[str, str]:
    """What is said where stages were told different things."""
    stages, batches = pieces("plain")
    stage, said = staged(rank, size, stages[rank]), {}
    optimizer = torch.optim.SGD(stages[rank].parameters(), 0.1)
    scale = torch.amp.GradScaler("cpu", init_scale=2.0 ** (4 + rank))
    for name, options in {
        "clip": {"clip": 1.0 + rank, "optimizer": optimizer},
        "accumulate": {"accumulate": 1 + rank, "optimizer": optimizer},
        "scale": {"scaler": scale, "optimizer": optimizer},
        "function": {"step_fn": (lambda *_: None) if rank else None, "optimizer": optimizer},
        "idle": {"clip": None if rank else 1.0, "optimizer": None if rank else optimizer},
    }.items():
        try:
            gf.analyze(stage, batches, nn.CrossEntropyLoss(), **options)  # type: ignore[arg-type]
        except ModelInputError as error:
            said[name] = str(error)
    return said


def step_raises(rank: int, size: int) -> Any:
    """The last stage raises in its second step, in a schedule in which the first waits for it."""
    stages, batches = pieces("plain")
    module = nn.Sequential(stages[rank], Picky("never"))
    schedule = ScheduleGPipe(staged(rank, size, module), 2, loss_fn=F.cross_entropy)
    optimizer, number, said = torch.optim.SGD(module.parameters(), 0.1), 0, ""

    def step(model: Any, batch: Any, optimizer: Any) -> None:
        nonlocal number
        number += 1
        if number == 2 and rank == 1:
            raise ValueError("too large for me")
        model.step(*((batch[0],) if rank == 0 else ()), **({"target": batch[1]} if rank else {}))

    before, began = held(module, optimizer), time.monotonic()
    try:
        gf.analyze(schedule, batches, optimizer=optimizer, step_fn=step, steps=4)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, time.monotonic() - began, before == held(module, optimizer)


OTHERS = ("frozen", "unlike")


def replicated(rank: int, size: int) -> str:
    """A step of one's own, of stages under DistributedDataParallel."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
    stages, batches = pieces("plain")
    index, place = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = DistributedDataParallel(stages[index], process_group=mesh["dp"].get_group())
    stage = PipelineStage(module, index, 2, torch.device("cpu"), group=mesh["pp"].get_group())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    mine, said = part(batches, place, size // 2), ""
    try:
        gf.analyze(stage, mine, nn.CrossEntropyLoss(), optimizer=optimizer, step_fn=lambda *_: None)
    except ModelInputError as error:
        said = str(error)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    record = gf.analyze(stage, mine, nn.CrossEntropyLoss(), optimizer=optimizer, scaler=scaler, seed=0)
    return said, record


def shared(how: str, rank: int, size: int) -> Any:
    """A loop of two stages that two processes have each; of split layers, `GradScaler` itself takes none."""
    kind, name = SHARED[how]
    stage, mine, loss_fn = spread(how, name, rank, size)
    schedule = ScheduleGPipe(stage, 2, loss_fn=loss_fn)
    if how == "gathered":  # `fully_shard` prepares itself in the first pass
        schedule.step(*((mine[0][0],) if stage.is_first else ()), **_target(stage, mine[0]))
    options = loop_of(kind, stage.submod, loss_fn, schedule)
    before = held(stage.submod, options["optimizer"])
    record = gf.analyze(schedule, mine, steps=6, seed=0, **options)
    after = held(stage.submod, options["optimizer"])
    return record, [key for key in before if before[key] != after[key]]


def _target(stage: Any, batch: Any) -> dict[str, Tensor]:
    return {"target": batch[1]} if stage.is_last else {}


SHARED = {"gathered": ("scaled clipped", "mlp-sick"), "tensor": ("function", "heads-sick")}
globals().update({f"shared {how}": functools.partial(shared, how) for how in SHARED})
