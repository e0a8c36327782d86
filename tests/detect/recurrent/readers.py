"""A recurrent layer that is read in several ways, and its diagnosis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import amplifying, detect, fading, gated
from gradflow.pipelines import recurrent
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType
from gradflow.report import Report

OURS = [fading(), amplifying(), gated()]


LOW = IssueSeverity.LOW


class Reader(nn.Module):
    """A recurrent layer, read at its last step, at every step, or by its last states."""

    def __init__(self, rnn: nn.RNNBase, read: str = "last") -> None:
        super().__init__()
        self.rnn, self.read = rnn, read
        self.head = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        output, last = self.rnn(x)
        if self.read == "states":
            h_n = last[0] if isinstance(last, tuple) else last
            return self.head(torch.cat(list(h_n[-2:] if self.rnn.bidirectional else h_n[-1:]), -1))
        return self.head(output[:, -1] if self.read == "last" else output)


def rnn(kind: type[nn.RNNBase], width: int = 24, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return kind(4, width, batch_first=True, **options)


def scaled(module: nn.RNNBase, *, recurrent: float = 1.0, keep: float = 0.0) -> nn.RNNBase:
    """Scale the recurrent weights, and shift the bias of the gate that holds on to the state."""
    width = module.hidden_size
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weight_hh" in name:
                parameter.mul_(recurrent)
            if "bias_ih" in name:
                parameter[width : 2 * width] += keep
    return module


def diagnosed(
    model: nn.Module,
    length: int,
    *,
    batch: int = 16,
    scale: float = 1.0,
    size: float = 1.0,
    lr: float | None = 1e-3,
    steps: int = 6,
) -> Report:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype

    def draw() -> tuple[Tensor, Tensor]:
        x = size * torch.randn(batch, length, 4, generator=generator)
        every = getattr(model, "read", "") == "every"
        y = torch.randint(0, 3, (batch, length) if every else (batch,), generator=generator)
        return x.to(dtype), y

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(y.flatten(0, -2).float(), target.flatten())

    optimizer = None if lr is None else torch.optim.Adam(model.parameters(), lr)
    return gf.diagnose(model, draw, loss, steps=steps, optimizer=optimizer, pipeline=recurrent(), seed=0)


def ours(record: FlowRecord) -> dict[tuple[str, IssueType], Issue]:
    return {(i.layer, i.issue_type): i for i in detect(record, OURS)}


def loud(report: Report) -> list[tuple[str, str, str]]:
    return [(i.severity.value, i.issue_type.value, i.layer) for i in report.issues if i.severity > LOW]
