"""Rates that are too high or too low are told with about their factor; those that fit, warm-ups and
fine-tuning with a small one are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import gradflow as gf
from gradflow.detect import asks_for_curves

U, V = gf.IssueType.UNSTABLE, gf.IssueType.VANISHING
Draw = Callable[[], tuple[Tensor, Tensor]]
LOSS = nn.CrossEntropyLoss()


def clusters(shift: float = 0.0) -> Draw:
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(10, 64, generator=g)

    def draw() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 10, (64,), generator=g)
        return centres[y] + torch.randn(64, 64, generator=g) + shift, y

    return draw


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def report(optimizer: Any, model: nn.Module, draw: Draw | None = None, **options: Any) -> gf.Report:
    return gf.diagnose(model, draw or clusters(), LOSS, optimizer=optimizer, **options)


def factor(found: gf.Report, kind: gf.IssueType, name: str) -> float:
    """Return the factor that is told, NaN without; issues of that type without it are of something else."""
    return next(
        (i.metrics[name] for i in found.issues if i.issue_type is kind and name in i.metrics), math.nan
    )


FITTING = [("Adam", 1e-4), ("Adam", 1e-3), ("Adam", 1e-2), ("SGD", 1e-2), ("SGD", 1e-1), ("SGD", 1.0)]


@pytest.mark.parametrize(("name", "rate"), FITTING)
def test_rates_that_fit(name: str, rate: float) -> None:
    model = net()
    found = report(getattr(torch.optim, name)(model.parameters(), rate), model)
    assert found.ok, str(found)
    assert found.record.updates is not None
    assert found.record.updates.curves == ()  # and nothing was spent on them


@pytest.mark.parametrize(
    ("name", "rate", "best"), [("Adam", 1e-8, 1e-3), ("Adam", 1e-6, 1e-3), ("SGD", 1e-5, 0.1)]
)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_rate_that_is_too_low(name: str, rate: float, best: float, scale: float) -> None:
    """Within an order of magnitude of one that trains, over five of them; and whatever the loss's scale."""
    model = net()
    rate = rate if name == "Adam" else rate / scale
    optimizer = getattr(torch.optim, name)(model.parameters(), rate)
    found = gf.diagnose(model, clusters(), lambda y, t: scale * LOSS(y, t), optimizer=optimizer)
    times = factor(found, U, "factor")
    assert 0.1 * best < rate * times * (scale if name == "SGD" else 1.0) < 10 * best
    (issue,) = found.issues
    assert issue.severity is gf.IssueSeverity.MEDIUM
    assert (issue.layer, issue.metrics["best"] >= 64) == ("", True)
    assert "is too low by a factor of about" in issue.description


@pytest.mark.parametrize(("rate", "sick"), [(1e-7, True), (1e-6, True), (2e-3, False), (1e-4, False)])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_rate_that_is_too_low_for_a_model_with_dropout(rate: float, sick: bool, share: float) -> None:
    """A long step down one batch's slope gains less in some steps than in others, as noise comes in."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Dropout(share), nn.Linear(64, 10))
    found = report(torch.optim.Adam(model.parameters(), rate), model)
    assert [(i.issue_type, i.layer) for i in found.issues if i.severity.is_serious] == [(U, "")] * sick


@pytest.mark.parametrize(
    ("name", "rate", "scale", "sick"),
    [
        ("SGD", 0.05, 1e-5, True),
        ("SGD", 5e-4, 1e-4, True),
        ("SGD", 0.05, 1.0, False),
        ("Adam", 1e-3, 1e-5, False),
    ],
)
def test_a_loss_that_is_too_small_for_plain_descent(name: str, rate: float, scale: float, sick: bool) -> None:
    """The rate is a usual one, and no layer gets less than its share: it is the loss that is small."""
    model = net()
    optimizer = getattr(torch.optim, name)(model.parameters(), rate)
    found = gf.diagnose(model, clusters(), lambda y, t: scale * LOSS(y, t), optimizer=optimizer)
    assert found.ok != sick
    if sick:
        (issue,) = found.issues
        assert (issue.issue_type, issue.layer) == (V, "")
        assert 0.01 < rate * scale * issue.metrics["factor"] < 10
        assert "Multiply the loss by about" in issue.recommended_actions[0]


@pytest.mark.parametrize(("name", "rate", "best"), [("Adam", 10.0, 1e-3), ("SGD", 100.0, 0.3)])
def test_a_rate_that_is_too_high(name: str, rate: float, best: float) -> None:
    model = net()
    found = report(getattr(torch.optim, name)(model.parameters(), rate), model)
    times = factor(found, U, "rate_factor")
    assert 0.1 * best < rate / times < 10 * best
    assert found.issues[0].issue_type is U
    assert "is too high by a factor of about" in found.issues[0].description
    assert (
        found.issues[0].recommended_actions[0].startswith(f"Lower the learning rate of {name}: {rate:.3g} to")
    )
    assert found.record.updates is not None
    first = found.record.updates.curves[0]
    assert first.step == 0
    assert first.sharpness > 2
    assert first.actual > 0


def trained() -> tuple[nn.Sequential, torch.optim.Optimizer, Draw]:
    model, draw = net(), clusters()
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        x, y = draw()
        adam.zero_grad()
        LOSS(model(x), y).backward()
        adam.step()
    return model, adam, draw


@pytest.mark.parametrize("rate", [1e-8, 1e-6, 3e-5, 1e-3])
def test_fine_tuning_with_any_small_rate(rate: float) -> None:
    model, _, draw = trained()
    found = report(torch.optim.AdamW(model.parameters(), rate), model, draw)
    assert found.ok, str(found)
    assert math.isnan(factor(found, U, "factor"))


def test_a_trained_model_that_goes_on() -> None:
    model, adam, draw = trained()
    found = report(adam, model, draw)
    assert found.ok, str(found)


@pytest.mark.parametrize("given", [True, False])
def test_a_warm_up(given: bool) -> None:
    model = net()
    adam = torch.optim.AdamW(model.parameters(), 1e-3)
    scheduler = lr_scheduler.LambdaLR(adam, lambda step: (step + 1) / 10**6)
    options: dict[str, Any] = {"scheduler": scheduler} if given else {}
    found = report(adam, model, **options)
    assert found.issues == ()
    assert found.record.updates is not None
    assert found.record.updates.rates[0] == pytest.approx(1e-9)


def test_a_rate_of_zero() -> None:
    model = net()
    (issue,) = report(torch.optim.SGD(model.parameters(), 0.0), model).issues
    assert (issue.issue_type, issue.severity) == (U, gf.IssueSeverity.HIGH)
    assert issue.description.startswith("The learning rate is 0")


def test_steps_that_are_never_applied() -> None:
    model = net()

    def step_fn(model: nn.Module, batch: Any, optimizer: Any) -> None:
        LOSS(model(batch[0]), batch[1]).backward()
        optimizer.zero_grad()
        optimizer.step()

    (issue,) = report(torch.optim.Adam(model.parameters(), 1e-3), model, step_fn=step_fn).issues
    assert issue.severity is gf.IssueSeverity.HIGH
    assert "no step changes a single number" in issue.description


def test_an_optimizer_that_stops_when_it_is_done() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(64, 4)
    batch = x, x[:, :3].argmax(1)

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return LOSS(y, t) + 0.01 * model.weight.square().sum()

    lbfgs = torch.optim.LBFGS(model.parameters(), 1.0, max_iter=200, tolerance_grad=1e-3)
    for _ in range(3):

        def closure() -> Tensor:
            lbfgs.zero_grad()
            value = loss(model(batch[0]), batch[1])
            value.backward()
            return value

        lbfgs.step(closure)
    found = gf.diagnose(model, [batch] * 6, loss, optimizer=lbfgs)
    assert found.record.updates is not None
    assert all((u.rms == 0).all() for u in found.record.updates.parameters)
    assert found.ok, str(found)


def test_a_gradient_that_is_clipped_away() -> None:
    model = net()
    found = report(torch.optim.SGD(model.parameters(), 0.1), model, clip=1e-6)
    assert "Clipping leaves" in next(i for i in found.issues if i.issue_type is V).description
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    assert report(adam, model, clip=1e-6).ok  # its steps have a size of their own


@pytest.mark.parametrize("rate", [1e-5, 1e-3])
def test_updates_that_bfloat16_swallows(rate: float) -> None:
    model, draw = net().bfloat16(), clusters()

    def short() -> tuple[Tensor, Tensor]:
        x, y = draw()
        return x.bfloat16(), y

    adam = torch.optim.AdamW(model.parameters(), rate)
    found = gf.diagnose(model, short, lambda y, t: LOSS(y.float(), t), optimizer=adam)
    told = [i for i in found.issues if "unchanged" in i.metrics]
    assert bool(told) == (rate < 1e-4)
    if told:
        assert told[0].metrics["unchanged"] > 0.9
        assert "bfloat16 rounds away" in told[0].description


def test_a_step_that_makes_nan_of_finite_gradients() -> None:
    model, draw = net().half(), clusters()

    def short() -> tuple[Tensor, Tensor]:
        x, y = draw()
        return x.half(), y

    def told(**options: Any) -> list[gf.Issue]:
        adam = torch.optim.Adam(model.parameters(), 1e-3, **options)
        found = gf.diagnose(model, short, lambda y, t: LOSS(y.float(), t), optimizer=adam)
        return [i for i in found.issues if i.severity >= gf.IssueSeverity.MEDIUM]

    (issue,) = told()
    assert issue.issue_type is gf.IssueType.NUMERICAL
    assert issue.metrics["made_by_step"] == 0
    assert "The step of Adam after step 0 made it" in issue.description
    assert "Its ε, 1e-08, is 0 in float16" in issue.description
    assert "eps=1e-4" in issue.recommended_actions[1]
    assert told(eps=1e-4) == []


def test_moments_that_are_cold_where_the_model_is_not() -> None:
    """A training that is resumed without the optimizer's state, at the rate of its middle."""
    model, _, draw = trained()
    resumed = torch.optim.Adam(model.parameters(), 0.1)
    found = report(resumed, model, draw)
    issue = next(i for i in found.issues if i.issue_type is U)
    assert "The optimizer's state is new" in issue.description
    assert any("Load the optimizer's state" in action for action in issue.recommended_actions)


def test_what_asks_for_curves() -> None:
    model = net()
    assert not asks_for_curves(gf.analyze(model, clusters(), LOSS))
    fitting = gf.analyze(model, clusters(), LOSS, optimizer=torch.optim.Adam(model.parameters(), 1e-3))
    assert not asks_for_curves(fitting)
    high = gf.analyze(model, clusters(), LOSS, optimizer=torch.optim.SGD(model.parameters(), 100.0))
    assert asks_for_curves(high)


@pytest.mark.parametrize(
    ("epsilon", "rate", "sick"), [(1.0, 1e-3, True), (1.0, 0.3, False), (1e-8, 1e-3, False)]
)
def test_an_epsilon_that_sets_the_steps(epsilon: float, rate: float, sick: bool) -> None:
    """With a rate that fits it, as some recipes have, it is plain descent."""
    model = net()
    found = report(torch.optim.Adam(model.parameters(), rate, eps=epsilon), model)
    told = [i for i in found.issues if i.issue_type is V and "The ε of Adam" in i.description]
    assert bool(told) == sick


class _Words(nn.Module):
    """A bag of words; its tables are drawn with variance one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(32, 16), nn.Embedding(8, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens).mean(1) @ self.out.weight.T / 4


@pytest.mark.parametrize(
    ("dtype", "rate", "sick"),
    [(torch.bfloat16, 5e-4, True), (torch.float32, 5e-4, False), (torch.bfloat16, 1e-2, False)],
)
def test_steps_shorter_than_what_bfloat16_keeps_of_most_weights(
    dtype: torch.dtype, rate: float, sick: bool
) -> None:
    g, model = torch.Generator().manual_seed(1), _Words().to(dtype)

    def draw() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 32, (64, 8), generator=g)
        return tokens, tokens[:, 0] % 8

    adam = torch.optim.Adam(model.parameters(), rate)
    found = gf.diagnose(model, draw, lambda y, t: LOSS(y.float(), t), optimizer=adam)
    told = [i for i in found.issues if i.issue_type is gf.IssueType.NUMERICAL]
    assert [i.severity for i in told] == ([gf.IssueSeverity.MEDIUM] if sick else [])


class Product(nn.Module):
    """A layer that stays, and a product of two narrow ones beside it, of which the second begins at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Linear(inputs, 4, bias=False), nn.Linear(4, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


def begins_at_zero(how: str) -> nn.Module:
    if how == "adapters":
        return nn.Sequential(Product(8, 32), nn.ReLU(), Product(32, 4))
    head = nn.Linear(32, 4)
    nn.init.zeros_(head.weight)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), head)


@pytest.mark.parametrize("how", ["head", "adapters"])
@pytest.mark.parametrize(
    ("make", "rate", "slow"),
    [
        (torch.optim.SGD, 1e-8, True),
        (torch.optim.Adam, 1e-7, True),
        (torch.optim.SGD, 1e-1, False),
        (torch.optim.Adam, 1e-3, False),
    ],
)
def test_a_rate_that_leaves_what_begins_at_zero_there_is_what_explains_it(
    how: str, make: Callable[..., torch.optim.Optimizer], rate: float, slow: bool
) -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4)
    batches = [(x, x @ w) for x in torch.randn(20, 32, 8)]
    model = begins_at_zero(how)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=rate)
    report = gf.diagnose(model, batches, nn.MSELoss(), optimizer=optimizer)
    told = [c for c in report.causes if c.issues[0].severity >= gf.IssueSeverity.MEDIUM]
    if not slow:
        assert all(c.layer for c in told)
        return
    (cause,) = told
    assert (cause.layer, cause.issue_type) == ("", U)
    assert cause.issues[0].metrics["rate"] == rate
    assert len(cause.issues) > 1
