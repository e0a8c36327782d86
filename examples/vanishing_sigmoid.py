"""A deep sigmoid MLP with tiny initial weights, and its repair: ReLU with He initialisation.

python examples/vanishing_sigmoid.py
gradflow diagnose examples/vanishing_sigmoid.py
gradflow diagnose examples/vanishing_sigmoid.py:repaired
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from digits import NUM_CLASSES, NUM_PIXELS, batches, compare
from torch import Tensor, nn
from torch.nn import functional as F


class DeepMLP(nn.Module):
    """A multilayer perceptron that applies its activation as a function."""

    def __init__(self, widths: list[int], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(widths))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def build() -> tuple:
    """Return the sick model: sigmoids pass at most a quarter on, weights near 0.001 next to nothing."""
    torch.manual_seed(0)
    model = DeepMLP([NUM_PIXELS, 256, 256, 256, 256, NUM_CLASSES], torch.sigmoid)
    for layer in model.layers:
        nn.init.normal_(layer.weight, std=0.001)
        nn.init.zeros_(layer.bias)
    return model, batches(), nn.CrossEntropyLoss()


def repaired() -> tuple:
    """Return the repair: ReLU, and weights whose size keeps the signal's size."""
    torch.manual_seed(0)
    model = DeepMLP([NUM_PIXELS, 256, 256, 256, NUM_CLASSES], F.relu)
    for layer in model.layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model, batches(), nn.CrossEntropyLoss()


if __name__ == "__main__":
    compare(build, repaired)
