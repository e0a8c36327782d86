"""Dropout layers, and what drops in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import FlowRecord


class Net(nn.Module):
    """A layer, and dropout in one of several ways behind it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc, self.drop, self.way, self.evaluated = nn.Linear(6, 6), nn.Dropout(0.2), way, 0
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        self.evaluated += not self.training
        x = self.norm(self.fc(x))
        if self.way == "layer":
            return self.drop(x)
        if self.way == "told":
            return F.dropout(x, 0.3, self.training)
        if self.way == "always":
            return F.dropout(x, 0.3)
        if self.way == "attention":
            x = x[None, None]
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.4)[0, 0]
        if self.way == "noise":
            return x + torch.randn_like(x)
        if not self.training:
            raise RuntimeError("no eval mode")
        return F.dropout(x, 0.3)


def record_of(model: nn.Module, **options: object) -> FlowRecord:
    return gf.analyze(model, lambda: torch.randn(8, 6), lambda y: y.square().mean(), steps=3, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("layer", []),
        ("told", []),
        ("noise", []),
        ("always", [("", 0.3)]),
        ("attention", [("", 0.4)]),
        ("raises", []),
    ],
)
def test_what_drops_in_eval_mode(way: str, expected: list[tuple[str, float]]) -> None:
    record = record_of(Net(way))
    assert [(d.name, d.p) for d in record.parts.dropouts if d.in_eval] == expected
    assert [(d.name, d.p) for d in record.parts.dropouts if not d.in_eval] == [("drop", 0.2)]


@pytest.mark.parametrize("way", ["layer", "always", "raises"])
def test_the_pass_in_eval_mode_leaves_no_trace(way: str) -> None:
    model = Net(way)
    model.drop.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    record_of(model, seed=5, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert torch.equal(state, torch.get_rng_state())
    assert (model.training, model.drop.training, model.evaluated) == (True, False, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_steps_are_what_they_are_without_it() -> None:
    losses = []
    for way in ("always", "told"):
        torch.manual_seed(0)
        losses.append(record_of(Net(way), seed=1).losses.tolist())
    assert losses[0] == losses[1]


def test_a_layer_that_stays_in_train_mode_is_seen_if_functions_drop_elsewhere() -> None:
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> Stubborn:
            return super().train(True)

    model = Net("told")
    model.norm = nn.Sequential(nn.BatchNorm1d(6), Stubborn(0.1))  # type: ignore[assignment]
    assert [(d.name, d.in_eval) for d in record_of(model).parts.dropouts] == [
        ("drop", False),
        ("norm.1", True),
    ]
