"""Losses whose masks leave nothing to choose among: told once, at what is alike or at the last layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf

F = nn.functional
Loss = Callable[[Tensor, Tensor], Tensor]
DEAD, BOTTLENECK = gf.IssueType.DEAD, gf.IssueType.BOTTLENECK


def written_out(scores: Tensor, target: Tensor) -> Tensor:
    return (scores.logsumexp(1) - scores.gather(1, target[:, None])[:, 0]).mean()


def in_two(scores: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(scores, dim=-1), target)


class Towers(nn.Module):
    """Users by number and items by their text; items that are too like the right one are masked."""

    def __init__(self, common: float, fill: float, above: float = 0.95) -> None:
        super().__init__()
        torch.manual_seed(3)
        vectors = torch.randn(40, 24) + common * torch.randn(24)
        self.user, self.text = nn.Embedding(40, 24), nn.Embedding.from_pretrained(vectors)
        self.item, self.fill, self.above = nn.Linear(24, 24), fill, above

    def forward(self, number: Tensor) -> Tensor:
        one = F.normalize(self.user(number), dim=-1)
        two = F.normalize(self.item(self.text(number)), dim=-1)
        same = (two @ two.T > self.above) & ~torch.eye(len(number), dtype=torch.bool)
        return (10 * one @ two.T).masked_fill(same, self.fill)


class Labelled(nn.Module):
    """Pairs of the same label are masked, but for a sample and itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        z = F.normalize(self.encoder(x), dim=-1)
        same = (label[:, None] == label) & ~torch.eye(len(x), dtype=torch.bool)
        return (z @ z.T / 0.1).masked_fill(same, -1e9)


class Legal(nn.Module):
    """A policy whose illegal moves are masked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor, legal: Tensor) -> Tensor:
        return self.net(x).masked_fill(~legal, -1e9)


def found(model: nn.Module, draw: Callable[[], object], loss: Loss = F.cross_entropy) -> tuple[gf.Issue, ...]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    report = gf.diagnose(model, draw, loss, optimizer=optimizer, steps=10)
    return tuple(issue for issue in report.issues if issue.severity.is_serious)


def items() -> tuple[Tensor, Tensor]:
    return torch.randperm(40)[:16], torch.arange(16)


@pytest.mark.parametrize(
    ("fill", "loss"),
    [
        (-1e9, F.cross_entropy),
        (-1e4, written_out),
        (torch.finfo(torch.float32).min, in_two),
        (float("-inf"), F.cross_entropy),
    ],
)
def test_vectors_so_alike_that_a_mask_of_likeness_takes_all(fill: float, loss: Loss) -> None:
    (issue,) = found(Towers(12.0, fill), items, loss)
    assert (issue.issue_type, issue.layer) == (BOTTLENECK, "item")
    assert "the same for all samples" in issue.description


@pytest.mark.parametrize(("common", "above"), [(0.0, 0.95), (2.0, 0.99), (12.0, 2.0)])
def test_vectors_that_a_mask_leaves_something_of(common: float, above: float) -> None:
    assert found(Towers(common, -1e9, above), items) == ()


@pytest.mark.parametrize("kinds", [1, 4])
def test_masks_by_a_label_that_all_share(kinds: int) -> None:
    def draw() -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (torch.randn(16, 10), torch.randint(0, kinds, (16,))), torch.arange(16)

    told = [(issue.issue_type, issue.layer) for issue in found(Labelled(), draw)]
    assert told == ([(DEAD, "encoder.2")] if kinds == 1 else [])


@pytest.mark.parametrize("chance", [0.1, 0.5])
def test_moves_of_which_some_are_forced(chance: float) -> None:
    def draw() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(64, 10)
        move = x[:, :4].argmax(1)
        return (x, (torch.rand(64, 4) < chance).scatter(1, move[:, None], True)), move

    assert found(Legal(), draw) == ()


def test_a_trained_model_whose_loss_is_zero() -> None:
    torch.manual_seed(0)
    model, centres = nn.Linear(10, 3), 4 * torch.randn(3, 10)

    def draw() -> tuple[Tensor, Tensor]:
        kind = torch.randint(0, 3, (64,))
        return centres[kind] + 0.3 * torch.randn(64, 10), kind

    with torch.no_grad():
        model.weight.copy_(centres)
        model.bias.copy_(-0.5 * centres.square().sum(1))
    told = found(model, draw, F.multi_margin_loss)
    assert not {issue.issue_type for issue in told} & {DEAD, BOTTLENECK}
