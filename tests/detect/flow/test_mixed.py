"""BOTTLENECK where a view in the place of a permutation mixes up samples, and not where rows stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Issue

CENTRES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class States(nn.Module):
    """Reads the last states of two layers side by side."""

    def __init__(self, kind: type[nn.RNNBase], *, mixed: bool) -> None:
        super().__init__()
        self.pre, self.rnn, self.mixed = nn.Linear(6, 6), kind(6, 16, num_layers=2, batch_first=True), mixed
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        last = self.rnn(self.pre(x))[1]
        last = last[0] if isinstance(last, tuple) else last
        last = last if self.mixed else last.transpose(0, 1)
        return self.fc(last.reshape(len(x), -1))


class StepsInFront(nn.Module):
    """Reads all steps of what stands with the steps in front."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__()
        self.pre, self.rnn, self.fc, self.mixed = nn.Linear(6, 16), nn.GRU(16, 16), nn.Linear(80, 4), mixed

    def forward(self, x: Tensor) -> Tensor:
        given = self.rnn(self.pre(x).transpose(0, 1))[0]
        return self.fc((given if self.mixed else given.transpose(0, 1)).reshape(len(x), -1))


class Heads(nn.Module):
    """Brings the heads of an attention together again."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__()
        self.pre, self.rnn, self.fc, self.mixed = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4), mixed

    def forward(self, x: Tensor) -> Tensor:
        number, steps, _ = x.shape
        q = self.rnn(self.pre(x)).view(number, steps, 4, 4).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, q, q)
        return self.fc(h.transpose(*((0, 1) if self.mixed else (1, 2))).reshape(number, steps, 16).mean(1))


class Planes(nn.Module):
    """Tells three kinds of pixels apart."""

    def __init__(self, norm: type[nn.Module], *, mixed: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.rnn, self.mixed = (
            nn.Conv2d(1, 8, 3, padding=1),
            norm(8),
            nn.Conv2d(8, 3, 1),
            mixed,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(self.norm(self.conv(x)).relu())
        return (
            y.permute(*((2, 3, 0, 1) if self.mixed else (0, 2, 3, 1))).reshape(len(x), 64, 3).transpose(1, 2)
        )


class Lookups(nn.Module):
    """A graph, of whose nodes each hears its neighbours and not itself; or rows that are dealt out anew."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.pre, self.fc, self.how = nn.Linear(30, 16), nn.Linear(16, 4), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre(x.flatten(1)).relu()
        order = torch.arange(len(h)).flip(0)
        moved = {
            "neighbours": lambda: torch.eye(len(h)).roll(1, 0) @ h,
            "dealt": lambda: h[order],
            "picked": lambda: h.index_select(0, order),
            "rolled": lambda: h.roll(3, 0),
        }
        return self.fc(moved[self.how]())


def sequences() -> Callable[[], tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (32,), generator=drawn)
        return CENTRES[y][:, None] + torch.randn(32, 5, 6, generator=drawn), y

    return batch


def pictures() -> Callable[[], tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(12, 1, 8, 8, generator=drawn)
        return x, (x.flatten(1) > 0.5).long() + (x.flatten(1) > -0.5).long()

    return batch


def told(model: nn.Module) -> list[Issue]:
    """Return the issues that tell of samples in the wrong rows."""
    batch = pictures() if isinstance(model, Planes) else sequences()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(model, batch, F.cross_entropy, optimizer=optimizer)
    return [i for i in report.issues if "rows of other samples" in i.description]


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "lstm": lambda mixed: States(nn.LSTM, mixed=mixed),
    "gru": lambda mixed: States(nn.GRU, mixed=mixed),
    "steps in front": lambda mixed: StepsInFront(mixed=mixed),
    "heads": lambda mixed: Heads(mixed=mixed),
    "planes": lambda mixed: Planes(nn.BatchNorm2d, mixed=mixed),
    "planes, each normed": lambda mixed: Planes(nn.InstanceNorm2d, mixed=mixed),
}


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_samples_that_a_view_mixes_up(kind: str, mixed: bool) -> None:
    torch.manual_seed(0)
    found = told(MODELS[kind](mixed))
    assert [(i.layer, i.severity.value) for i in found] == [("rnn", "HIGH")] * mixed


@pytest.mark.parametrize("how", ["neighbours", "dealt", "picked", "rolled"])
def test_rows_that_go_elsewhere_on_purpose(how: str) -> None:
    torch.manual_seed(0)
    assert told(Lookups(how)) == []


@pytest.mark.parametrize("kind", MODELS)
def test_the_own_part_is_that_of_the_jacobian(kind: str) -> None:
    """Against the derivative of one row of the outputs, by a perturbation of every input row in turn."""
    torch.manual_seed(0)
    model = MODELS[kind](True).eval()
    x, _ = (pictures() if isinstance(model, Planes) else sequences())()
    row = len(x) // 2
    with torch.no_grad():
        y = model(x)[row]
        moved = [
            (model(x + (torch.arange(len(x)) == i).view(-1, *[1] * (x.dim() - 1)))[row] - y).norm()
            for i in range(len(x))
        ]
    record = gf.analyze(model, [x], lambda y: y.square().mean(), mode="keep")
    (found,) = record.parts.samples
    assert found.own <= 0.2
    assert float(moved[row]) < 0.5 * float(torch.stack(moved).norm())
