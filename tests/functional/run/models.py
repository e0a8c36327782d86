"""A model of random numbers and running averages, a batch and a loss."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

X = torch.randn(6, 4)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


class Noisy(nn.Module):
    """Draws random numbers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.bn, self.drop, self.b = (
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.5),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(()) + np.random.rand() + random.random()
        return self.b(self.drop(torch.relu(self.bn(self.a(x))))) * noise
