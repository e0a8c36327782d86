"""Trainings of pipelines, watched on the processes of all their stages."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.errors import ModelInputError
from tests.distributed.models import MODELS, Case, part
from tests.distributed.pieces import Chain, pieces
from tests.distributed.sharded import held
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
    for name, look in {
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


def shared(rank: int, size: int) -> dict[str, Any]:
    """Two stages on two processes each, with parts of the batch."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pp", "dp"))
    model, batches, loss_fn = case("mlp-sick")
    index, place = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    stage = staged(model, index, 2, mesh["pp"].get_group())
    stage.submod = module = DistributedDataParallel(stage.submod, process_group=mesh["dp"].get_group())
    schedule = Schedule1F1B(stage, 2, loss_fn=loss_fn)
    monitor = gf.Monitor(schedule, every=4, processes="auto")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for x, y in part(batches, place, size // 2):
        before = held(module, optimizer)
        monitor((x, y), loss=0.0)
        assert before == held(module, optimizer)
    assert monitor.report is not None
    return {"record": monitor.report.record, "history": monitor.history}
