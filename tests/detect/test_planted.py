"""Faults planted at a random layer of random models: the first cause names that layer in every one."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf

FAULTS = {
    "dead": gf.IssueType.DEAD,
    "detached": gf.IssueType.DEAD,
    "tiny": gf.IssueType.VANISHING,
    "huge": gf.IssueType.EXPLODING,
    "nan": gf.IssueType.NUMERICAL,
}


class Planted(nn.Module):
    """A chain of hidden layers, `layers.0` ..., one of which hands on what the fault makes of its output."""

    def __init__(self, depth: int, width: int, *, act: str, norm: bool, fault: str, at: int) -> None:
        super().__init__()
        self.embed = nn.Linear(20, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(depth))
        self.head = nn.Linear(width, 5)
        self.act = {"relu": F.relu, "tanh": torch.tanh, "gelu": F.gelu}[act]
        self.fault, self.at = fault, at
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="tanh" if act == "tanh" else "relu")
            nn.init.zeros_(layer.bias)
        planted = self.layers[at]
        with torch.no_grad():
            if fault == "dead":
                planted.weight.zero_()
                planted.bias.fill_(-1.0)
            elif fault == "tiny":
                planted.weight.mul_(1e-5)
            elif fault == "huge":
                planted.weight.mul_(1e4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.embed(x))
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            z = layer(norm(h))
            if i == self.at and self.fault == "detached":
                z = z.detach()
            if i == self.at and self.fault == "nan":
                z = torch.where(z > 0, torch.sqrt(z), z)
            h = F.relu(z) if i == self.at and self.fault == "dead" else self.act(z)
        return self.head(h)


def make_batches() -> Callable[[], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    centres = torch.randn(5, 20, generator=g)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 5, (48,), generator=g)
        return centres[y] + torch.randn(48, 20, generator=g), y

    return batch


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(8))
def test_first_cause_is_the_planted_layer(fault: str, seed: int) -> None:
    torch.manual_seed(seed)
    draw = random.Random(f"{fault}{seed}")
    depth = draw.randint(4, 8)
    at = draw.randrange(1, depth - 1)
    act = draw.choice(["relu", "tanh", "gelu"] if fault != "huge" else ["relu", "gelu"])
    norm = draw.random() < 0.5 and fault not in ("tiny", "huge")  # a norm undoes a scale, and all is well
    options = {"act": act, "norm": norm, "width": draw.choice([32, 64, 128])}
    model = Planted(depth, fault=fault, at=at, **options)
    report = gf.diagnose(model, make_batches(), F.cross_entropy, steps=8)
    first = report.causes[0]
    seen = [(c.layer, c.issue_type.value) for c in report.causes]
    assert (first.layer, first.issue_type) == (f"layers.{at}", FAULTS[fault]), (depth, options, seen)
