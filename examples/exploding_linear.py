"""A linear stack with weights of standard deviation 5, and its repair: batch norm, Xavier and ReLU.

python examples/exploding_linear.py
gradflow diagnose examples/exploding_linear.py
gradflow diagnose examples/exploding_linear.py:repaired
"""

from __future__ import annotations

import torch
from digits import NUM_CLASSES, NUM_PIXELS, batches, compare
from torch import Tensor, nn
from torch.nn import functional as F


class LinearStack(nn.Module):
    """Four linear layers with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(NUM_PIXELS, 512)
        self.fc2 = nn.Linear(512, 512)
        self.fc3 = nn.Linear(512, 512)
        self.fc4 = nn.Linear(512, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.fc4(self.fc3(self.fc2(self.fc1(x))))


class NormedStack(LinearStack):
    """The same stack with batch norm and ReLU behind all but the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(512) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        for layer, norm in zip((self.fc1, self.fc2, self.fc3), self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.fc4(x)


def build() -> tuple:
    """Return the sick model: each layer multiplies the gradient by about 5 √512, which is 113."""
    torch.manual_seed(0)
    model = LinearStack()
    for layer in (model.fc1, model.fc2, model.fc3):
        nn.init.normal_(layer.weight, std=5.0)
    return model, batches(), nn.CrossEntropyLoss()


def repaired() -> tuple:
    """Return the repair, with the optimizer that would train it."""
    torch.manual_seed(0)
    model = NormedStack()
    for layer in (model.fc1, model.fc2, model.fc3, model.fc4):
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model, batches(), nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=1e-3)


if __name__ == "__main__":
    compare(build, repaired)
