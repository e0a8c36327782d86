"""Embeddings of which a loss asks nothing but that they agree are drawn together; others are kept apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType

Loss = Callable[[Tensor, Tensor], Tensor]


def rows(width: int, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(20, width), act(), nn.Linear(width, 32))


def signal(width: int) -> nn.Module:
    conv = nn.Sequential(nn.Conv1d(1, width, 5, padding=2), nn.GELU(), nn.AdaptiveAvgPool1d(4), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (1, 20)), *conv, nn.Linear(4 * width, 24))


def halves(output: Tensor) -> tuple[Tensor, Tensor]:
    one, two = output.chunk(2)
    return one, two


def cosine(output: Tensor, _: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(*halves(output))).mean()


def labelled_cosine(output: Tensor, same: Tensor) -> Tensor:
    return F.mse_loss(F.cosine_similarity(*halves(output)), same)


def labelled_distance(output: Tensor, same: Tensor) -> Tensor:
    far = torch.linalg.vector_norm(torch.sub(*halves(output)), dim=1)
    return (same * far.square() + (1 - same) * (1 - far).relu().square()).mean()


def embedding_loss(output: Tensor, same: Tensor) -> Tensor:
    return F.cosine_embedding_loss(*halves(output), 2 * same - 1)


def ranked(output: Tensor, _: Tensor) -> Tensor:
    one, two = F.normalize(output, dim=1).chunk(2)
    return F.cross_entropy(one @ two.T / 0.2, torch.arange(len(one)))


def spread(output: Tensor, _: Tensor) -> Tensor:
    return F.mse_loss(*halves(output)) + (1 - (output.var(0) + 1e-4).sqrt()).relu().mean()


def to_a_centre(output: Tensor, _: Tensor) -> Tensor:
    return (output - 1.5).square().sum(1).mean()


def report(model: nn.Module, loss: Loss, alike: float, *, steps: int = 40) -> gf.Report:
    g, held = torch.Generator().manual_seed(1), list[Tensor]()

    def batch() -> Tensor:
        one, other, noise = (torch.randn(24, 20, generator=g) for _ in range(3))
        same = torch.rand(24, generator=g) < alike
        held[:] = [same.float()]
        return torch.cat([one, torch.where(same[:, None], one + 0.4 * noise, other)])

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return gf.diagnose(model, batch, lambda y: loss(y, held[0]), steps=steps, optimizer=optimizer)


def alike(found: gf.Report) -> list[str]:
    return [issue.layer for issue in found.issues if issue.issue_type is IssueType.BOTTLENECK]


@pytest.mark.parametrize(
    ("loss", "width"), [(cosine, 32), (labelled_cosine, 128), (labelled_distance, 32), (embedding_loss, 64)]
)
def test_pairs_that_are_all_alike(loss: Loss, width: int) -> None:
    torch.manual_seed(0)
    found = report(rows(width), loss, 1.0)
    assert alike(found) == ["2"]
    assert "nothing but one another" in getattr(found.record.knowledge, "misgiven", ())
    assert "InfoNCE" in " ".join(found.issues[0].recommended_actions)


def test_pairs_of_signals() -> None:
    torch.manual_seed(0)
    assert len(alike(report(signal(16), cosine, 1.0))) == 1


@pytest.mark.parametrize("loss", [labelled_cosine, labelled_distance, embedding_loss])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_some_pairs_are_to_be_kept_apart(loss: Loss, share: float) -> None:
    torch.manual_seed(0)
    assert not alike(report(rows(64), loss, share))


@pytest.mark.parametrize("loss", [ranked, spread, to_a_centre])
@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_negatives_variance_or_a_target(loss: Loss, act: type[nn.Module]) -> None:
    torch.manual_seed(0)
    found = report(rows(64, act), loss, 1.0)
    assert not alike(found)
    assert "nothing but one another" not in getattr(found.record.knowledge, "misgiven", ())
