"""What looks ill in a model that learns, or whose loss only adds up: excused, and told where it does not."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import bottleneck, dead, detect, exploding, saturation, vanishing
from gradflow.records import FlowRecord, IssueSeverity, IssueType, KnowledgeRecord
from tests.detect.builders import STEPS, Layer, activation, flow_record
from tests.detect.flow.test_bottleneck import hourglass
from tests.detect.flow.test_exploding import growing

LOW, MEDIUM, INFO = IssueSeverity.LOW, IssueSeverity.MEDIUM, IssueSeverity.INFO
FALLING, FLAT = np.linspace(1.0, 0.2, STEPS), np.full(STEPS, 1.0)


def knowing(record: FlowRecord, left: float, losses: np.ndarray, silent: float = np.nan) -> FlowRecord:
    """Return a record whose loss goes as told, and that has a part of what guesses cost left."""
    loss = float(losses[-1])
    known = KnowledgeRecord(step=STEPS - 1, loss=loss, shuffled=loss / left, silent=silent)
    return attrs.evolve(record, losses=losses, knowledge=known)


@pytest.mark.parametrize(
    ("left", "losses", "growth", "severity"),
    [
        (0.2, FALLING, 2.2, LOW),
        (0.6, FALLING, 2.2, MEDIUM),
        (0.2, FALLING, 3.0, IssueSeverity.HIGH),
    ],
)
def test_growth_that_the_steps_cope_with(
    left: float, losses: np.ndarray, growth: float, severity: IssueSeverity
) -> None:
    issues = detect(knowing(growing(8, growth), left, losses), exploding())
    assert max(issue.severity for issue in issues) is severity


@pytest.mark.parametrize(("silent", "severity"), [(500.0, LOW), (3.0, MEDIUM)])
def test_growth_in_a_model_whose_outputs_have_the_right_level(silent: float, severity: IssueSeverity) -> None:
    issues = detect(knowing(growing(8, 2.2), 0.5, FLAT, silent), exploding())
    assert max(issue.severity for issue in issues) is severity


@pytest.mark.parametrize(
    ("grads", "severity"),
    [
        ([300.0, 299, 297, 293, 286, 275, 260, 240, 215, 180, 140, 95, 50, 15, 4, 1], LOW),
        ([1.46**k for k in range(15, -1, -1)], MEDIUM),
    ],
)
def test_calls_whose_gradient_adds_up_and_does_not_multiply(
    grads: Sequence[float], severity: IssueSeverity
) -> None:
    calls = ["cell", *(f"cell@{i}" for i in range(1, len(grads)))]
    layers = [Layer(name=name, grad=grad) for name, grad in zip(calls, grads, strict=True)]
    (issue,) = detect(flow_record(*layers), exploding())
    assert issue.severity is severity


@pytest.mark.parametrize(
    ("left", "losses", "severity"), [(0.35, FALLING, INFO), (0.35, FLAT, MEDIUM), (0.6, FALLING, MEDIUM)]
)
def test_a_single_number_that_comes_to_tell_what_is_asked(
    left: float, losses: np.ndarray, severity: IssueSeverity
) -> None:
    (issue,) = detect(knowing(hourglass(1, rank=1.0, out=20), left, losses), bottleneck())
    assert issue.severity is severity


@pytest.mark.parametrize(("left", "severity"), [(0.2, LOW), (0.6, MEDIUM)])
def test_a_rectified_waist_of_a_model_that_knows(left: float, severity: IssueSeverity) -> None:
    used = activation("waist:relu", "waist", "relu", "rectifier", num_units=3)
    record = hourglass(3, op="relu", activations=[used])
    issues = {issue.layer: issue for issue in detect(knowing(record, left, FLAT), bottleneck())}
    assert issues["waist"].severity is severity


@pytest.mark.parametrize(
    ("share", "left", "losses", "passed", "severity"),
    [
        (0.6, 0.4, FALLING, 1.0, LOW),
        (0.6, 0.8, FALLING, 1.0, MEDIUM),
        (0.6, 0.4, FLAT, 1.0, MEDIUM),
        (0.6, 0.4, FALLING, np.linspace(1.0, 0.1, STEPS), MEDIUM),
        (0.9, 0.4, FALLING, 1.0, IssueSeverity.HIGH),
    ],
)
def test_a_softmax_that_is_sharp_by_design(
    share: float, left: float, losses: np.ndarray, passed: object, severity: IssueSeverity
) -> None:
    used = activation("fc:softmax", "fc", "softmax", "softmax", saturated_share=np.full(STEPS, share))
    record = flow_record(Layer(name="fc", op="softmax", grad=passed), Layer(name="head"), activations=[used])
    (issue,) = detect(knowing(record, left, losses), saturation())
    assert issue.severity is severity


# --------------------------------------------------------------------------------- on models


class Weighed(nn.Module):
    """Two heads, and how the loss weighs them: a parameter that is given out as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 32)
        self.large, self.small = nn.Linear(32, 1), nn.Linear(32, 1)
        self.weights = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.relu(self.trunk(x))
        return self.large(h)[:, 0], self.small(h)[:, 0], self.weights


def test_an_output_that_is_a_bare_parameter_takes_nothing_from_the_others() -> None:
    """The gradient of the weights of two losses is as large as these; that of the heads need not be."""
    torch.manual_seed(0)

    def batch() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = torch.randn(64, 8)
        return x, (300 * x[:, 0] * x[:, 1], (x[:, 2] > 0).float())

    def loss(out: tuple[Tensor, Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        large, small = F.mse_loss(out[0], target[0]), F.binary_cross_entropy_with_logits(out[1], target[1])
        return (torch.exp(-out[2]) * torch.stack([large, 0.01 * small]) + out[2]).sum()

    model = Weighed()
    report = gf.diagnose(model, batch, loss, optimizer=torch.optim.Adam(model.parameters(), 1e-3), seed=0)
    assert not any(i.issue_type is IssueType.VANISHING for i in report.issues)


@pytest.mark.parametrize(("rate", "sick"), [(3e-2, False), (1e-4, True)])
def test_scores_that_start_too_large_and_are_put_right(rate: float, sick: bool) -> None:
    """A model trained to be sure, on new data: loud at first, and soon right again."""
    torch.manual_seed(1)
    centres = torch.randn(6, 32)

    def batch(shift: int = 0) -> tuple[Tensor, Tensor]:
        y = torch.randint(6, (64,))
        return centres[y] + 0.2 * torch.randn(64, 32), (y + shift * (y < 3)) % 6

    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 6))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight.mul_(1.5)  # type: ignore[operator]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, lambda: batch(1), nn.CrossEntropyLoss(), optimizer=optimizer, seed=0)
    loud = [i for i in report.issues if i.issue_type is IssueType.EXPLODING and i.layer == "2"]
    assert [i.severity >= MEDIUM for i in loud] == [sick]


# --------------------------------------------------------------------------------- what came frozen


class Cleaner(nn.Module):
    """A net of which a frozen one behind it takes the features, or which it follows."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.features = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        for layer in (self.features[0], self.features[2]):
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
        self.features.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(255 * self.net(x))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_frozen_part_behind_all_that_learns_multiplies(seed: int, frozen: bool) -> None:
    """A factor and a frozen net behind are a factor on the loss; between layers that learn they are not."""
    torch.manual_seed(seed)
    model = Cleaner(frozen)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 16)
        return x + 0.3 * torch.randn_like(x), x

    def loss(out: Tensor, x: Tensor) -> Tensor:
        return F.l1_loss(out, model.features(255 * x).detach())

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    report = gf.diagnose(model, batch, loss, optimizer=optimizer, seed=0)
    grown = any(i.issue_type is IssueType.EXPLODING and i.severity >= MEDIUM for i in report.issues)
    assert grown == (not frozen)


@pytest.mark.parametrize(("frozen", "severity"), [(True, LOW), (False, MEDIUM)])
def test_units_of_a_layer_that_came_frozen(frozen: bool, severity: IssueSeverity) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    with torch.no_grad():
        model[1].bias[:28] = -50.0  # type: ignore[index]
    model[1].requires_grad_(not frozen)
    record = gf.analyze(model, lambda: torch.randn(64, 8), lambda y: (y - 1).square().mean(), steps=4)
    (issue,) = [i for i in detect(record, dead()) if i.metrics.get("never_fired")]
    assert issue.severity is severity


# ------------------------------------------------------------------------- what is sure, and right


@pytest.mark.parametrize("wrong", [False, True])
def test_a_mask_that_is_sure_and_right(wrong: bool) -> None:
    """Most pixels are far from the border; the same with targets that contradict what it is sure of."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[30.0, 0.0]]))
        model.bias.zero_()

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(256, 2)
        return x, ((x[:, :1] < 0) if wrong else (x[:, :1] + 0.3 * torch.randn(256, 1) > 0)).float()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(out)
        overlap = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        return F.binary_cross_entropy_with_logits(out, y) + overlap

    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    record = gf.analyze(model, batch, loss, steps=12, optimizer=optimizer, seed=0)
    (used,) = [i for i in detect(record, saturation()) if i.metrics.get("op") == "sigmoid"]
    assert used.severity.is_serious == wrong


@pytest.mark.parametrize(("left", "losses", "severity"), [(0.2, FALLING, LOW), (0.6, FALLING, MEDIUM)])
def test_a_loss_of_gradient_that_the_steps_cope_with(
    left: float, losses: np.ndarray, severity: IssueSeverity
) -> None:
    layers = [Layer(name="a", grad=2e-4), Layer(name="b", grad=3e-4), Layer(name="c", grad=1.0)]
    issues = detect(knowing(flow_record(*layers), left, losses), vanishing())
    assert max(issue.severity for issue in issues) is severity


class Kernel(nn.Module):
    """Codes of two numbers, of which every pair of samples is compared; or codes that are widened again."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
        self.scale, self.pairs = nn.Parameter(torch.zeros(())), pairs
        self.out = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48))

    def forward(self, x: Tensor) -> Tensor:
        code = self.net(x)
        return self.scale.exp() * (-(torch.cdist(code, code) ** 2)).exp() if self.pairs else self.out(code)


def test_a_number_for_every_pair_of_samples_is_no_width() -> None:
    torch.manual_seed(0)
    model, x = Kernel(pairs=True), torch.randn(48, 8)
    del model.out
    target = torch.randn(48, 48)
    record = gf.analyze(model, [x] * 3, lambda k: (k - target).square().mean(), steps=3)
    assert not [i for i in detect(record, bottleneck()) if i.layer == "net.2"]
    model = Kernel(pairs=False)
    record = gf.analyze(model, [x] * 3, lambda k: (k - target).square().mean(), steps=3)
    assert [i for i in detect(record, bottleneck()) if i.layer == "net.2"]
