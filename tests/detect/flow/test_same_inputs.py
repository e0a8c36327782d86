"""BOTTLENECK where a batch holds one sample again and again; healthy where samples differ or may be alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf

KINDS = torch.randint(0, 4, (32,), generator=torch.Generator().manual_seed(0))


def told(model: nn.Module, x: Tensor, kinds: Tensor = KINDS) -> list[tuple[str, str]]:
    report = gf.diagnose(
        model, lambda: x, lambda y: F.cross_entropy(y, kinds), steps=10,
        optimizer=torch.optim.Adam(model.parameters(), 1e-2),
    )  # fmt: skip
    serious = [i for i in report.issues if i.severity >= gf.IssueSeverity.MEDIUM]
    return [(issue.issue_type.value, issue.layer) for issue in serious]


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def texts() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 4))


def test_black_images() -> None:
    assert told(images(), torch.zeros(32, 1, 6, 6)) == [("BOTTLENECK", "0")]


def test_texts_of_one_token() -> None:
    assert told(texts(), torch.full((32, 5), 3)) == [("BOTTLENECK", "0")]


@pytest.mark.parametrize("x", [torch.rand(32, 1, 6, 6), torch.eye(32, 36).view(32, 1, 6, 6)])
def test_images_that_differ(x: Tensor) -> None:
    assert told(images(), x) == []


def test_one_answer_is_asked_for() -> None:
    assert told(texts(), torch.full((32, 5), 3), torch.full((32,), 2)) == []
