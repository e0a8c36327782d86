"""Recurrent layers that are read behind padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import gradflow as gf

KINDS = 3
Read = Callable[[Any, Tensor], Tensor]


class Reader(nn.Module):
    """Classifies sequences of tokens of different lengths, padded with zeros."""

    def __init__(self, layer: nn.RNNBase, read: str) -> None:
        super().__init__()
        self.embed, self.layer, self.read = nn.Embedding(20, 12, padding_idx=0), layer, read
        self.head = nn.Linear((2 if layer.bidirectional else 1) * layer.hidden_size, KINDS)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(words)
        if self.read == "packed":
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            state = self.layer(packed)[1]
            return self.head((state[0] if isinstance(state, tuple) else state)[-1])
        out, _ = self.layer(x)
        taken = {
            "last": lambda: out[:, -1],
            "own last": lambda: out[torch.arange(len(out)), lengths - 1],
            "mean": lambda: out.mean(1),
        }
        return self.head(taken[self.read]())


def told(
    layer: Callable[..., nn.RNNBase], read: str, *, steps: int, longest: int, **options: Any
) -> list[gf.Issue]:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(6):
        lengths = torch.randint(3, longest + 1, (16,), generator=g)
        words = torch.randint(1, 20, (16, steps), generator=g)
        kinds = words[:, 0] % KINDS
        batches.append(((words * (torch.arange(steps) < lengths[:, None]), lengths), kinds))
    model = Reader(layer(12, 24, batch_first=True, **options), read)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    found = gf.diagnose(model, batches, nn.CrossEntropyLoss(), optimizer=adam)
    return [i for i in found.issues if "padding" in i.metrics and i.severity.is_serious]


@pytest.mark.parametrize(("layer", "steps"), [(nn.LSTM, 48), (nn.GRU, 60), (nn.RNN, 60)])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}])
def test_the_last_output_behind_long_padding(layer: Any, steps: int, options: dict[str, Any]) -> None:
    (issue,) = told(layer, "last", steps=steps, longest=6, **options)
    assert (issue.layer, issue.issue_type) == ("layer", gf.IssueType.VANISHING)
    assert steps - 6 <= issue.metrics["padding"] <= steps - 3
    assert "pack_padded_sequence" in issue.recommended_actions[0]


@pytest.mark.parametrize(("layer", "steps"), [(nn.GRU, 32), (nn.GRU, 40), (nn.LSTM, 26), (nn.RNN, 26)])
def test_padding_that_leaves_a_thousandth_to_what_is_before_it(layer: Any, steps: int) -> None:
    (issue,) = told(layer, "last", steps=steps, longest=6)
    assert (issue.layer, issue.issue_type) == ("layer", gf.IssueType.VANISHING)


@pytest.mark.parametrize(
    ("read", "steps", "longest", "options"),
    [
        ("own last", 48, 6, {}),
        ("packed", 48, 6, {}),
        ("mean", 48, 6, {}),
        ("last", 48, 6, {"bidirectional": True}),
        ("last", 12, 8, {}),  # a few steps, which it remembers
        ("last", 14, 6, {}),
        ("last", 24, 24, {}),
        ("last", 48, 48, {}),
        ("own last", 26, 6, {}),
    ],
)
def test_padding_that_is_not_read_or_short_is_as_it_should_be(
    read: str, steps: int, longest: int, options: dict[str, Any]
) -> None:
    assert told(nn.LSTM, read, steps=steps, longest=longest, **options) == []


def test_inputs_that_are_the_same_throughout_are_no_padding() -> None:
    torch.manual_seed(0)

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.layer, self.head = nn.Linear(4, 24), nn.GRU(2, 24), nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.layer(torch.zeros(48, len(x), 2), torch.tanh(self.enter(x))[None])
            return self.head(out[-1])

    batches = [torch.randn(16, 4) for _ in range(6)]
    model = Unrolled()
    found = gf.diagnose(
        model,
        batches,
        lambda out: (out - 1).square().mean(),
        optimizer=torch.optim.Adam(model.parameters()),
    )
    assert [i for i in found.issues if "padding" in i.metrics] == []


class Share(nn.Module):
    """Tells which share of a sequence is one from the last state of a layer, or from the mean of all."""

    def __init__(self, layer: type[nn.RNNBase], last: bool) -> None:
        super().__init__()
        self.layer, self.out, self.last = layer(1, 16, batch_first=True), nn.Linear(16, 1), last

    def forward(self, x: Tensor) -> Tensor:
        states = self.layer(x)[0]
        return self.out(states[:, -1] if self.last else states.mean(1))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("last", [True, False])
def test_a_loss_that_falls_to_what_one_answer_costs_excuses_nothing(layer: Any, last: bool) -> None:
    """The level of the targets is far from that of the first outputs: the loss falls by far more than half,
    and one answer for all costs no more."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    shares = [0.5 + 0.5 * torch.rand(16, 1, generator=g) for _ in range(20)]
    batches = [((torch.linspace(0, 1, 120) >= 1 - s).float()[..., None], s) for s in shares]
    model = Share(layer, last)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    report = gf.diagnose(model, batches, nn.MSELoss(), optimizer=adam)
    assert report.record.losses[-1] < 0.5 * report.record.losses[0]
    found = [i for i in report.issues if "padding" in i.metrics]
    assert [i.severity for i in found] == ([gf.IssueSeverity.HIGH] if last else [])
