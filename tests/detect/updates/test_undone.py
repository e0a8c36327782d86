"""Steps of the optimizer that the model's own forward pass takes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf

SIZES = ((8, 24), (24, 4))
CENTRES = 2 * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Rewritten(nn.Linear):
    """A linear layer that writes to its weight before it uses it."""

    def __init__(self, inputs: int, outputs: int, how: str) -> None:
        super().__init__(inputs, outputs)
        self.how = how
        self.kept = self.weight.detach().clone()
        self.mask = (torch.rand(outputs, inputs) < 0.05).float()

    @torch.no_grad()
    def rewrite(self) -> None:
        w = self.weight
        written: dict[str, Any] = {
            "rounded": lambda: (w * 16).round() / 16,
            "saved": lambda: self.kept,
            "rounded finely": lambda: (w * 4096).round() / 4096,
            "bounded": lambda: w.clamp(-0.15, 0.15),
            "normalised": lambda: w / w.norm(dim=1, keepdim=True),
            "pruned": lambda: w * self.mask,
            "as it is": lambda: w.clone(),
        }
        if self.how == "signs":
            w.data = 0.1 * w.sign()
        elif self.how != "nothing":
            w.copy_(written[self.how]())

    def forward(self, input: Tensor) -> Tensor:
        self.rewrite()
        return super().forward(input)


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    kinds = [torch.randint(4, (48,), generator=g) for _ in range(12)]
    return [(CENTRES[k] + torch.randn(48, 8, generator=g), k) for k in kinds]


def diagnosed(how: str, adam: bool) -> gf.Report:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, sizes in zip(("first", "last"), SIZES, strict=True):
        model.add_module(name, Rewritten(*sizes, how))
        if name == "first":
            model.add_module("act", nn.ReLU())
    make = torch.optim.Adam if adam else torch.optim.SGD
    return gf.diagnose(
        model, batches(), nn.CrossEntropyLoss(), optimizer=make(model.parameters(), 1e-3 if adam else 0.05)
    )


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("rounded", gf.IssueType.NUMERICAL),
        ("signs", gf.IssueType.NUMERICAL),
        ("saved", gf.IssueType.DEAD),
    ],
)
def test_weights_that_are_put_back_are_told(how: str, kind: gf.IssueType, adam: bool) -> None:
    (issue,) = (i for i in diagnosed(how, adam).issues if "undone" in i.metrics)
    assert (issue.layer, issue.issue_type, issue.severity) == ("first", kind, gf.IssueSeverity.HIGH)
    assert issue.metrics["parameters"] == ("first.weight", "last.weight")


@pytest.mark.parametrize("adam", [False, True])
@pytest.mark.parametrize("how", ["nothing", "as it is", "rounded finely", "bounded", "normalised", "pruned"])
def test_weights_that_are_written_to_and_move_are_not(how: str, adam: bool) -> None:
    assert [i for i in diagnosed(how, adam).issues if "undone" in i.metrics] == []


def test_the_share_is_that_of_a_plain_loop() -> None:
    """Every entry of every step, compared one by one."""
    torch.manual_seed(0)
    first = Rewritten(8, 24, "bounded")
    model = nn.Sequential(first, nn.ReLU(), Rewritten(24, 4, "bounded"))
    report = gf.diagnose(
        model, batches(), nn.CrossEntropyLoss(), optimizer=torch.optim.SGD(model.parameters(), 0.05)
    )
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    shares: list[float] = []
    was: list[float] = []
    after: list[float] = []
    for x, kind in batches():
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x), kind).backward()
        now = first.weight.flatten().tolist()
        changed = (
            [n == w for w, a, n in zip(was, after, now, strict=True) if a != w and w != 0] if was else []
        )
        shares += [sum(changed) / len(changed)] if was else []
        was = now
        sgd.step()
        after = first.weight.flatten().tolist()
    updates = report.record.updates
    assert updates is not None
    found = updates["0.weight"].undone
    known = np.isfinite(found)
    expected = [shares[step] for step, there in zip(updates.steps, known, strict=True) if there]
    assert found[known].tolist() == pytest.approx(expected)
    assert known.sum() >= 2
    assert updates["0.bias"].undone[known].tolist() == [0.0] * int(known.sum())
