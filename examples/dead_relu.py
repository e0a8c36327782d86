"""An MLP with a layer initialised to zero before a ReLU, and its repair: Kaiming initialisation.

python examples/dead_relu.py
gradflow diagnose examples/dead_relu.py
gradflow diagnose examples/dead_relu.py:repaired
"""

from __future__ import annotations

import torch
from digits import NUM_CLASSES, NUM_PIXELS, batches, compare
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Three linear layers with ReLU, applied as a function, between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(NUM_PIXELS, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


def build() -> tuple:
    """Return the sick model: `fc2` gives zero, at which the ReLU has slope zero, so it stays zero."""
    torch.manual_seed(0)
    model = MLP()
    nn.init.zeros_(model.fc2.weight)
    nn.init.zeros_(model.fc2.bias)
    return model, batches(), nn.CrossEntropyLoss()


def repaired() -> tuple:
    """Return the repair."""
    torch.manual_seed(0)
    model = MLP()
    for layer in (model.fc1, model.fc2, model.fc3):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model, batches(), nn.CrossEntropyLoss()


if __name__ == "__main__":
    compare(build, repaired)
