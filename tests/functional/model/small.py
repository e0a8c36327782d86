"""The smallest models, batches and a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

X, Y, T = torch.randn(6, 3), torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


class Pair(nn.Module):
    """Takes two tensors, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) - self.b(right)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


@dataclass
class HuggingFaceLike:
    loss: Tensor | None
    logits: Tensor
