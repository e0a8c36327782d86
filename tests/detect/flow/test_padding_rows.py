"""Rows of a table that are zero: those of padding, which take no gradient, and others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import IssueType


class Words(nn.Module):
    """Directions of words, added up; the first row is that of padding, or only starts at zero."""

    def __init__(self, *, padded: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16, padding_idx=0 if padded else None)
        self.hidden, self.out = nn.Linear(16, 32), nn.Linear(32, 3)
        with torch.no_grad():
            self.embed.weight[0].zero_()

    def forward(self, words: Tensor) -> Tensor:
        """Return scores for words of shape (batch, time)."""
        return self.out(F.relu(self.hidden(F.normalize(self.embed(words), dim=-1).sum(1))))


@pytest.mark.parametrize("padded", [True, False])
def test_the_gradient_at_padding_goes_nowhere(padded: bool) -> None:
    torch.manual_seed(0)
    model, words = Words(padded=padded), torch.randint(1, 20, (32, 8))
    words[:, 5:] = 0
    batch = (words, words[:, 0] % 3)
    report = gf.diagnose(
        model, [batch] * 20, F.cross_entropy, optimizer=torch.optim.Adam(model.parameters(), 1e-2)
    )
    told = {(issue.issue_type, issue.layer) for issue in report.issues if issue.severity.is_serious}
    assert ((IssueType.EXPLODING, "embed") in told) is not padded
    assert report.ok is padded
