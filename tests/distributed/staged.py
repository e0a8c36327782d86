"""Models cut into stages of a pipeline: how each is cut, what an analysis shows, whether all is as it was."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    SplitPoint,
    pipeline,
)
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.errors import ModelInputError
from gradflow.functional.updates.curvature import curvature
from tests.distributed.models import GPT, MODELS, Case, Layer, ResNet, _feed, next_word, part, words
from tests.distributed.pieces import pieces
from tests.distributed.sharded import CASES, held, split


def whole(name: str) -> Case:
    """Return a model, batches and a loss; a ResNet with batch norms of its own, not joined over processes."""
    case, _, kind = name.partition("-")
    if case == "deep":  # of whose four blocks each stage has two, and one has no norm before its feed
        torch.manual_seed(0)
        model = GPT(_feed).double()
        model.layers = nn.Sequential(*(Layer(8, _feed()) for _ in range(4))).double()
        if kind == "sick":
            model.layers[1].norm1 = nn.Identity()
            nn.init.normal_(model.layers[1].attention.out.weight, std=20.0)  # type: ignore[union-attr,arg-type]
        return model, words(), next_word
    if case != "resnet":
        model, batches, loss_fn = CASES[case](kind or "healthy")
        if kind == "late":  # what makes a NaN is in the last stage
            model[3], model[1] = model[1], nn.ReLU()  # type: ignore[index,operator]
            model[0].weight.data *= 50.0  # type: ignore[index,operator,union-attr]
        return model, batches, loss_fn
    model, batches, loss_fn = MODELS[case]("plain")
    if kind == "sick":
        nn.init.zeros_(model.blocks[0].conv1.weight)  # type: ignore[union-attr,index,arg-type]
    return model, batches, loss_fn


class Cut(nn.Module):
    """A stage: some of a model's parts, under the names that they have in it."""

    def __init__(self, model: nn.Module, index: int, number: int) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == number - 1
        inner = "blocks" if isinstance(model, ResNet) else "layers"
        for name, child in model.named_children():
            if name == inner:
                blocks = list(child.named_children())
                own = range(index * len(blocks) // number, (index + 1) * len(blocks) // number)
                kept = nn.Sequential()
                for i in own:
                    kept.add_module(*blocks[i])
                self.add_module(name, kept)
            elif (name in ("stem", "word", "place") or (inner == "blocks" and name == "norm")) == (
                self.is_first
            ) and (self.is_first or self.is_last):
                self.add_module(name, child)


class CutResNet(Cut):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))) if self.is_first else x
        x = self.blocks(x)
        return self.head(x.mean((2, 3))) if self.is_last else x


class CutGPT(Cut):
    def forward(self, x: Tensor) -> Tensor:
        x = self.word(x) + self.place(torch.arange(x.shape[1])) if self.is_first else x
        x = self.layers(x)
        return self.head(self.norm(x)) if self.is_last else x


def cut(model: nn.Module, index: int, number: int) -> nn.Module:
    """Return a stage of a model."""
    if isinstance(model, ResNet):
        return CutResNet(model, index, number)
    if isinstance(model, GPT):
        return CutGPT(model, index, number)
    kept, every = nn.Sequential(), list(model.named_children())
    for name, child in every[index * len(every) // number : (index + 1) * len(every) // number]:
        kept.add_module(name, child)
    return kept


def trained(schedule: Any, batch: tuple[Tensor, Tensor]) -> None:
    """Take the gradients of a batch as training does."""
    stage = schedule._stage
    given = (batch[0],) if stage.is_first else ()
    schedule.step(*given, **({"target": batch[1]} if stage.is_last else {}))


def measured(name: str, how: str, rank: int, size: int, *, moves: bool, **options: Any) -> dict[str, Any]:
    """Return what a pipeline shows, and whether all of this process's stage is as it was before.

    It is asked for by the schedule, or, where processes share a stage, by the stage.
    """
    model, batches, loss_fn = whole(name)
    index, number, mine, group = rank, size, batches, None
    if how != "alone":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
        index, number, group = mesh["pp"].get_local_rank(), 2, mesh["pp"].get_group()
        mine = part(batches, mesh["dp"].get_local_rank(), size // 2)
        module = cut(model, index, number)
        if how == "tensor":
            module, mine = split(module, mesh["dp"]), batches
        elif how == "replicated":
            module = DistributedDataParallel(module, process_group=mesh["dp"].get_group())
        else:
            for inner in reversed(list(module.modules())):
                if isinstance(inner, (nn.Linear, nn.Embedding)):
                    fully_shard(inner, mesh=mesh["dp"])
            fully_shard(module, mesh=mesh["dp"])
    else:
        module = cut(model, index, number)
    stage = PipelineStage(module, index, number, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(stage, 2, loss_fn=loss_fn)
    # batch norms would move; of DistributedDataParallel, PyTorch 2.13 takes no second step in a schedule
    trains = "resnet" not in name and how != "replicated"
    if trains:
        trained(schedule, mine[0])  # gradients that must not be lost
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2) if moves else None
    before = held(module, optimizer)
    given = (schedule, mine) if how == "alone" else (stage, mine, loss_fn)
    report = gf.diagnose(*given, steps=len(mine), optimizer=optimizer, seed=0, **options)
    after = held(module, optimizer)
    if trains:
        trained(schedule, mine[0])
    return {
        "record": report.record,
        "verdicts": [(own(i.layer), i.issue_type.value, i.severity.value) for i in report.issues],
        "changed": [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)],
    }


def own(name: str) -> str:
    """Return a name without that of DistributedDataParallel's inner module."""
    return name.replace("module.", "")


# (how, model): (whether an optimizer moves the parameters, options)
ON_TWO: dict[tuple[str, str], tuple[bool, dict[str, Any]]] = {
    ("alone", "mlp"): (False, {"detail": "full"}),
    ("alone", "mlp-sick"): (True, {}),
    ("alone", "resnet"): (True, {"detail": "full"}),
    ("alone", "resnet-sick"): (False, {}),
    ("alone", "gpt"): (False, {"detail": "full"}),
    ("alone", "gpt-sick"): (True, {}),
    ("alone", "mixture"): (True, {}),
    ("alone", "mixture-sick"): (False, {}),
    ("alone", "born"): (False, {}),
    ("alone", "deep"): (False, {}),
    ("alone", "deep-sick"): (False, {}),
    ("alone", "born-late"): (True, {}),
}
ON_FOUR: dict[tuple[str, str], tuple[bool, dict[str, Any]]] = {
    ("replicated", "mlp"): (False, {"detail": "full"}),
    ("replicated", "gpt-sick"): (True, {}),
    ("gathered", "mlp-sick"): (True, {}),
    ("gathered", "gpt"): (False, {}),
    ("tensor", "heads-sick"): (True, {}),
    ("alone", "mlp-sick"): (True, {}),
}


def _scenario(how: str, name: str, moves: bool, options: dict[str, Any]) -> Callable[[int, int], Any]:
    return lambda rank, size: measured(name, how, rank, size, moves=moves, **options)


for (_how, _name), (_moves, _options) in {**ON_FOUR, **ON_TWO}.items():
    globals()[f"{_how} {_name}"] = _scenario(_how, _name, _moves, _options)


# ------------------------------------------------------------------------------------------ more


def staged(rank: int, size: int, module: nn.Module) -> PipelineStage:
    return PipelineStage(module, rank, size, torch.device("cpu"))


def piece(kind: str, rank: int, size: int, *, moves: bool = False, **options: Any) -> Any:
    """Return what two stages show, of which the second is of a kind."""
    stages, batches = pieces(kind)
    optimizer = torch.optim.SGD(stages[rank].parameters(), 0.1) if moves else None
    before = held(stages[rank], optimizer)
    report = gf.diagnose(
        staged(rank, size, stages[rank]), batches, nn.CrossEntropyLoss(), optimizer=optimizer, seed=0,
        steps=5, **options,
    )  # fmt: skip
    after = held(stages[rank], optimizer)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    verdicts = [(i.layer, i.issue_type.value, i.severity.value) for i in report.issues]
    return {"record": report.record, "verdicts": verdicts, "changed": changed}


PIECES: dict[str, dict[str, Any]] = {
    "plain": {"moves": True, "clip": 0.3, "accumulate": 2},
    "detached": {},
    "dead": {"detail": "full"},
    "skips": {"detail": "full"},
    "again": {"moves": True},
    "frozen": {},
    "cut": {"detail": "full"},
}


def _piece(kind: str, options: dict[str, Any]) -> Callable[[int, int], Any]:
    return lambda rank, size: piece(kind, rank, size, **options)


for _kind, _given in PIECES.items():
    globals()[f"piece {_kind}"] = _piece(_kind, _given)


def refused(rank: int, size: int) -> dict[str, str]:
    """Return what is said to what is not taken."""
    stages, batches = pieces("plain")
    stage, loss_fn, said = staged(rank, size, stages[rank]), nn.CrossEntropyLoss(), {}
    interleaved = ScheduleInterleaved1F1B(
        [PipelineStage(stages[rank], rank + 2 * i, 4, torch.device("cpu")) for i in range(2)], 4, loss_fn
    )
    for name, call in {
        "vjp": lambda: gf.analyze(stage, batches, loss_fn, transform="vjp"),
        "alone": lambda: gf.analyze(stage, batches, loss_fn, processes="alone"),
        "lbfgs": lambda: gf.analyze(
            stage, batches, loss_fn, optimizer=torch.optim.LBFGS(stages[rank].parameters())
        ),
        "several": lambda: gf.analyze(interleaved, batches),
        "outline": lambda: gf.outline(stage, batches[0], loss_fn),
    }.items():
        try:
            call()
        except ModelInputError as error:
            said[name] = str(error)
    return said


class Picky(nn.Module):
    """Raises, or kills its process, in its third call."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3 and self.how != "never":
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("too large for me")
        return x


def _failing(how: str, where: int, rank: int, size: int) -> Any:
    stages, batches = pieces("plain")
    stage = nn.Sequential(Picky(how), stages[rank]) if rank == where else nn.Sequential(stages[rank])
    before, began = held(stage, None), time.monotonic()
    said = ""
    try:
        gf.analyze(staged(rank, size, stage), batches, nn.CrossEntropyLoss(), steps=5)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    seconds, changed = time.monotonic() - began, before != held(stage, None)
    if how == "killed":
        return said, seconds, changed, None
    again = gf.analyze(staged(rank, size, stages[rank]), batches, nn.CrossEntropyLoss(), steps=2)
    return said, seconds, changed, again.losses


def raises_first(rank: int, size: int) -> Any:
    return _failing("raises", 0, rank, size)


def raises_last(rank: int, size: int) -> Any:
    return _failing("raises", 1, rank, size)


def killed(rank: int, size: int) -> Any:
    return _failing("killed", 1, rank, size)


def runs_out(rank: int, size: int) -> Any:
    """The last stage has fewer batches, and nobody knows beforehand; the first draws inputs alone."""
    stages, batches = pieces("plain")
    mine = iter(batches[: 3 if rank else 5])
    return gf.analyze(staged(rank, size, stages[rank]), mine, nn.CrossEntropyLoss(), steps=5)


def summed(rank: int, size: int) -> Any:
    """A schedule that adds up the losses of its microbatches."""
    stages, batches = pieces("plain")
    schedule = Schedule1F1B(
        staged(rank, size, stages[rank]), 4, loss_fn=nn.CrossEntropyLoss(), scale_grads=False
    )
    record = gf.analyze(schedule, batches, steps=1)
    trained(schedule, batches[0])
    norms = {name: float(p.grad.norm()) for name, p in stages[rank].named_parameters() if p.grad is not None}
    return {p.name: float(p.grad_norm[0]) for p in record.parameters}, {
        f"stage{rank}.{name}": norm for name, norm in norms.items()
    }


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(torch.relu(self.second(h)) + h)


def traced(rank: int, size: int) -> Any:
    """A model that PyTorch has cut at a layer, where two tensors pass."""
    _, batches = pieces("plain")
    with warnings.catch_warnings():  # of its own tracer
        warnings.simplefilter("ignore")
        pipe = pipeline(
            Straight().double(), mb_args=(batches[0][0],), split_spec={"last": SplitPoint.BEGINNING}
        )
    return gf.analyze(pipe.build_stage(rank, torch.device("cpu")), batches, nn.CrossEntropyLoss(), seed=0)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 1e-9)


def bent(rank: int, size: int) -> Any:
    """How the loss bends along updates, and dropout that the last stage does not switch off."""
    stages, batches = pieces("plain")
    stages[1] = nn.Sequential(Dropping(), nn.Tanh(), stages[1][1])  # smooth, for a central difference
    adam = torch.optim.Adam(stages[rank].parameters(), 1e-2)
    before = held(stages[rank], adam)
    record = gf.analyze(
        staged(rank, size, stages[rank]), batches, nn.CrossEntropyLoss(), optimizer=adam, seed=0,
        measurements=[curvature()],
    )  # fmt: skip
    after = held(stages[rank], adam)
    return record, [key for key in before if before[key] != after[key]]


def counted(rank: int, size: int) -> Any:
    """What runs of eight steps and of nine have exchanged; the one more is no look."""
    stages, batches = pieces("plain")
    stage = staged(rank, size, stages[rank])
    return [gf.analyze(stage, batches * 2, nn.CrossEntropyLoss(), steps=steps) for steps in (8, 9)]


OTHERS = ("counted", "bent", "traced", "refused", "runs_out", "summed", "raises_first", "raises_last")
