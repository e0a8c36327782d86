"""Loops of operations over a sequence: what is taken step by step, and at which steps gradient arrives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import ScanRecord

LENGTH = 24


class Leaky(nn.Module):
    """s ← keep · s + W x_t, by operations alone; gives the last state, or all of them."""

    def __init__(self, keep: float, take: Callable[[Tensor, int], Tensor], last: bool = True) -> None:
        super().__init__()
        self.fc, self.head, self.keep = nn.Linear(5, 7), nn.Linear(7, 3), keep
        self.take, self.last = take, last

    def forward(self, x: Tensor) -> Tensor:
        drive, states = self.fc(x), [x.new_zeros(len(x), 7)]
        for t in range(x.shape[1]):
            states.append(self.keep * states[-1] + self.take(drive, t))
        return self.head(states[-1] if self.last else torch.stack(states[1:], 1))


def index(x: Tensor, t: int) -> Tensor:
    return x[:, t]


TAKES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "an index": index,
    "an index from the end, with an ellipsis": lambda x, t: x[..., t - LENGTH, :],
    "an index that makes an axis": lambda x, t: x[:, t, None].squeeze(1),
    "select": lambda x, t: x.select(1, t),
    "unbind": lambda x, t: x.unbind(1)[t],
}


def scans(model: nn.Module, length: int = LENGTH) -> tuple[ScanRecord, ...]:
    torch.manual_seed(0)
    batch = torch.randn(6, length, 5)
    return gf.analyze(model, lambda: batch, lambda y: y.square().mean(), steps=2).parts.scans


@pytest.mark.parametrize("name", TAKES)
@pytest.mark.parametrize("keep", [1e-7, 1e-4, 0.3, 0.98])
def test_what_fades_along_the_loop(name: str, keep: float) -> None:
    """The gradient at step t is keep^(T - 1 - t) of that at the last: a closed form."""
    (found,) = scans(Leaky(keep, TAKES[name]))
    expected = sum(keep ** (LENGTH - 1 - t) < 1e-6 for t in range(LENGTH)) / LENGTH
    assert (found.name, found.num_steps, found.shape) == ("", LENGTH, (6, LENGTH, 7))
    assert found.faded_share == pytest.approx(expected, abs=1e-6)


def test_what_is_no_loop_of_operations() -> None:
    assert scans(Leaky(0.3, index), length=8) == ()  # too few steps to fade
    assert scans(nn.Sequential(nn.Linear(5, 7), nn.Tanh())) == ()

    class Cells(Leaky):
        """Each step is handed to a module, whose calls are measured as such."""

        def __init__(self) -> None:
            super().__init__(0.3, index)
            self.inner = nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            drive, state = self.fc(x), x.new_zeros(len(x), 7)
            for t in range(x.shape[1]):
                state = self.inner(drive[:, t] + state)
            return state

    assert scans(Cells()) == ()

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return torch.stack([h[:, t] for t in range(0, LENGTH, 2)], 1)

    assert scans(Part()) == ()  # every other step alone is taken


def test_steps_that_are_not_read_have_not_faded() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            return torch.stack([h[:, t] for t in range(LENGTH)], 1)[:, -3:]

    (found,) = scans(Late())
    assert found.faded_share == 0


# ------------------------------------------------------------------------------------- verdicts


def told(model: nn.Module, scale: float = 1.0) -> list[str]:
    torch.manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (32,))
        x = torch.randn(32, LENGTH, 5)
        x[:, : LENGTH // 4, :3] += 2 * nn.functional.one_hot(y, 3)[:, None]
        return x, y

    def loss(out: Tensor, y: Tensor) -> Tensor:
        each = out if out.dim() == 3 else out[:, None]
        return scale * nn.functional.cross_entropy(each.mean(1), y)

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(model, batch, loss, optimizer=optimizer, seed=0)
    return [i.description for i in report.issues if i.severity >= gf.IssueSeverity.MEDIUM]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_loop_that_forgets_what_the_task_asks_for(scale: float) -> None:
    torch.manual_seed(0)
    (text,) = told(Leaky(0.3, index), scale)
    assert "Its loop over 24 steps forgets: at 50% of them" in text


@pytest.mark.parametrize(("keep", "last"), [(0.95, True), (0.3, False)])
def test_a_loop_that_remembers_or_of_which_all_steps_are_read(keep: float, last: bool) -> None:
    torch.manual_seed(0)
    assert told(Leaky(keep, index, last=last)) == []


@pytest.mark.parametrize("chosen", [np.array([2, 0]), torch.tensor([2, 0])])
def test_rows_that_an_array_chooses(chosen: object) -> None:
    """As those that a matching of predictions and targets gives: no step of a loop, and no error."""

    def loss(out: Tensor) -> Tensor:
        return sum((sample[chosen, 0].square().mean() for sample in out), out.new_zeros(()))  # type: ignore

    record = gf.analyze(nn.Linear(5, 7), lambda: torch.randn(6, LENGTH, 5), loss, steps=2)
    assert record.parts.scans == ()
    assert np.isfinite(record.losses).all()
