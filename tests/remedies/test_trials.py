"""Trials: purity, pairing, verdicts of known cases, budgets, remedies that raise, their own remedies."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import RecordInputError, RemedyError
from gradflow.remedies import Remedy, clipped, kaiming, on_model, rate_times, try_remedies
from tests.remedies.models import bits, dead_net, drawn, same, with_targets_kept

CURE = kaiming(["0"])


def nothing(name: str = "nothing", apply: Any = lambda model, optimizer: (model, optimizer)) -> Remedy:
    return Remedy(name=name, words="Nothing.", code="pass", apply=apply)


def setting() -> tuple[gf.Report, nn.Module, Any, Any, torch.optim.Optimizer]:
    net, batches, loss = dead_net(), drawn(), nn.MSELoss()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    return gf.diagnose(net, batches, loss, optimizer=optimizer, steps=6), net, batches, loss, optimizer


def raising(model: nn.Module, optimizer: Any) -> Any:
    with torch.no_grad():
        next(model.parameters()).zero_()
    torch.randn(3)
    raise RuntimeError("no such luck")


@pytest.mark.parametrize("remedy", [CURE, clipped(1.0), nothing("raises", raising)], ids=lambda r: r.name)
def test_everything_of_the_users_is_as_it_was(remedy: Remedy) -> None:
    report, net, batches, loss, optimizer = setting()
    before, data = bits(net, optimizer), [tuple(map(Tensor.clone, batch)) for batch in batches]
    try_remedies(report, net, batches, loss, optimizer, steps=8, seeds=2, remedies=[remedy])
    assert same(bits(net, optimizer), before)
    assert same(batches, data)


def test_a_cure_is_told_and_what_does_nothing_is() -> None:
    report, *given = setting()
    others = [nothing(str(i)) for i in range(4)]
    trials = try_remedies(report, *given, steps=25, seeds=2, remedies=[nothing(), CURE, *others])
    done = {trial.remedy: trial for trial in trials.trials}
    assert [trial.remedy for trial in trials.trials] == ["nothing", CURE.name, "0", "1"]  # the rest is spared
    assert [trial.verdict.value for trial in trials.trials] == [
        "no effect",
        "cures",
        "no effect",
        "no effect",
    ]
    assert [trial.seeds for trial in trials.trials] == [1, 2, 1, 1]
    assert done["nothing"].gain == 0.0
    assert done["nothing"].gone == 0.0
    np.testing.assert_array_equal(done["nothing"].losses_with, done["nothing"].losses_without)
    cure = done[CURE.name]
    assert (cure.present, cure.gone, cure.seeds, cure.steps) == (1.0, 1.0, 2, 25)
    assert cure.loss_with < 0.5 * cure.loss_without
    assert trials.best(report.causes[0]) is cure
    assert trials.confirmed(report.causes[0]) is True


def test_both_arms_see_the_same_batches_in_the_same_random_states() -> None:
    """The losses of an untouched copy are those of the model itself, dropout and targets included."""
    draw, loss, _ = with_targets_kept()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 1))
    nn.init.constant_(net[0].bias, -9.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    report = gf.diagnose(net, draw, loss, optimizer=optimizer, steps=5)
    extra = nothing("draws", lambda model, optimizer: (torch.rand(7), (model, optimizer))[1])
    trials = try_remedies(report, net, draw, loss, optimizer, steps=12, seeds=1, remedies=[nothing(), extra])
    assert [trial.remedy for trial in trials.trials] == ["nothing", "draws"]
    for trial in trials.trials:
        np.testing.assert_array_equal(trial.losses_with, trial.losses_without)
    assert np.ptp(trials.trials[0].losses_without) > 0


def test_a_run_is_the_plain_training_loop() -> None:
    report, net, batches, loss, optimizer = setting()
    trials = try_remedies(report, net, batches, loss, optimizer, steps=9, seeds=1, remedies=[CURE])
    twin = dead_net()
    step = torch.optim.Adam(twin.parameters(), 0.01)
    losses = []
    for i in range(9):
        x, y = batches[i % len(batches)]
        step.zero_grad()
        value = loss(twin(x), y)
        losses.append(value.item())
        value.backward()
        step.step()
    np.testing.assert_allclose(trials.trials[0].losses_without[:, 0], losses, rtol=1e-6)


def test_seeds_have_orders_of_their_own() -> None:
    report, *given = setting()
    (trial,) = try_remedies(report, *given, steps=12, seeds=3, remedies=[CURE]).trials
    first = trial.losses_without[0]
    assert len(set(first.tolist())) > 1


def test_a_loss_that_holds_the_model_sees_the_copy() -> None:
    report, net, batches, _, optimizer = setting()
    seen: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(id(net))
        return nn.functional.mse_loss(output, target) + 1e-3 * sum(p.square().sum() for p in net.parameters())

    trials = try_remedies(report, net, batches, loss, optimizer, steps=8, seeds=1, remedies=[CURE])
    assert trials.trials[0].verdict.value != "not applicable"
    assert len(seen) > 2 * 8
    assert len(set(seen)) == 2  # the user's in the first run, the copy's with the remedy
    penalty = sum(float(p.detach().square().sum()) for p in net.parameters())
    plain = nn.functional.mse_loss(net(batches[0][0]), batches[0][1]).item()
    assert trials.trials[0].losses_without[0, 0] == pytest.approx(plain + 1e-3 * penalty, rel=1e-5)


def test_what_came_with_the_last_batch_is_there_at_the_end() -> None:
    draw, loss, latest = with_targets_kept()
    net = dead_net()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    report = gf.diagnose(net, draw, loss, optimizer=optimizer, steps=5)
    try_remedies(report, net, draw, loss, optimizer, steps=7, seeds=2, remedies=[CURE])
    other, _, last = with_targets_kept()
    for _ in range(5 + 7):
        other()
    assert torch.equal(latest["y"], last["y"])
    draw()
    other()
    assert torch.equal(latest["y"], last["y"])  # the source stands where seven more batches leave it


@pytest.mark.parametrize(
    ("apply", "why"),
    [
        (raising, "RuntimeError: no such luck"),
        (lambda model, optimizer: model, "must return (model, optimizer)"),
        (on_model(lambda model: nn.Linear(3, 3)), "RuntimeError"),
    ],
)
def test_a_remedy_that_cannot_be_tried_is_a_finding(apply: Any, why: str) -> None:
    report, *given = setting()
    trials = try_remedies(report, *given, steps=6, seeds=2, remedies=[nothing("bad", apply)])
    (trial,) = trials.trials
    assert trial.verdict is gf.TrialVerdict.NOT_APPLICABLE
    assert why in trial.why
    assert trial.steps == trial.seeds == 0
    assert trials.best(report.causes[0]) is None
    assert trials.confirmed(report.causes[0]) is None
    assert report.with_trials(trials).causes == report.causes


def test_a_model_that_cannot_be_copied_is_a_finding() -> None:
    class Locked(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot be copied")

    net = Locked(*dead_net())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    given = (net, drawn(), nn.MSELoss(), optimizer)
    report = gf.diagnose(*given[:3], optimizer=optimizer, steps=6)
    (trial,) = try_remedies(report, *given, steps=6, remedies=[CURE]).trials
    assert trial.why == "TypeError: cannot be copied"


def test_new_parameters_are_trained() -> None:
    made: list[nn.Module] = []

    def wide(model: nn.Module) -> nn.Module:
        model[0] = nn.Linear(8, 32)  # type: ignore[index]
        made.append(model[0])  # type: ignore[index]
        return model

    report, *given = setting()
    remedy = nothing("new layer", on_model(wide))
    (trial,) = try_remedies(report, *given, steps=25, seeds=1, remedies=[remedy]).trials
    assert trial.verdict is gf.TrialVerdict.CURES


def test_what_the_model_raises_comes_through_and_leaves_all_as_it_was() -> None:
    report, net, batches, _, optimizer = setting()
    before = bits(net, optimizer)
    generator = torch.Generator()
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True, generator=generator)  # type: ignore[arg-type]
    state = generator.get_state()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError, match="no loss today"):
        try_remedies(report, net, loader, loss, optimizer, steps=6, remedies=[CURE])
    assert same(bits(net, optimizer), before)
    assert torch.equal(generator.get_state(), state)


def test_budgets_are_kept() -> None:
    report, *given = setting()
    many = [nothing(str(i)) for i in range(6)]
    trials = try_remedies(report, *given, steps=6, seeds=1, remedies=many, max_steps=18)
    assert [trial.remedy for trial in trials.trials] == ["0", "1"]  # 6 without, 6 with each
    assert any("4 remedies were left out" in note for note in trials.notes)
    short = try_remedies(report, *given, steps=6, seeds=1, remedies=many, budget=1e-9)
    assert len(short.trials) == 1


def test_progress_rises_to_the_end() -> None:
    report, *given = setting()
    told: list[tuple[int, int]] = []
    try_remedies(
        report, *given, steps=6, seeds=2, remedies=[nothing(), CURE],
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert {total for _, total in told} == {3 * 2 * 6}
    done = [at for at, _ in told]
    assert done == sorted(done)
    assert done[-1] == 36


def test_without_an_optimizer_one_stands_in() -> None:
    report, net, batches, loss, _ = setting()
    trials = try_remedies(report, net, batches, loss, steps=6, seeds=1, remedies=[CURE])
    assert trials.optimizer == "Adam"
    assert any("No optimizer was given" in note for note in trials.notes)


def test_a_healthy_model_has_nothing_to_try() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    report = gf.diagnose(net, drawn(), nn.MSELoss(), steps=6)
    trials = try_remedies(report, net, drawn(), nn.MSELoss(), steps=6)
    assert trials.trials == ()
    assert trials.num_batches == 0


def test_remedies_compose() -> None:
    half = rate_times(0.5)
    both = half + CURE + half
    report, *_ = setting()
    copied = dead_net()
    stepper = torch.optim.SGD(copied.parameters(), 0.4)
    torch.manual_seed(5)
    _, stepped = both.apply(copied, stepper)
    by_hand = dead_net()
    torch.manual_seed(5)
    nn.init.kaiming_normal_(by_hand[0].weight, nonlinearity="relu")
    nn.init.zeros_(by_hand[0].bias)
    assert stepped.param_groups[0]["lr"] == pytest.approx(0.1)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), by_hand.parameters(), strict=True))
    assert both.name.count(" + ") == 2
    assert (both + nothing()).applies(report.causes[0], report.record)
    never = attrs.evolve(half, applies=lambda cause, record: False)
    assert not (both + never).applies(report.causes[0], report.record)
    with pytest.raises(TypeError, match="unsupported operand"):
        both + 3  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"steps": 1}, ValueError, "steps must be a whole number of at least 2, got 1"),
        ({"seeds": 0}, ValueError, "seeds must be a whole number of at least 1, got 0"),
        ({"max_steps": True}, ValueError, "max_steps must be a whole number"),
        ({"budget": -1.0}, ValueError, "budget must be a positive number of seconds"),
        ({"remedies": [clipped]}, RemedyError, "A factory must be called first"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    report, *given = setting()
    with pytest.raises(error, match=match):
        try_remedies(report, *given, **options)


def test_a_report_is_needed() -> None:
    report, *given = setting()
    with pytest.raises(RecordInputError, match="expected a Report, got FlowRecord"):
        try_remedies(report.record, *given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("name", "", "name must be a text that is not empty"),
        ("code", 3, "code must be a text that is not empty"),
        ("apply", "x", "Pass a function of \\(model, optimizer\\) that returns both"),
        ("applies", True, "applies is True, which cannot be called"),
    ],
)
def test_a_remedy_is_checked(field: str, value: Any, match: str) -> None:
    fields = {"name": "a", "words": "b", "code": "c", "apply": lambda model, optimizer: (model, optimizer)}
    with pytest.raises(RemedyError, match=match):
        Remedy(**{**fields, field: value})
