"""Draws the figure of docs/graph.md: a residual network whose second block carries next to nothing.

    python docs/draw_graph.py [FILE.png]

Needs the extra `plot`. The model is the one that the page queries.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.report.plots import draw_graph


class Block(nn.Module):
    """x + down(relu(up(norm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """An embedding, three residual blocks and a head; `blocks.1.down` is a hundred times too small."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 10)
        with torch.no_grad():
            self.blocks[1].down.weight.mul_(0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build_graph() -> gf.graph.LayerGraph:
    """Return the graph of the network above, measured on one batch."""
    torch.manual_seed(0)
    batch = torch.randn(64, 64), torch.randint(0, 10, (64,))
    return gf.layer_graph(Net(), batch, nn.CrossEntropyLoss())


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "graph.png"
    draw_graph(build_graph(), path, level="full")
