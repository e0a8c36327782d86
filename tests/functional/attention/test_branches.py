"""Branches of a residual stream: which sums are found, under what name, and their shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.functional.attention.models import gpt, measured, tokens


def test_branches_are_found_with_their_names_and_shares() -> None:
    model, batch = gpt(), tokens()
    branches = measured(model, batch).transformer.branches
    assert [(b.name, b.type) for b in branches] == [
        ("h.0.attn", "Attention"),
        ("h.0.mlp", "Sequential"),
        ("h.1.attn", "Attention"),
        ("h.1.mlp", "Sequential"),
    ]
    with torch.no_grad():
        x = model.wte(batch) + model.wpe(torch.arange(6))
        x = x + model.h[0].attn(model.h[0].ln1(x))
        added = model.h[0].mlp(model.h[0].ln2(x))
    assert float(branches[1].share[0]) == pytest.approx(float(added.norm() / x.norm()), rel=1e-5)


def test_positions_that_are_added_to_an_embedding_and_sums_of_projections_are_no_branches() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x) + self.b(x)
            h = h + self.c(h)
            return h + 1.0

    torch.manual_seed(0)
    found = measured(Sums(), torch.randn(2, 5, 8), lambda y: y.square().mean()).transformer
    assert [b.name for b in found.branches] == ["c"]


@pytest.mark.parametrize("stream_first", [True, False])
def test_a_factor_of_the_sum_counts(stream_first: bool) -> None:
    class Block(nn.Module):
        def __init__(self, alpha: float) -> None:
            super().__init__()
            self.inp, self.f, self.alpha = nn.Linear(8, 8), nn.Linear(8, 8), alpha

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            pair = (x, self.f(x)) if stream_first else (self.f(x), x)
            return torch.add(*pair, alpha=self.alpha)

    x = torch.randn(2, 5, 8)
    shares = []
    for alpha in (1.0, 0.1):
        torch.manual_seed(0)
        (branch,) = measured(Block(alpha), x, lambda y: y.square().mean()).transformer.branches
        shares.append(float(branch.share[0]))
    assert shares[1] / shares[0] == pytest.approx(0.1 if stream_first else 10.0)


def test_a_branch_is_named_after_what_is_before_its_dropout() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.f, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            return x + self.drop(self.f(x).mul(0.5))

    torch.manual_seed(0)
    found = measured(Block(), torch.randn(2, 5, 8), lambda y: y.square().mean()).transformer
    assert [b.name for b in found.branches] == ["f"]
