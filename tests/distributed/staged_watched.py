"""Trainings of pipelines, watched on the processes of all their stages."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.errors import ModelInputError
from tests.distributed.models import MODELS, Case, part
from tests.distributed.pieces import Chain, pieces
from tests.distributed.sharded import gathered, held, split
from tests.distributed.staged import cut, whole

STEPS = 12


def case(name: str) -> Case:
    """Return a model, batches for all steps, and a loss."""
    if name == "chain":  # of stages whose layers have the same names
        stages, batches = pieces("plain")
        model, loss_fn = Chain(stages), nn.CrossEntropyLoss()
    else:
        model, batches, loss_fn = whole(name)
    return model, (batches * STEPS)[:STEPS], loss_fn


def staged(model: nn.Module, index: int, number: int, group: Any = None) -> PipelineStage:
    """Return a stage of a model."""
    module = getattr(model, f"stage{index}") if isinstance(model, Chain) else cut(model, index, number)
    return PipelineStage(module, index, number, torch.device("cpu"), group=group)


class Training:
    """A training of a stage, or of a whole model, with a monitor beside it or without.

    Args:
        stage: that is trained; None for the whole model.
        model: the whole one.
        loss_fn: its loss.
        options: of the monitor; None for no monitor.
    """

    def __init__(self, stage: Any, model: nn.Module, loss_fn: Any, options: Any) -> None:
        self.stage, self.loss_fn = stage, loss_fn
        self.module = model if stage is None else stage.submod
        self.schedule = None if stage is None else ScheduleGPipe(stage, 2, loss_fn=loss_fn)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        self.changed: list[str] = []
        self.monitor: Any = None
        if options is not None:
            given = model if stage is None else options.pop("given", self.schedule)
            self.monitor = gf.Monitor(given, loss_fn, self.optimizer, every=4, **options)

    def look(self, x: Tensor, y: Tensor, loss: Any = None) -> None:
        """Hand the monitor what this process has of a batch."""
        if self.monitor is None:
            return
        batch: Any = (x, y)
        if self.stage is not None:
            batch = (x, None) if self.stage.is_first else (None, y) if self.stage.is_last else None
        before = held(self.module, self.optimizer)
        self.monitor(batch, loss=loss)
        after = held(self.module, self.optimizer)
        self.changed.extend(key for key, was in before.items() if after[key] != was)

    def passes(self, x: Tensor, y: Tensor) -> float | None:
        """Take the gradients of a batch, and return the loss where it is known."""
        if self.schedule is None:
            loss = self.loss_fn(self.module(x), y)
            loss.backward()
            return loss.item()
        losses: list[Tensor] = []
        given = {"target": y, "losses": losses} if self.stage.is_last else {}
        self.schedule.step(*((x,) if self.stage.is_first else ()), **given)
        return torch.stack(losses).mean().item() if losses else None

    def run(self, batches: Any, *, tells: bool = False) -> None:
        """Train on batches; looks are before the passes, between and after the update, in turns."""
        for step, (x, y) in enumerate(batches):
            self.optimizer.zero_grad()
            if not tells and step % 3 == 0:
                self.look(x, y)
            loss = self.passes(x, y)
            if tells or step % 3 == 1:
                self.look(x, y, loss if tells else None)
            self.optimizer.step()
            if not tells and step % 3 == 2:
                self.look(x, y)

    def found(self) -> dict[str, Any]:
        """Return what was seen, and what became of the weights."""
        names = dict(self.module.named_parameters())
        weights = {n: v[2] for n, v in held(self.module, None).items() if n in names}
        found: dict[str, Any] = {"weights": weights}
        if self.monitor is not None:
            report = self.monitor.report
            issues = [(i.layer, i.issue_type.value, i.severity.value) for i in report.issues]
            found |= {"record": report.record, "history": self.monitor.history, "issues": issues}
            found |= {"lines": report.lines, "changed": self.changed}
        return found


def trained(name: str, place: tuple[int, int] | None = None, options: Any = None) -> dict[str, Any]:
    """Train a model, or a stage of it, and return what looks show, and what they have changed."""
    model, batches, loss_fn = case(name)
    training = Training(None if place is None else staged(model, *place), model, loss_fn, options)
    training.run(batches)
    return training.found()


def watched(name: str, rank: int, size: int) -> dict[str, Any]:
    """Return what looks at a training show, and whether it went on as one that nobody watched."""
    found = trained(name, (rank, size), {"processes": "auto"})
    return found | {"same": found["weights"] == trained(name, (rank, size))["weights"]}


CASES_ON_TWO = {"mlp": False, "mlp-sick": True, "gpt": False, "born-late": True, "chain": False}


def _scenario(name: str) -> Any:
    return lambda rank, size: watched(name, rank, size)


globals().update({f"watched {name}": _scenario(name) for name in CASES_ON_TWO})


def jumped(rank: int, size: int) -> Any:
    """The loss of one batch is large, which the last stage alone knows; then that of many are."""
    model, batches, loss_fn = case("mlp")[0], case("mlp")[1], nn.MSELoss()
    targets = [torch.full((len(x), 3), 1e3 if step in (20, 21, 45) else 0.0) for step, (x, _) in
               enumerate((batches * 5)[:50])]  # fmt: skip
    given = [(x, y.double()) for (x, _), y in zip((batches * 5)[:50], targets, strict=True)]
    training = Training(staged(model, rank, size), model, loss_fn, {"processes": "auto"})
    training.monitor = gf.Monitor(
        training.stage, loss_fn, training.optimizer, every=30, processes="auto", in_time=(), pipeline=()
    )
    training.run(given, tells=True)
    history = training.monitor.history
    return history.steps.tolist(), history["loss"].tolist(), list(history.notes)


def resumed(rank: int, size: int) -> Any:
    """A training that is killed after six steps, and taken up again from its file."""
    found: list[Any] = [str(Path(tempfile.mkdtemp(), "history")) if rank == 0 else None]
    dist.broadcast_object_list(found)
    path = Path(found[0])
    options = {"processes": "auto", "path": path}
    model, batches, loss_fn = case("mlp")
    training = Training(staged(model, rank, size), model, loss_fn, dict(options))
    training.run(batches[:6])
    dist.barrier()
    first = training.monitor
    training.monitor = second = gf.Monitor(training.schedule, loss_fn, training.optimizer, every=4, **options)  # type: ignore[arg-type]
    state = first.state_dict()
    training.run(batches[6:])
    dist.barrier()
    read, text = gf.read_history(path), path.read_text()
    other = MODELS["gpt"]("healthy")[0]
    said = ""
    try:
        gf.Monitor(staged(other, rank, size), loss_fn, path=path, processes="auto")
    except ModelInputError as error:
        said = str(error)
    third = gf.Monitor(training.stage, loss_fn, processes="auto")
    third.load_state_dict(state)
    dist.barrier()
    path.unlink(missing_ok=True)
    return {
        "steps": first.history.steps.tolist(), "again": second.history.steps.tolist(),
        "same": read == second.history, "heads": text.count('"gradflow"'), "said": said,
        "loaded": third.history == first.history,
    }  # fmt: skip


class Faulty(nn.Module):
    """Raises in its next call if it is told to."""

    told = False

    def forward(self, x: Tensor) -> Tensor:
        if self.told:
            raise ValueError("too large for me")
        return x


def raising(rank: int, size: int) -> Any:
    """A look in which the last stage raises: the first one, and a later one."""
    stages, batches = pieces("plain")
    faulty, loss_fn = Faulty(), nn.CrossEntropyLoss()
    module = nn.Sequential(stages[rank], faulty) if rank else stages[0]
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    said, notes = "", []
    faulty.told = True
    before = held(module, None)
    monitor = gf.Monitor(stage, loss_fn, every=2, processes="auto")
    try:
        monitor(batches[0])
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    unchanged = before == held(module, None)
    monitor = gf.Monitor(stage, loss_fn, every=2, processes="auto")
    for step in range(7):
        faulty.told = step == 4
        monitor(batches[step % 4])
    notes = list(monitor.history.notes)
    return said, unchanged, notes, monitor.history.steps.tolist()


def refused(rank: int, size: int) -> dict[str, str]:
    """Return what is said to looks that do not take a stage."""
    stages, batches = pieces("plain")
    stage, loss_fn, said = PipelineStage(stages[rank], rank, size, torch.device("cpu")), nn.MSELoss(), {}
    init, update = gf.observer()
    two = [PipelineStage(stages[rank], rank + 2 * i, 4, torch.device("cpu")) for i in range(2)]
    interleaved = ScheduleInterleaved1F1B(two, 4, loss_fn)
    for name, look in {
        "several": lambda: gf.Monitor(interleaved, processes="auto"),
        "inside": lambda: gf.Monitor(stage, processes="auto").step(),
        "alone": lambda: gf.Monitor(stage, loss_fn),
        "observer": lambda: update(init(), stage, batches[0], loss_fn),
        "forward": lambda: gf.Monitor(stage, processes="auto", forward_fn=lambda model, batch: model(batch)),
    }.items():
        try:
            look()
        except ModelInputError as error:
            said[name] = str(error)
    return said


def observed(rank: int, size: int) -> Any:
    """The same looks by `gradflow.observer`."""
    model, batches, loss_fn = case("mlp")
    stage = staged(model, rank, size)
    init, update = gf.observer(every=4, processes="auto")
    state, reports = init(), 0
    for step, batch in enumerate(batches):
        before = state
        state, report = update(state, stage, batch, loss_fn, None, step)
        reports += report is not None
        assert report is not None or state.history.steps.tolist() == before.history.steps.tolist()
    return state.history, reports


OTHERS = ("jumped", "resumed", "raising", "refused", "observed")


# ------------------------------------------------------------------------- several that have a stage


def spread(how: str, name: str, rank: int, size: int) -> tuple[Any, list[Any], Any]:
    """Return a stage that this process has with others or alone, its part of the batches, and the loss."""
    model, batches, loss_fn = case(name)
    if how == "alone":
        return staged(model, rank, size), batches, loss_fn
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
    index, place = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module, mine = cut(model, index, 2), part(batches, place, size // 2)
    if how == "replicated":
        module = DistributedDataParallel(module, process_group=mesh["dp"].get_group())
    elif how == "tensor":
        module, mine = split(module, mesh["dp"]), batches
    else:
        module = gathered(module, mesh["dp"])
    return PipelineStage(module, index, 2, torch.device("cpu"), group=mesh["pp"].get_group()), mine, loss_fn


def shared(how: str, name: str, rank: int, size: int) -> dict[str, Any]:
    """Return what looks at stages show that several processes have, and whether the training went on."""
    found = []
    for options in ({"processes": "auto"}, None):
        stage, mine, loss_fn = spread(how, name, rank, size)
        training = Training(stage, stage.submod, loss_fn, options)
        if how == "gathered":  # `fully_shard` prepares itself in the first pass
            training.passes(*mine[0])
        if how == "replicated":  # of which PyTorch 2.13 takes no second step in a schedule
            for x, y in mine:
                training.look(x, y)
        else:
            training.run(mine)
        found.append(training.found())
    return found[0] | {"same": found[0]["weights"] == found[1]["weights"]}


ON_FOUR = {
    "replicated mlp-sick": {"trains": False},
    "gathered mlp-sick": {"trains": True},
    "gathered gpt": {"trains": True},
    "tensor heads-sick": {"trains": True},
    "alone mlp-sick": {"trains": True},
}


def _shared(name: str) -> Any:
    how, _, model = name.partition(" ")
    return lambda rank, size: shared(how, model, rank, size)


globals().update({f"shared {name}": _shared(name) for name in ON_FOUR})


def jumped_apart(rank: int, size: int) -> Any:
    """The loss of one part of the batch jumps, which one of two processes that have the last stage knows."""
    stage, mine, _ = spread("gathered", "mlp", rank, size)
    loss_fn = nn.MSELoss()
    given = [(x, torch.zeros(len(x), 3).double()) for x, _ in mine]
    if rank == size - 1:
        given[8][1].fill_(1e3)
    training = Training(stage, stage.submod, loss_fn, {"processes": "auto"})
    training.monitor = gf.Monitor(stage, loss_fn, every=30, processes="auto", in_time=(), pipeline=())
    batches = [given[i % 4] for i in range(18)] + [given[8]] + [given[i % 4] for i in range(8)]
    training.run(batches, tells=True)
    return training.monitor.history.steps.tolist()
