"""Loops over cells: which calls of a cell make a sequence, and which begin another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.functional.recurrent.models import Loop, inputs, layer, measured, only


class Custom(nn.Module):
    """A cell that a function runs as it likes."""

    def __init__(self, name: str, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.cell, self.run = Loop(layer(name)).cell, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.cell, x)


def test_two_loops_over_one_cell_are_two_sequences() -> None:
    def run(cell: Any, x: Tensor) -> Tensor:
        a = b = None
        for step in x:  # interleaved
            a = cell(step, a)
            b = cell(-step, b)
        return a + b

    record = measured(Custom("tanh", run), [inputs(5)], lambda y: y.square().sum())
    assert [r.name for r in record.recurrences] == ["cell", "cell@1"]
    assert [r.num_steps.tolist() for r in record.recurrences] == [[5], [5]]


def test_a_detached_state_begins_a_sequence_and_a_changed_one_does_not() -> None:
    def run(cell: Any, x: Tensor) -> Tensor:
        h, c = torch.zeros(2, 4, 4, dtype=x.dtype)
        total = x.new_zeros(())
        for t, step in enumerate(x):
            if t == 2:
                h, c = h.detach(), c.detach()
            h, c = cell(step, (h * 0.5 + 0.1, c))
            total = total + h.sum()
        return total

    record = measured(Custom("lstm", run), [inputs(5)], lambda y: y)
    assert [(r.name, r.num_steps.tolist()) for r in record.recurrences] == [("cell", [2]), ("cell@2", [3])]


def test_unbatched_cells_and_shrinking_batches() -> None:
    def alone(cell: Any, x: Tensor) -> Tensor:
        h = None
        for step in x:
            h = cell(step[0], h)
        return h

    record = only(measured(Custom("gru", alone), [inputs(4)], lambda y: y.sum()))
    assert record.levels[0].gradient_profile.shape == (1, 4)

    def shrinking(cell: Any, x: Tensor) -> Tensor:
        h, total = None, x.new_zeros(())
        for t, step in enumerate(x):
            h = cell(step[: 4 - t], None if h is None else h[: 4 - t])
            total = total + h.sum()
        return total

    record = only(measured(Custom("gru", shrinking), [inputs(3)], lambda y: y))
    assert record.num_steps.tolist() == [3]
    assert record.state_error[0] < 1e-12
