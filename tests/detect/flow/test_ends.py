"""Verdicts on what stands between the last layers and the loss, on sick models and on their healthy likes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import gradflow as gf
from gradflow.records import IssueType

SERIOUS = {"CRITICAL", "HIGH", "MEDIUM"}


def told(
    model: nn.Module, batches: object, loss: object, rate: float = 1e-3, optimizer: Optimizer | None = None
) -> list[tuple[IssueType, str]]:
    """Return the serious verdicts, as types and layers."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), rate)
    report = gf.diagnose(model, batches, loss, optimizer=optimizer, seed=0)  # type: ignore[arg-type]
    return [(i.issue_type, i.layer) for i in report.issues if i.severity.value in SERIOUS]  # type: ignore[misc]


# ------------------------------------------------------------------------------------- too loud


def classes(number: int, width: int = 64) -> Callable[[], tuple[Tensor, Tensor]]:
    centres = torch.randn(number, width)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(number, (32,))
        return centres[y] + torch.randn(32, width), y

    return batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("std", "expected"), [(1.0, [(IssueType.EXPLODING, "head")]), (0.125, [])])
def test_scores_that_start_too_large(reduction: str, std: float, expected: list[object]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential()
    for name, layer in {
        "body": nn.Linear(64, 64),
        "act": nn.GELU(),
        "norm": nn.LayerNorm(64),
        "head": nn.Linear(64, 12),
    }.items():
        model.add_module(name, layer)
    nn.init.normal_(model.head.weight, std=std)  # type: ignore[union-attr, arg-type]
    assert told(model, classes(12), nn.CrossEntropyLoss(reduction=reduction), 1e-4) == expected


def test_scores_that_are_large_because_the_model_has_learned() -> None:
    torch.manual_seed(2)
    batch, model = classes(6), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        model[2].weight.mul_(20.0)  # type: ignore[union-attr, operator]
    assert told(model, batch, nn.CrossEntropyLoss()) == []


class Margin(nn.Module):
    """Cosines to the centres of the classes, times a scale, with a margin on the one of the label."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, number))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        cosine = F.normalize(x) @ F.normalize(self.kernel, dim=0)
        return 16.0 * (cosine - 0.3 * F.one_hot(y, cosine.shape[1]))


class Face(nn.Module):
    """An embedder with two numbers to a sample, and a margin head."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        self.margin = Margin(2, number)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.margin(self.body(x), y)


@pytest.mark.parametrize(("rate", "sick"), [(3e-3, False), (1e-6, True)])
def test_a_scale_by_design_that_the_steps_learn_under(rate: float, sick: bool) -> None:
    torch.manual_seed(5)
    draw = classes(6)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, y = draw()
        return (x, y), y

    found = told(Face(6), batch, F.cross_entropy, rate)
    assert ((IssueType.EXPLODING, "margin") in found) == sick
    assert sick or not found


# ------------------------------------------------------------------------------------- not heard


class Scaled(nn.Module):
    """A regression whose output is multiplied by a scale that comes with the batch."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.body, self.out, self.times = nn.Linear(8, 32), nn.Linear(32, 4), times

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.out(F.gelu(self.body(x)))
        for _ in range(self.times):
            y = y * scale
        return y


@pytest.mark.parametrize(("scale", "times"), [(1e-7, 1), (1e-2, 3)])
def test_a_scale_behind_the_last_layer(scale: float, times: int) -> None:
    torch.manual_seed(3)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(32, 8)
        return (x, torch.full((32, 1), scale)), x[:, :4].tanh()

    found = told(Scaled(times), batch, nn.MSELoss())
    assert (IssueType.VANISHING, "out") in found


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_a_scale_that_the_loss_hears(scale: float) -> None:
    torch.manual_seed(4)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(32, 8)
        return (x, torch.full((32, 1), scale)), scale * x[:, :4].tanh()

    assert told(Scaled(), batch, nn.MSELoss(), 3e-3) == []


def test_far_targets_are_heard() -> None:
    """Outputs of size one and targets of ten thousand: little leverage, and nothing between that takes it."""
    torch.manual_seed(5)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(32, 8)
        return (x, torch.ones(32, 1)), 1e4 * (2 + x[:, :4].tanh())

    assert not [v for v in told(Scaled(), batch, nn.MSELoss()) if v[0] is IssueType.VANISHING]


# ------------------------------------------------------------------------------------- all alike


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(one), self.encoder(two)


def views() -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 16)
    return x + 0.1 * torch.randn(64, 16), x + 0.1 * torch.randn(64, 16)


def pulled(out: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(out[0], out[1])


def matched(out: tuple[Tensor, Tensor]) -> Tensor:
    one, two = (F.normalize(z, dim=-1) for z in out)
    return F.cross_entropy(one @ two.T / 0.2, torch.arange(len(one)))


@pytest.mark.parametrize(("loss", "sick"), [(pulled, True), (matched, False)])
def test_views_that_are_pulled_together(loss: Callable[..., Tensor], sick: bool) -> None:
    torch.manual_seed(6)
    model = Views()
    assert told(model, views, loss) == []  # not yet
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        loss(model(*views())).backward()
        optimizer.step()
    found = told(model, views, loss, optimizer=optimizer)
    assert found == ([(IssueType.BOTTLENECK, "encoder.2")] if sick else [])


class Likeness(Views):
    """One number for a pair: how alike the embeddings of both are."""

    def forward(self, one: Tensor, two: Tensor) -> Tensor:  # type: ignore[override]
        return F.cosine_similarity(self.encoder(one), self.encoder(two))


@pytest.mark.parametrize(("apart", "sick"), [(0.0, True), (0.5, False)])
def test_pairs_that_are_all_to_be_alike(apart: float, sick: bool) -> None:
    torch.manual_seed(6)
    centres = torch.randn(6, 16)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind = torch.randint(6, (48,))
        unlike = torch.rand(48) < apart
        one, two = (centres[k] + 0.5 * torch.randn(48, 16) for k in (kind, (kind + unlike) % 6))
        return (one, two), (~unlike).float()

    found = told(Likeness(), batch, nn.MSELoss(), 2e-2)
    assert found == ([(IssueType.BOTTLENECK, "encoder.2")] if sick else [])


# ------------------------------------------------------------------------------------- knowing


def test_a_trained_model_may_be_sure() -> None:
    """Sigmoid outputs at their ends: right after training, and wrong on other targets."""
    torch.manual_seed(7)
    x = torch.randn(256, 10)
    y = (x[:, :1] > 0).float()
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        F.binary_cross_entropy(model(x), y).backward()
        optimizer.step()
    right = gf.diagnose(model, lambda: (x, y), nn.BCELoss(), optimizer=optimizer)
    assert not [i for i in right.issues if i.severity.value in SERIOUS]
    other = (x[:, 1:2] > 0).float()
    wrong = gf.diagnose(model, lambda: (x, other), nn.BCELoss())
    assert [i.issue_type for i in wrong.issues if i.severity.value in SERIOUS]


# ------------------------------------------------------------------------------ one column of several


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("rate", [1e-3, 1e-2])
@pytest.mark.parametrize(
    ("scale", "sick"), [((1.0, 1.0, 3000.0, 1.0), True), ((1.0, 2.0, 5.0, 1.0), False), ((1.0,) * 4, False)]
)
def test_targets_of_one_column_are_far_off(
    scale: tuple[float, ...], sick: bool, rate: float, width: int
) -> None:
    torch.manual_seed(0)
    mix, size = torch.randn(6, 4), torch.tensor(scale)
    model = nn.Sequential(
        nn.Linear(6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 4)
    )

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6)
        return x, (x @ mix).tanh() * size - (size > 100) * size

    assert ((IssueType.EXPLODING, "4") in told(model, batch, nn.MSELoss(), rate)) == sick


@pytest.mark.parametrize("asked", [2, 1])
def test_columns_that_no_target_asks_for(asked: int) -> None:
    """As of actions that were not taken, whose values have no slope."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5))
    loss = lambda q, y: F.smooth_l1_loss(q[:, :asked], y[:, :asked])  # noqa: E731
    found = told(model, lambda: (torch.randn(64, 6), torch.randn(64, 2)), loss)
    assert IssueType.EXPLODING not in {kind for kind, _ in found}
