"""`Monitor.step`: the same as a call of the monitor, from inside the step."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import ModelInputError
from gradflow.functional.inside.look import InsideLook
from gradflow.functional.inside.recorder import OwnRecorder
from gradflow.records import IssueType


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.Tanh(),
        nn.Linear(16, 2),
    )  # fmt: skip


def sunken() -> nn.Module:
    """Return a network through which next to no gradient comes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), *[m for _ in range(12) for m in (nn.Sigmoid(), nn.Linear(16, 16))],
                         nn.Sigmoid(), nn.Linear(16, 2))  # fmt: skip


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator)
        yield x, (x[:, 0] + x[:, 1] > 0).long()


def trained(
    model: nn.Module,
    monitor: gf.Monitor | None,
    steps: int,
    *,
    beside: bool = False,
    outside: bool = False,
    rate: float = 1e-2,
) -> list[Any]:
    """Train, with or without a monitor; return its reports by step.

    Args:
        model: is trained.
        monitor: watches.
        steps: how many.
        beside: looks are taken beside the training.
        outside: the update comes after the context.
        rate: of Adam.
    """
    optimizer, reports = torch.optim.Adam(model.parameters(), lr=rate), []
    torch.manual_seed(5)
    for batch in batches(steps):
        inside = monitor is not None and not beside
        with monitor.step() if inside else contextlib.nullcontext() as step:
            if monitor is not None and beside:
                reports.append(monitor(batch))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            (loss if step is None else step.loss(loss)).backward()
            if not outside:
                optimizer.step()
        if outside:
            optimizer.step()
        if step is not None:
            reports.append(step.report)
    return reports


@pytest.mark.parametrize("every", [1, 50])
def test_three_hundred_steps_give_the_same_weights_and_random_numbers(every: int) -> None:
    def left(watched: bool) -> Any:
        model = network()
        monitor = gf.Monitor(model, every=every) if watched else None
        random.seed(1)
        np.random.seed(1)
        trained(model, monitor, 300)
        if monitor is not None:
            assert not any("could not be looked at" in note for note in monitor.history.notes)
            assert len(monitor.history) >= 300 // every - 40  # closer looks make no column
        return model.state_dict(), (torch.rand(1).item(), np.random.rand(), random.random())

    (plain, drawn), (watched, again) = left(False), left(True)
    assert drawn == again
    for name, tensor in plain.items():
        assert torch.equal(tensor, watched[name]), name


def test_looks_are_where_they_are_beside_and_show_the_same() -> None:
    model, other = network(), network()
    inside, beside = gf.Monitor(model, every=25), gf.Monitor(other, F.cross_entropy, every=25)
    reports = trained(model, inside, 101)
    trained(other, beside, 101, beside=True)
    assert inside.history.steps.tolist() == beside.history.steps.tolist() == [0, 1, 4, 16, 25, 50, 75, 100]
    assert [i for i, report in enumerate(reports) if report is not None] == inside.history.steps.tolist()
    assert inside.report is reports[100]
    first = {name: values[0] for name in beside.history.names if (values := beside.history[name]) is not None}
    missing = {name.partition("/")[0] for name in first} - {n.partition("/")[0] for n in inside.history.names}
    assert missing == {"loss_share_left"}
    for name, value in first.items():
        if name in inside.history and not name.startswith(("update_ratio", "unchanged_share")):
            assert inside.history[name][0] == pytest.approx(value, rel=1e-5), name
    for name in beside.history.names:  # the looks beside come before the update, so they see it later
        if name.startswith("update_ratio"):
            assert inside.history[name][:7] == pytest.approx(beside.history[name][:7], rel=1e-5), name
    assert inside.history.types == beside.history.types
    assert "Training step 100." in inside.report.lines


@pytest.mark.parametrize("outside", [False, True])
def test_the_update_is_told_in_the_step_or_by_the_next_call(outside: bool) -> None:
    model = network()
    monitor = gf.Monitor(model, every=10)
    before = model[0].weight.detach().clone()
    trained(model, monitor, 1, outside=outside)
    name, after = "update_ratio/0.weight", model[0].weight.detach()
    by_hand = float((after - before).norm() / before.norm())
    assert (name in monitor.history) == (not outside)
    with monitor.step(step=2):
        pass
    assert monitor.history[name] == pytest.approx([by_hand])


def test_what_is_wrong_is_told_after_the_steps_that_decide_it() -> None:
    model, other = sunken(), sunken()
    inside, beside = gf.Monitor(model, every=50), gf.Monitor(other, F.cross_entropy, every=50)
    told: list[tuple[str, int]] = []
    inside.on_issue(lambda issue, step: told.append((issue.issue_type.value, step)))
    trained(model, inside, 12)
    trained(other, beside, 12, beside=True)
    (event, *_) = (e for e in inside.history.events if e.issue_type is IssueType.VANISHING)
    (same, *_) = (e for e in beside.history.events if e.issue_type is IssueType.VANISHING)
    assert (event.layer, event.severity, event.since) == (same.layer, same.severity, same.since)
    assert event.since == 0
    assert event.told == 4  # four steps after the one that showed it
    assert ("VANISHING", 4) in told
    assert inside.state.suspicion is None


def test_a_healthy_training_has_nothing_above_low_and_verdicts_are_those_from_beside() -> None:
    def issues(beside: bool, rate: float) -> list[list[tuple[str, str, str]]]:
        model = network()
        monitor = gf.Monitor(model, F.cross_entropy, every=20)
        reports = trained(model, monitor, 200, beside=beside, rate=rate)
        return [[(i.layer, i.issue_type.value, i.severity.value) for i in r.issues] for r in reports if r]

    found = issues(False, 1e-3)
    assert len(found) == 13
    assert {severity for look in found for _, _, severity in look} <= {"LOW", "INFO"}
    assert found == issues(True, 1e-3)
    assert issues(False, 1e-2) == issues(True, 1e-2)


def test_rectifiers_that_die_are_told_as_they_are_from_beside() -> None:
    def events(beside: bool) -> list[tuple[str, str, str, int]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        monitor = gf.Monitor(model, F.cross_entropy, every=20)
        for now, (x, y) in enumerate(batches(130)):
            if now == 90:
                with torch.no_grad():
                    model[2].bias -= 30
            if beside:
                monitor((x, y))
            with contextlib.nullcontext() if beside else monitor.step():
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        return [(e.layer, e.issue_type.value, e.severity.value, e.since) for e in monitor.history.events]

    inside = events(False)
    assert ("2", "DEAD", "CRITICAL", 100) in inside
    # that the loss is again that of guesses is known beside alone
    assert inside == [event for event in events(True) if event[1] != "UNSTABLE"]


def test_a_jump_of_the_loss_is_looked_at_in_the_next_step() -> None:
    model = network()
    monitor = gf.Monitor(model, every=50)
    trained(model, monitor, 120)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for batch in batches(3):
        with monitor.step() as step:
            optimizer.zero_grad()
            step.loss(100.0 + F.cross_entropy(model(batch[0]), batch[1])).backward()
    assert monitor.history.steps.tolist()[-2:] == [100, 121]
    assert any("is as much as is usual" in note for note in monitor.history.notes)


def test_a_look_that_raises_is_noted_and_the_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = network(), network()
    trained(model, None, 40)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a look's own")

    monitor = gf.Monitor(other, every=10)
    for name in ("_forward_statistics", "arrived"):
        with monkeypatch.context() as patched:
            patched.setattr(OwnRecorder, name, broken)
            assert gf.Monitor(copy.deepcopy(other), every=10).report is None
    monkeypatch.setattr(OwnRecorder, "_forward_statistics", broken)
    trained(other, monitor, 40)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert len(monitor.history) == 0
    assert monitor.history.notes[0] == "Step 0 could not be looked at: ZeroDivisionError: a look's own"
    assert len(monitor.history.notes) == 4
    assert monitor.report is not None
    assert monitor.report.lines == (monitor.history.notes[-1],)


@pytest.mark.parametrize("where", ["of", "listening", "record"])
def test_so_is_one_that_fails_before_or_after_the_step(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a look's own")

    monkeypatch.setattr(InsideLook, where, broken)
    model = network()
    monitor = gf.Monitor(model, every=10)
    trained(model, monitor, 2)
    assert monitor.history.notes == ("Step 0 could not be looked at: ZeroDivisionError: a look's own",)


def test_what_the_loop_raises_comes_through_and_is_noted() -> None:
    model = network()
    monitor, error = gf.Monitor(model), KeyError("the loop's")
    caught: BaseException | None = None
    try:
        with monitor.step():
            model(torch.randn(4, 6))
            raise error
    except KeyError as found:
        caught = found
    assert caught is error
    assert monitor.history.notes == ("Step 0 could not be looked at: the step raised KeyError",)
    trained(model, monitor, 210)
    assert monitor.history.steps.tolist() == [200]


def test_what_an_alert_raises_comes_through() -> None:
    model = sunken()
    monitor = gf.Monitor(model, every=50)

    def stop(issue: Any, step: int) -> None:
        raise RuntimeError("stop here")

    monitor.on_issue(stop)
    with pytest.raises(RuntimeError, match="stop here"):
        trained(model, monitor, 12)
    assert monitor.history.events


def test_a_scale_that_is_sought_is_no_trouble() -> None:
    model = network()
    monitor, scaler = gf.Monitor(model, every=10), torch.amp.GradScaler("cpu", init_scale=2.0**21)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches(12):
        with monitor.step(scaler=scaler):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.history.notes[0].startswith(
        "Step 0 could not be looked at: the scaled gradient overflowed"
    )
    assert monitor.history.events == ()
    assert len(monitor.history) >= 1
    assert monitor.history["loss"][0] < 2


def test_two_monitors_look_at_two_models_in_one_step() -> None:
    torch.manual_seed(0)
    g, d = nn.Linear(2, 8), nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    steps = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (g, d)]
    monitors = [gf.Monitor(m, every=5) for m in (g, d)]
    for _ in range(11):
        with monitors[0].step() as of_g, monitors[1].step() as of_d:
            steps[1].zero_grad()
            fake = g(torch.randn(16, 2))
            real, made = d(torch.randn(16, 8) + 2), d(fake.detach())
            of_d.loss(F.softplus(made).mean() + F.softplus(-real).mean()).backward()
            steps[1].step()
            steps[0].zero_grad()
            of_g.loss(F.softplus(-d(fake)).mean()).backward()
            steps[0].step()
    for monitor in monitors:
        assert {0, 1, 4, 5, 10} <= set(monitor.history.steps.tolist())
        assert not any("could not be looked at" in note for note in monitor.history.notes)
    assert np.isfinite(monitors[0].history["gradient_rms/"]).all()


def test_the_file_holds_it_and_the_training_is_taken_up(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "history.jsonl"
    trained(model, gf.Monitor(model, every=10, path=path), 31)
    again = gf.Monitor(model, every=10, path=path)
    trained(model, again, 20)
    assert again.history.steps.tolist() == [0, 1, 4, 10, 20, 30, 31, 40, 50]
    read = gf.read_history(path)
    assert read.steps.tolist() == again.history.steps.tolist()


def test_what_cannot_be_done_is_refused_in_a_sentence() -> None:
    model = network()
    monitor = gf.Monitor(model)
    with pytest.raises(ModelInputError, match="scaler is a float; pass the GradScaler"):
        monitor.step(scaler=2.0)
    with monitor.step(), pytest.raises(ModelInputError, match=r"was called inside of monitor.step\(\)"):
        monitor.step()
    model.compile(backend="eager")
    with pytest.raises(ModelInputError, match="is compiled: its inside cannot be listened to"):
        gf.Monitor(model).step()
    other = gf.Monitor(network(), every=100)
    for _ in range(3):  # a look, and no look
        with other.step() as step:
            with pytest.raises(ModelInputError, match="loss has shape"):
                step.loss(torch.ones(3))
            other.model(torch.randn(4, 6)).sum().backward()
