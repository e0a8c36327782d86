"""The observer: when it looks, what it believes, and that it leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import LossError, ModelInputError, PipelineError
from gradflow.functional.attention.automatic import AutomaticAttention
from gradflow.functional.policy.automatic import AutomaticPolicy
from gradflow.functional.precision.automatic import AutomaticPrecision
from gradflow.records import HistoryRecord, Issue, IssueSeverity, IssueType
from gradflow.watching.observer import looks_closely
from gradflow.watching.schedule import loss_ceiling, next_look

BATCH = tuple[Tensor, Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.Tanh(),
        nn.Linear(16, 2),
    )  # fmt: skip


def batches(steps: int) -> Iterator[BATCH]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator)
        yield x, (x[:, 0] + x[:, 1] > 0).long()


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def trained(watch: Any, *, steps: int = 300, before: bool = False) -> tuple[nn.Module, Any]:
    """Return a model after a training with dropout and batch norm, and where the random states stand.

    Args:
        watch: model, loss, optimizer → what is called once a step, with the batch and its loss.
        steps: of the training.
        before: whether it is called before the optimizer's step, or after it.
    """
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    call = watch(model, loss_fn, optimizer)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        if before:
            call(batch, loss)
        optimizer.step()
        if not before:
            call(batch, loss)
    return model, states()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    grads = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and all(
        torch.equal(x.grad, y.grad) for x, y in grads if x.grad is not None and y.grad is not None
    )


def unwatched(model: nn.Module, loss_fn: Any, optimizer: Any) -> Any:
    return lambda batch, loss: None


# ------------------------------------------------------------------------------------ no trace


@pytest.mark.parametrize("before", [False, True])
def test_weights_are_the_same_with_and_without(before: bool) -> None:
    plain, stood = trained(unwatched, before=before)
    monitors: list[gf.Monitor] = []

    def watch(model: nn.Module, loss_fn: Any, optimizer: Any) -> Any:
        monitors.append(gf.Monitor(model, loss_fn, optimizer, every=25))
        return lambda batch, loss: monitors[0](batch, loss=loss)

    model, stands = trained(watch, before=before)
    assert same(plain, model)
    assert stands == stood
    assert len(monitors[0].history) >= 12


def test_a_look_that_raises_ends_nothing() -> None:
    plain, _ = trained(unwatched)
    monitors: list[gf.Monitor] = []

    def watch(model: nn.Module, loss_fn: Any, optimizer: Any) -> Any:
        looking: list[bool] = []

        def failing(output: Tensor, target: Tensor) -> Tensor:
            if looking and len(monitors[0].history) >= 3:
                raise RuntimeError("the disk is full")
            return loss_fn(output, target)

        monitors.append(gf.Monitor(model, failing, optimizer, every=25))

        def call(batch: BATCH, loss: Tensor) -> None:
            looking.append(True)
            report = monitors[0](batch)
            looking.clear()
            if report is not None and not report.record.steps:
                assert "could not be looked at: RuntimeError: the disk is full" in report.text("full")

        return call

    model, _ = trained(watch)
    assert same(plain, model)
    assert len(monitors[0].history) == 3
    notes = monitors[0].history.notes
    assert len(notes) == 13 - 1, "one for every look that failed"
    assert all("RuntimeError: the disk is full" in note for note in notes)


def test_the_optimizer_is_only_read() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters())
    batch = next(batches(1))
    loss_fn(model(batch[0]), batch[1]).backward()
    optimizer.step()
    was = copy.deepcopy(optimizer.state_dict())
    gf.Monitor(model, loss_fn, optimizer)(batch)
    now = optimizer.state_dict()
    assert was["param_groups"] == now["param_groups"]
    for number, held in was["state"].items():
        assert all(torch.equal(held[key], now["state"][number][key]) for key in held)


def test_before_and_after_the_step_say_the_same() -> None:
    told = []
    for before in (False, True):
        events: list[Any] = []

        def watch(model: nn.Module, loss_fn: Any, optimizer: Any, events: list[Any] = events) -> Any:
            with torch.no_grad():
                model[0].weight.mul_(1e-9)
                model[0].bias.zero_()
                model[1].weight.zero_()
                model[1].bias.fill_(-3.0)  # no unit of the rectifier behind it ever fires
            monitor = gf.Monitor(model, loss_fn, optimizer, every=25)
            events.append(monitor)
            return lambda batch, loss: monitor(batch, loss=loss)

        trained(watch, steps=60, before=before)
        told.append([(e.layer, e.issue_type, e.since, e.told) for e in events[0].history.events])
    assert told[0] == told[1]
    assert ("2", IssueType.DEAD) in {(layer, kind) for layer, kind, *_ in told[0]}


def test_update_is_pure() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    init, update = gf.observer(every=10)
    state = init()
    batch = next(batches(1))
    first, report = update(state, model, batch, loss_fn, None, 0)
    again, report_again = update(state, model, batch, loss_fn, None, 0)
    assert state.history == HistoryRecord.empty()
    assert report is not None
    assert report_again is not None
    assert first.history == again.history
    second, report = update(first, model, batch, loss_fn, None, 1)
    assert report is not None
    third, report = update(second, model, batch, loss_fn, None, 2)
    assert report is None, "only what the update has done is taken down"
    assert third.due == 4
    assert update(third, model, batch, loss_fn, None, 3)[0] is third, "nothing is done"


# ------------------------------------------------------------------------------------ when


def test_looks_come_often_at_first() -> None:
    steps, step = [0], 0
    while step < 1000:
        step = next_look(step, 200)
        steps.append(step)
    assert steps == [0, 1, 4, 16, 64, 200, 400, 600, 800, 1000]
    assert [next_look(700, 200, since=700), next_look(701, 200, since=700)] == [701, 704]
    assert next_look(0, 1) == 1


def test_close_looks_become_rare_and_ask_for_what_was_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for kind in (AutomaticAttention, AutomaticPolicy, AutomaticPrecision):

        def start(self: Any, *args: Any, name: str = kind.__name__, of: Any = kind.start) -> Any:
            asked.append(name)
            return of(self, *args)

        monkeypatch.setattr(kind, "start", start)
    model = network()
    init, update = gf.observer(every=1, most=4)
    state, close = init(), []
    for step, batch in enumerate(batches(20)):
        closely = looks_closely(state)
        asked.clear()
        state, report = update(state, model, batch, nn.CrossEntropyLoss(), None, step)
        if report is not None and state.suspicion is None:
            kinds = {"AutomaticPrecision"} | ({"AutomaticAttention", "AutomaticPolicy"} if closely else set())
            assert kinds == set(asked), f"look {state.looks}"
            close += [state.looks] if closely else []
    assert close == [1, 2, 3, 5, 9, 17], "the first, and behind it those whose number is a power of two"
    assert len(state.history) == 4


def test_attention_that_a_close_look_has_seen_is_asked_for_at_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    init, update = gf.observer(every=1)
    state, batch = init(), torch.randn(4, 5, 8)
    for step in range(4):
        state, _ = update(state, model, batch, lambda y: y.square().mean(), None, step)
    assert state.absent == {AutomaticPolicy}
    (entropy,) = state.history.of("attention_entropy_share").values()
    assert np.isfinite(entropy).all()


def test_what_is_usual_is_robust() -> None:
    history = HistoryRecord.empty()
    for step, loss in enumerate([1.0, 1.1, 0.9, 40.0, 1.0, 1.05]):
        assert loss_ceiling(history) == np.inf or step >= 4
        history = history.with_look(step, {"loss": loss})
    assert 1.5 < loss_ceiling(history) < 3.0


def test_a_jump_is_looked_at_and_its_samples_named() -> None:
    model, loss_fn = nn.Linear(3, 1), nn.MSELoss()
    monitor = gf.Monitor(model, loss_fn, every=10)
    torch.manual_seed(0)
    for step in range(47):
        x = torch.randn(64, 3)
        y = x.sum(1, keepdim=True)
        if step == 45:
            y[7], y[21] = 1e3, -1e3
        with torch.no_grad():
            loss = loss_fn(model(x), y)
        report = monitor((x, y), loss=loss)
        assert (report is not None) == (step in monitor.history.steps)
    assert {45, 46} <= set(monitor.history.steps.tolist())
    (note,) = monitor.history.notes
    assert note.startswith("Step 45: the loss is ")
    assert "Samples 7, 21 of the batch's 64 carry" in note


def test_a_loss_that_cannot_be_read_is_refused() -> None:
    model = nn.Linear(3, 1)
    monitor = gf.Monitor(model, lambda y: y.mean())
    with pytest.raises(ModelInputError, match=r"loss has shape \(4,\); pass the scalar"):
        monitor(torch.ones(4, 3), loss=torch.ones(4))
    with pytest.raises(ModelInputError, match="loss is a str; pass the scalar loss"):
        monitor(torch.ones(4, 3), loss="low")


# ------------------------------------------------------------------------------------ what is believed


def once_only(layer: str, looks: int) -> Any:
    """Return a detector that reports a layer in so many calls, and no more."""
    left = [looks]

    def detector(record: gf.FlowRecord) -> list[Issue]:
        left[0] -= 1
        if left[0] < 0:
            return []
        return [
            Issue(
                layer=layer, layer_type="Linear", issue_type=IssueType.VANISHING,
                severity=IssueSeverity.HIGH, description="little.", magnitude=1.0,
            )
        ]  # fmt: skip

    return detector


def run(monitor: gf.Monitor, steps: int) -> dict[int, gf.Report]:
    reports = {}
    for step, batch in enumerate(batches(steps)):
        if (report := monitor(batch)) is not None:
            reports[step] = report
    return reports


def test_what_one_batch_shows_is_looked_into_and_doubted() -> None:
    model = network()
    monitor = gf.Monitor(model, nn.CrossEntropyLoss(), every=20, pipeline=once_only("0", 1), in_time=())
    reports = run(monitor, 30)
    assert sorted(reports) == [0, 3, 4, 16, 20], "the first look, and a closer one on four batches"
    assert all(report.ok for report in reports.values())
    assert "Seen in this batch, not certain yet: VANISHING in 0." in reports[0].lines
    assert reports[3].record.steps == 4
    assert not monitor.history.events
    assert monitor.state.doubts[("0", "VANISHING")].until == 23


def test_what_a_closer_look_shows_is_told_until_it_is_over() -> None:
    monitor = gf.Monitor(network(), nn.CrossEntropyLoss(), every=20, pipeline=once_only("0", 5), in_time=())
    seen: list[tuple[str, int]] = []
    monitor.on_issue(lambda issue, step: seen.append((issue.layer, step)))
    reports = run(monitor, 130)
    told = [step for step, report in reports.items() if not report.ok]
    assert told == [3, 4, 16, 20], "the closer look, two looks that show it, one that does not"
    (event,) = monitor.history.events
    assert (event.since, event.told, event.until) == (0, 3, 40)
    assert seen == [("0", 3)]
    assert "VANISHING in 0: since step 0." in reports[3].lines


def test_a_missing_number_is_told_at_once() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    monitor = gf.Monitor(model, nn.CrossEntropyLoss(), every=20)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    report = monitor(next(batches(1)))
    assert report is not None
    assert {issue.issue_type for issue in report.issues} == {IssueType.NUMERICAL}


def test_alerts_come_once_and_again_if_it_gets_worse() -> None:
    monitor = gf.Monitor(network(), nn.CrossEntropyLoss(), every=20, pipeline=once_only("0", 99), in_time=())
    low: list[int] = []
    high: list[int] = []
    monitor.on_issue(lambda issue, step: low.append(step), severity=IssueSeverity.LOW)
    monitor.on_issue(lambda issue, step: high.append(step), severity="CRITICAL")
    run(monitor, 60)
    assert low == [3]
    assert not high
    with pytest.raises(ModelInputError, match="on_issue: 3 cannot be called"):
        monitor.on_issue(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="severity must be one of CRITICAL, HIGH"):
        monitor.on_issue(print, severity="LOUD")


# ------------------------------------------------------------------------------------ what is given


def test_what_cannot_be_measured_raises_at_the_first_look() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(LossError, match="the loss has shape"):
        gf.Monitor(model, lambda y: y)(torch.ones(4, 3))
    with pytest.raises(ModelInputError):
        gf.Monitor("model", None)  # type: ignore[arg-type]
    with pytest.raises(PipelineError):
        gf.Monitor(model, None, pipeline="flow")
    with pytest.raises(ModelInputError, match="forward_fn is a int; pass a function"):
        gf.Monitor(model, None, forward_fn=3)  # type: ignore[arg-type]
    for bad in ({"every": 0}, {"batches": 0}, {"most": 3}, {"every": True}, {"every": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a whole number"):
            gf.Monitor(model, None, **bad)  # type: ignore[arg-type]


def test_a_forward_of_ones_own() -> None:
    model = nn.Linear(3, 1)
    plain = gf.Monitor(model, lambda y: y.square().mean())
    own = gf.Monitor(model, forward_fn=lambda m, batch: m(batch["x"]).square().mean())
    x = torch.randn(8, 3)
    plain(x)
    own({"x": x})
    assert own.history["gradient_norm"].tolist() == plain.history["gradient_norm"].tolist()


def test_a_batch_that_the_loop_fills_anew() -> None:
    buffer = torch.empty(16, 6), torch.empty(16, dtype=torch.long)
    monitor = gf.Monitor(network(), nn.CrossEntropyLoss(), every=20, pipeline=once_only("0", 1), in_time=())
    for x, y in batches(4):
        buffer[0].copy_(x[:16])
        buffer[1].copy_(y[:16])
        monitor(buffer)
    assert monitor.report is not None
    losses = monitor.report.record.losses
    assert len(set(losses.tolist())) == 4, "the closer look has seen four batches, not one four times"
