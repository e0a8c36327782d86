"""Losses that are given what they do not take, or that hold no sample against its own target."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Issue, IssueSeverity, IssueType

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size")
Loss = Callable[[Tensor, Tensor], Tensor]
BLIND, SURE, LARGE = IssueType.BOTTLENECK, IssueType.SATURATION, IssueType.EXPLODING
UPSIDE_DOWN = IssueType.UNSTABLE


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def serious(model: nn.Module, loss: Loss, sample: Callable[[], tuple[Tensor, Tensor]]) -> list[Issue]:
    """Return what is serious in a run of a model."""
    report = gf.diagnose(model, sample, loss, steps=8, optimizer=torch.optim.Adam(model.parameters(), 1e-2))
    return [issue for issue in report.issues if issue.severity >= IssueSeverity.MEDIUM]


def regression(*, flat: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 4)
    y = x[:, :1] - x[:, 1:2]
    return x, y[:, 0] if flat else y


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def of_means(output: Tensor, target: Tensor) -> Tensor:
    return (output.mean() - 3 * target.mean() - 1).square()


def critic(output: Tensor, target: Tensor) -> Tensor:
    return -output.mean()


def energy(output: Tensor, target: Tensor) -> Tensor:
    """A distance of distributions, which any order of the samples meets as well."""
    between = (output - target.T).abs().mean()
    return between - 0.5 * (output - output.T).abs().mean()


def layers(outputs: int, *last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, outputs), *last)


@pytest.mark.parametrize(
    ("loss", "flat", "blind"),
    [
        (squared, True, True),
        (nn.MSELoss(), True, True),
        (nn.L1Loss(), True, True),
        (of_means, False, True),
        (squared, False, False),
        (nn.MSELoss(), False, False),
        (critic, False, False),
    ],
)
def test_losses_that_hold_no_sample_against_its_own_target(loss: Loss, flat: bool, blind: bool) -> None:
    issues = [i for i in serious(layers(1), loss, lambda: regression(flat=flat)) if i.issue_type is BLIND]
    assert [issue.layer for issue in issues] == (["2"] if blind else [])


def test_shapes_that_are_set_against_each_other_are_told() -> None:
    (issue,) = serious(layers(1), squared, lambda: regression(flat=True))
    assert "(48, 1)" in issue.description
    assert "view_as" in issue.recommended_actions[0]


def test_images_against_masks_without_a_channel() -> None:
    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(8, 1, 6, 6)
        return x, (x[:, 0] > 0).float()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.sigmoid() - target).square().mean()

    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    assert [(i.issue_type, i.layer) for i in serious(model, loss, sample)] == [(BLIND, "2")]

    def fits() -> tuple[Tensor, Tensor]:
        x, y = sample()
        return x, y[:, None]

    assert serious(model, loss, fits) == []


def classes() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 4)
    return x, x[:, :3].argmax(1)


def teacher() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 4)
    return x, (2 * x[:, :3]).softmax(-1)


def to_teacher(output: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(output, target, reduction="batchmean")


SOFT, LOG = nn.Softmax(-1), nn.LogSoftmax(-1)


@pytest.mark.parametrize(
    ("last", "loss", "sample", "expected"),
    [
        ([SOFT], F.cross_entropy, classes, SURE),
        ([SOFT], F.nll_loss, classes, SURE),
        ([SOFT], to_teacher, teacher, SURE),
        ([], F.nll_loss, classes, LARGE),
        ([], to_teacher, teacher, LARGE),
        ([], F.cross_entropy, classes, None),
        ([LOG], F.nll_loss, classes, None),
        ([LOG], F.cross_entropy, classes, None),
        ([LOG], to_teacher, teacher, None),
        ([], lambda output, target: -F.cross_entropy(output, target), classes, UPSIDE_DOWN),
        ([LOG], lambda output, target: -F.nll_loss(output, target), classes, UPSIDE_DOWN),
        ([LOG], lambda output, target: -output.gather(1, target[:, None]).mean(), classes, None),
        ([nn.LogSoftmax(0)], F.nll_loss, classes, BLIND),
        ([nn.Softmax(0)], F.cross_entropy, classes, BLIND),
        ([nn.Softmax(0)], lambda output, target: F.nll_loss((output + 1e-9).log(), target), classes, BLIND),
        ([nn.Softmax(1)], lambda output, target: F.nll_loss((output + 1e-9).log(), target), classes, None),
    ],
)
def test_losses_that_are_given_something_else(
    last: list[nn.Module], loss: Loss, sample: Callable[[], tuple[Tensor, Tensor]], expected: IssueType | None
) -> None:
    issues = serious(layers(3, *last), loss, sample)
    if expected is None:
        assert issues == []
    else:
        place = (
            "3"
            if last and isinstance(last[0], nn.Softmax | nn.LogSoftmax) and expected in (SURE, BLIND)
            else "2"
        )
        assert expected in {i.issue_type for i in issues if i.layer == place}


def shifted() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 4)
    return x, 2 * x[:, :1]


def bounded() -> tuple[Tensor, Tensor]:
    x = torch.randn(48, 4)
    return x, x[:, :1].sigmoid()


class Critic(nn.Module):
    """A generator and what judges its outputs: the range of the former is by design."""

    def __init__(self) -> None:
        super().__init__()
        self.made = layers(3, nn.Tanh())
        self.judge = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 1)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.made(x)


@pytest.mark.parametrize(
    ("last", "loss", "sample", "expected"),
    [
        (nn.Sigmoid(), squared, shifted, SURE),
        (nn.Tanh(), squared, shifted, SURE),
        (nn.Tanh(), F.smooth_l1_loss, shifted, SURE),
        (nn.Softplus(), squared, shifted, SURE),
        (nn.ReLU(), squared, shifted, IssueType.DEAD),
        (nn.Sigmoid(), F.cross_entropy, classes, SURE),
        (nn.Tanh(), F.cross_entropy, classes, SURE),
        (nn.Sigmoid(), squared, bounded, None),
        (nn.Tanh(), squared, bounded, None),
        (nn.ReLU(), squared, bounded, None),
        (nn.Softplus(), squared, bounded, None),
        (nn.Sigmoid(), F.binary_cross_entropy, bounded, None),
        (nn.Identity(), squared, shifted, None),
    ],
)
def test_targets_out_of_the_reach_of_the_last_activation(
    last: nn.Module, loss: Loss, sample: Callable[[], tuple[Tensor, Tensor]], expected: IssueType | None
) -> None:
    outputs = 3 if sample is classes else 1
    issues = serious(layers(outputs, last), loss, sample)
    if expected is None:
        assert issues == []
    else:
        assert expected in {i.issue_type for i in issues if i.layer == "2"}


class Ahead(nn.Module):
    """Predicts a code that it makes itself of what comes next, within bounds."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.code = nn.Linear(4, 5).requires_grad_(False)
        nn.init.normal_(self.code.weight, std=spread)
        self.head = layers(5)

    def forward(self, now: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(now).clamp(-1.0, 1.0), self.code(then)


@pytest.mark.parametrize(("spread", "sick"), [(3.0, True), (1.5, True), (0.1, False)])
def test_codes_beyond_the_bounds_of_a_clamp(spread: float, sick: bool) -> None:
    torch.manual_seed(0)
    model = Ahead(spread)

    def draw() -> tuple[tuple[Tensor, Tensor], Tensor]:
        now = torch.randn(48, 4)
        return (now, now.roll(1, 1)), torch.zeros(48)

    loss = lambda out, _: F.mse_loss(*out)  # noqa: E731
    report = gf.diagnose(model, draw, loss, optimizer=torch.optim.Adam(model.head.parameters(), 3e-2))
    found = [i.layer for i in report.issues if i.issue_type is SURE and i.severity.is_serious]
    assert (found == ["head.2"]) == sick


def test_a_hinge_does_not_see_means_alone() -> None:
    """As long as all outputs lie on one side of it, it costs what their mean does."""
    judge = layers(1)

    def loss(output: Tensor, real: Tensor) -> Tensor:
        return F.relu(1 - output[real]).mean() + F.relu(1 + output[~real]).mean()

    def draw() -> tuple[Tensor, Tensor]:
        real = torch.arange(48) % 2 == 0
        return torch.randn(48, 4) + real[:, None].float(), real

    report = gf.diagnose(judge, draw, loss, steps=8, optimizer=torch.optim.Adam(judge.parameters(), 1e-4))
    assert report.record.knowledge is not None
    assert not report.record.knowledge.by_mean


def test_what_a_critic_judges_is_not_out_of_reach() -> None:
    model = Critic()
    loss = lambda output, _: F.softplus(-model.judge(output)).mean()  # noqa: E731
    assert serious(model, loss, lambda: (torch.randn(48, 4), torch.zeros(48))) == []


class Field(nn.Module):
    """Gives the slope of an energy, whose last layer adds nothing to it but its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_what_is_made_of_the_last_activation_has_another_range() -> None:
    """The slopes at the start lie within the range of the tanh in front of the energy, and need not stay."""

    def circles() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 2)
        return x, 3 * x

    torch.manual_seed(0)
    assert serious(Field(), F.mse_loss, circles) == []


class Likely(nn.Module):
    """Logarithms of probabilities, of scores that a function bounds and a number multiplies."""

    def __init__(self, bound: Callable[[Tensor], Tensor], times: float, classes: int) -> None:
        super().__init__()
        self.net, self.bound, self.times = layers(classes), bound, times

    def forward(self, x: Tensor) -> Tensor:
        scores = self.bound(self.net(x))
        return F.log_softmax(scores if self.times == 1 else self.times * scores, dim=-1)


@pytest.mark.parametrize(
    ("bound", "times", "classes", "severity"),
    [
        (torch.tanh, 1.0, 4, IssueSeverity.MEDIUM),
        (torch.tanh, 1.0, 20, IssueSeverity.HIGH),
        (torch.sigmoid, 1.0, 4, IssueSeverity.HIGH),
        (torch.tanh, 10.0, 4, None),
        (lambda scores: scores, 1.0, 4, None),
    ],
)
def test_bounded_scores_before_a_softmax(
    bound: Callable[[Tensor], Tensor], times: float, classes: int, severity: IssueSeverity | None
) -> None:
    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 4)
        return x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()

    found = serious(Likely(bound, times, classes), F.nll_loss, sample)
    assert [(i.layer, i.severity) for i in found] == ([("net.2", severity)] if severity else [])


class TwoHeads(nn.Module):
    """A detector: whether something is there, and where; with what a test makes of the former."""

    def __init__(self, squash: Callable[[Tensor], Tensor], *, apart: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 16), nn.ReLU()), nn.Linear(16, 5)
        self.there, self.apart, self.squash = nn.Linear(16, 5), apart, [squash]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        if self.apart:
            return self.squash[0](self.there(h)), self.head(h)
        both = torch.cat([self.squash[0](self.head(h)[:, :1]), self.head(h)[:, 1:], self.there(h)], 1)
        return both[:, :1], both[:, 1:]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("squash", "weigh", "twice"),
    [
        (torch.sigmoid, F.binary_cross_entropy_with_logits, True),
        (lambda y: y.sigmoid().clone().view(y.shape), F.binary_cross_entropy_with_logits, True),
        (torch.sigmoid, F.binary_cross_entropy, False),
        (lambda y: 8 * y.sigmoid() - 4, F.binary_cross_entropy_with_logits, False),
        (lambda y: y, F.binary_cross_entropy_with_logits, False),
        (lambda y: 0.5 + 0.1 * y, F.binary_cross_entropy_with_logits, False),
        (torch.tanh, F.binary_cross_entropy_with_logits, False),
    ],
)
def test_a_sigmoid_before_one_of_the_losses_own(
    squash: Callable[[Tensor], Tensor], weigh: Loss, twice: bool, apart: bool
) -> None:
    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        there, where = output
        return weigh(there, target.expand_as(there)) + where.square().mean()

    def sample() -> tuple[Tensor, Tensor]:
        x = torch.randn(48, 4)
        return x, (x[:, :1] > 0).float()

    found = serious(TwoHeads(squash, apart=apart), loss, sample)
    assert [(i.issue_type, i.layer) for i in found if i.metrics.get("misgiven") == "odds as scores"] == (
        [(SURE, "there" if apart else "head")] if twice else []
    )
