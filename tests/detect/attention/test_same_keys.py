"""Attention that reads the same everywhere: told once, of what it reads, and not of its queries as well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf

WIDTH, PLACES, KINDS = 24, 8, 4


class Asking(nn.Module):
    """Attention with a projection each for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(read), self.v_proj(read)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Placed(nn.Module):
    """Learned places ask what was seen there; what is seen may be pooled, or copies of one place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.see, self.asks = nn.Linear(6, WIDTH), nn.Parameter(torch.randn(PLACES, WIDTH))
        self.where = nn.Parameter(torch.randn(PLACES, WIDTH))
        self.attention, self.head = Asking(), nn.Linear(WIDTH, KINDS)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        seen = self.see(x)
        if self.kind == "pooled":
            seen = seen.mean(1, keepdim=True).expand(-1, PLACES, -1)
        elif self.kind == "first":
            seen = seen[:, :1].repeat(1, PLACES, 1)
        else:
            seen = seen + self.where
        asked = self.asks.expand(len(x), -1, -1)
        return self.head(asked + self.attention(asked, seen))


@pytest.mark.parametrize(("kind", "sick"), [("pooled", True), ("first", True), ("placed", False)])
def test_it_is_told_of_what_is_read_and_not_of_the_queries(kind: str, sick: bool) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    shapes, now = 1.5 * torch.randn(KINDS, 6, generator=draw), list[Tensor]()

    def batch() -> Tensor:
        now[:] = [torch.randint(0, KINDS, (32, PLACES), generator=draw)]
        return shapes[now[0]] + 0.3 * torch.randn(32, PLACES, 6, generator=draw)

    model = Placed(kind)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(
        model, batch, lambda y: F.cross_entropy(y.flatten(0, 1), now[0].flatten()), optimizer=optimizer
    )
    serious = {(i.issue_type.value, i.layer) for i in report.issues if i.severity.is_serious}
    assert (("BOTTLENECK", "attention") in serious) is sick
    assert not any(type == "VANISHING" for type, _ in serious)
