"""Parameters that get a gradient and that no optimizer holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf

LOSS = nn.CrossEntropyLoss()


class Net(nn.Module):
    """A stem, a stack and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(32, 8, generator=g) for _ in range(6)]
    return [(x, x[:, :4].argmax(1)) for x in xs]


def told(model: nn.Module, optimizer: Any) -> list[gf.Issue]:
    found = gf.diagnose(model, batches(), LOSS, optimizer=optimizer)
    return [i for i in found.issues if "elements" in i.metrics]


def test_a_head_that_was_replaced_after_the_optimizer_was_built() -> None:
    model = Net()
    adam = torch.optim.Adam(model.parameters())
    model.head = nn.Linear(32, 4)
    (issue,) = told(model, adam)
    assert (issue.layer, issue.severity) == ("head", gf.IssueSeverity.HIGH)
    assert issue.metrics["parameters"] == ("head.weight", "head.bias")
    assert issue.metrics["stale"] == 2
    assert "built before a part of the model was replaced" in issue.description


def test_a_part_of_a_stack_behind_one_that_is_held() -> None:
    model = Net()
    adam = torch.optim.Adam([p for n, p in model.named_parameters() if not n.startswith("blocks.2")])
    (issue,) = told(model, adam)
    assert (issue.layer, issue.severity) == ("blocks.2", gf.IssueSeverity.MEDIUM)


CHOSEN: dict[str, Callable[[Net], Any]] = {
    "the head alone": lambda m: m.head.parameters(),
    "the last block and the head": lambda m: [*m.blocks[2].parameters(), *m.head.parameters()],
    "the biases": lambda m: [p for n, p in m.named_parameters() if n.endswith("bias")],
    "one player of two": lambda m: [*m.stem.parameters(), *m.blocks.parameters()],
}


@pytest.mark.parametrize("name", CHOSEN)
def test_a_part_that_is_chosen_is_a_remark(name: str) -> None:
    model = Net()
    (issue,) = told(model, torch.optim.Adam(CHOSEN[name](model)))
    assert issue.severity is gf.IssueSeverity.LOW


def test_nothing_is_said_of_what_is_held_frozen_or_not_stepped() -> None:
    model = Net()
    assert told(model, torch.optim.Adam(model.parameters())) == []
    both = {"body": torch.optim.SGD(model.blocks.parameters(), 0.1), "ends": torch.optim.Adam(
        [*model.stem.parameters(), *model.head.parameters()])}  # fmt: skip
    assert told(model, both) == []
    assert told(model, None) == []
    model.stem.requires_grad_(False)
    assert told(model, torch.optim.Adam(p for p in model.parameters() if p.requires_grad)) == []
