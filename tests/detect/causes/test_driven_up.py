"""What steps of a rate that is far too high drive up, and what grew by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueType


class Reader(nn.Module):
    """A stack of attention over a table."""

    def __init__(self, size: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(size, 4, 2 * size, 0.0, batch_first=True, norm_first=True)
        self.table, self.head = nn.Embedding(16, size), nn.Linear(size, 16)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.stack(self.table(words)))


def words() -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 16, (8, 12))
    return x, (x + x.roll(1, 1)) % 16


def loss_fn(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def causes(groups: str, size: int) -> list[gf.Cause]:
    torch.manual_seed(0)
    model = Reader(size)
    scored = [p for n, p in model.named_parameters() if "in_proj" in n]
    others = [p for n, p in model.named_parameters() if "in_proj" not in n]
    slow = 0.3 if groups == "all" else 1e-3
    adam = torch.optim.Adam([{"params": scored, "lr": 0.3}, {"params": others, "lr": slow}])
    return list(gf.diagnose(model, words, loss_fn, steps=20, optimizer=adam).causes)


@pytest.mark.parametrize("size", [16, 32])
def test_scores_that_a_rate_far_too_high_drives_up_are_its_doing(size: int) -> None:
    first, *_ = causes("all", size)
    assert first.issue_type is IssueType.UNSTABLE
    assert first.issues[0].metrics["rate_factor"] > 10
    assert any("attention scores grow" in i.description for i in first.issues[1:])


def test_scores_that_grow_where_the_rate_of_the_whole_fits_are_told_for_themselves() -> None:
    first, *_ = causes("scores", 32)
    assert "attention scores grow" in first.issues[0].description
