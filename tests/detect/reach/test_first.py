"""DEAD where of several steps the first one is read, so that recurrent weights get no gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf

Read = Callable[[Tensor], Tensor]


class Reader(nn.Module):
    """A recurrent layer, what a test reads of it, and a head."""

    def __init__(
        self, kind: type[nn.RNNBase], read: Read, *, begun: bool = False, **options: bool | int
    ) -> None:
        super().__init__()
        self.pre, self.rnn = nn.Linear(3, 8), kind(8, 16, batch_first=True, **options)
        self.head = nn.LazyLinear(2)
        self.read, self.begun = [read], begun

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre(x)
        state = h.mean(1)[None].repeat(1, 1, 2) if self.begun else None
        return self.head(self.read[0](self.rnn(h, state)[0]))


def told(model: nn.Module, steps: int) -> list[str]:
    """Return the layers of which the report says that they never recur."""
    torch.manual_seed(0)
    model(torch.randn(4, steps, 3))

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, steps, 3)
        return x, (x[:, -1, 0] > 0).long()

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(model, batch, F.cross_entropy, optimizer=optimizer, steps=6)
    return [i.layer for i in report.issues if "never recurs" in i.description and i.severity.is_serious]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_of_several_steps(kind: type[nn.RNNBase], layers: int) -> None:
    assert told(Reader(kind, lambda y: y[:, 0], num_layers=layers), 7) == ["rnn"]


@pytest.mark.parametrize(
    ("read", "steps", "options"),
    [
        (lambda y: y[:, -1], 7, {}),
        (lambda y: y[:, 1], 7, {}),
        (lambda y: y.mean(1), 7, {}),
        (lambda y: y[:, 0], 1, {}),
        (lambda y: y[:, 0], 7, {"bidirectional": True}),
        (lambda y: y[:, -1], 7, {"bidirectional": True}),
        (lambda y: y[:, 0], 7, {"begun": True}),
    ],
)
def test_other_steps_and_other_layers(read: Read, steps: int, options: dict[str, bool]) -> None:
    assert told(Reader(nn.GRU, read, **options), steps) == []
