"""Steps that carry a model to where its loss is flat, and steps that do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType


def views(g: torch.Generator) -> Tensor:
    """Return two views of 16 samples, one behind the other."""
    clean = torch.randn(16, 12, generator=g)
    return torch.cat([clean + 0.2 * torch.randn(16, 12, generator=g) for _ in range(2)])


def contrast(z: Tensor) -> Tensor:
    """Return the loss of a sample that is to find its other view (Chen et al., 2020)."""
    z = F.normalize(z, dim=1)
    scores = (z @ z.T / 0.1).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(z) // 2))


def report_of(rate: float, seed: int = 0, depth: int = 6) -> gf.Report:
    """Diagnose a projector that is trained at a rate, with momentum."""
    torch.manual_seed(seed)
    widths = (12, *[32] * depth)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    g = torch.Generator().manual_seed(1)
    batches = [views(g) for _ in range(20)]
    return gf.diagnose(model, batches, contrast, optimizer=torch.optim.SGD(model.parameters(), rate, 0.9))


@pytest.mark.parametrize(("rate", "seed"), [(2.0, 0), (5.0, 0), (5.0, 1)])
def test_a_rate_that_strands_a_model_is_named(rate: float, seed: int) -> None:
    found = report_of(rate, seed).issues
    (issue, *_) = [i for i in found if i.issue_type is IssueType.UNSTABLE]
    assert issue.severity is IssueSeverity.HIGH
    assert "flat" in issue.description
    assert issue.recommended_actions[0].startswith(f"Lower the learning rate of SGD: {rate:.3g}")


@pytest.mark.parametrize("rate", [1e-3, 0.02, 0.1])
def test_other_rates_strand_nothing(rate: float) -> None:
    assert report_of(rate).ok
