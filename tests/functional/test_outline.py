"""The outline of a model without values: the graph and the layers that a run of it with values has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import ModelInputError
from tests.functional.snapshots import snapshot


class Net(nn.Module):
    """A branch, a layer that is used twice, a buffer, a frozen layer, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.twice = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
        )
        self.head, self.frozen, self.idle = nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.twice(self.twice(x).relu())
        return self.frozen(self.head(x.mean((2, 3))))


def case() -> tuple[nn.Module, Any, nn.Module]:
    return Net(), (torch.randn(6, 3, 8, 8), torch.randint(0, 2, (6,))), nn.CrossEntropyLoss()


def test_it_has_the_graph_and_the_layers_of_a_run() -> None:
    model, batch, loss_fn = case()
    record = gf.analyze(model, [batch], loss_fn, steps=1)
    found = gf.outline(copy.deepcopy(model).to("meta"), batch, loss_fn)
    assert list(found.graph.nx) == list(record.graph.nx)
    assert set(found.graph.nx.edges) == set(record.graph.nx.edges)
    for of in ("name", "type", "shape", "parameters", "call", "module"):
        assert [getattr(a, of) for a in found] == [getattr(b, of) for b in record]
    for of in ("name", "layer", "shape", "dtype", "trainable"):
        assert [getattr(a, of) for a in found.parameters] == [getattr(b, of) for b in record.parameters]
    assert [a.name for a in found.activations] == [b.name for b in record.activations]
    assert found.never_called == record.never_called == ("idle",)
    assert found.provenance.num_parameters == record.provenance.num_parameters


def test_it_has_no_numbers_and_no_verdict() -> None:
    model, batch, loss_fn = case()
    found = gf.outline(model.to("meta"), batch, loss_fn)
    assert found.steps == 0
    assert not found.losses.size
    assert not any(layer.grad_norm.size for layer in found)
    assert "nothing is said of its health" in found.provenance.notes[0]
    assert gf.detect(found) == ()
    assert found == type(found).from_json(found.to_json())


def test_the_model_is_as_it_was() -> None:
    model, batch, loss_fn = case()
    model.to("meta")
    held = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    gf.outline(model, batch, loss_fn)
    assert held == {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_with_values_is_for_analyze() -> None:
    model, batch, loss_fn = case()
    before = snapshot(model)
    with pytest.raises(ModelInputError, match=r"'stem.weight' has values, on cpu.*`analyze` measures too"):
        gf.outline(model, batch, loss_fn)
    assert snapshot(model) == before
    with pytest.raises(
        ModelInputError, match=r"on the meta device.*`gradflow.outline\(model, batch, loss_fn\)`"
    ):
        gf.analyze(model.to("meta"), [batch], loss_fn)


def test_what_asks_for_values_is_told() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y[y.nonzero()[:, 0]]

    model = Asks().to("meta")
    with pytest.raises(ModelInputError, match="asks for a value where there are only shapes"):
        gf.outline(model, torch.randn(2, 3), lambda y: y.sum())


def test_other_errors_of_the_model_come_through() -> None:
    with pytest.raises(RuntimeError, match="same reduction dim|cannot be multiplied") as raised:
        gf.outline(
            nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2)).to("meta"), torch.randn(2, 3), lambda y: y.sum()
        )
    assert not isinstance(raised.value, ModelInputError)
