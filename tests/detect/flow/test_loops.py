"""VANISHING in cells written by hand: a memory that fades is LOW, one that is lost in its own sum is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

MEDIUM = IssueSeverity.MEDIUM


class Cell(nn.Module):
    """A leaky memory: h ← (1 − u) h + u tanh(V [x, h]), with a gate u, over time; reads the last state."""

    def __init__(self, hidden: int, opened: float) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(3 + hidden, hidden), nn.Linear(3 + hidden, hidden)
        nn.init.constant_(self.gate.bias, opened)
        self.head, self.hidden = nn.Linear(hidden, 2), hidden

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            both = torch.cat([x[:, t], h], 1)
            u = self.gate(both).sigmoid()
            h = (1 - u) * h + u * self.new(both).tanh()
        return self.head(h)


def serious(steps: int, opened: float) -> dict[str, IssueSeverity]:
    torch.manual_seed(1)
    x, y = torch.randn(32, steps, 3), torch.arange(32) % 2
    x[:, -4:, 0] += 2.0 * y[:, None]  # what is asked for is told by the last steps
    model = Cell(24, opened)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, lambda: (x, y), F.cross_entropy, optimizer=optimizer, steps=6)
    found = [i for i in report.issues if i.issue_type is IssueType.VANISHING]
    return {issue.layer.partition("@")[0]: issue.severity for issue in found}


@pytest.mark.parametrize("steps", [16, 28])
def test_a_memory_that_fades_within_some_steps(steps: int) -> None:
    assert all(severity < MEDIUM for severity in serious(steps, 0.0).values())


def test_it_is_told_all_the_same() -> None:
    found = serious(28, 0.0)
    assert found
    assert set(found.values()) == {IssueSeverity.LOW}


def test_first_steps_that_are_lost_in_the_sum_over_all() -> None:
    assert max(serious(100, 0.0).values()) >= MEDIUM
