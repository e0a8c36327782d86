"""Models that write in place: activations, `h += x`, views and slices, results that nobody takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from tests.hostile.harness import check, seeded
from tests.models import CASES as MODELS
from tests.models import Case, squares


class Body(nn.Module):
    """Two layers with a function of both between them."""

    def __init__(self, function: Callable[[Body, Tensor], Tensor], *extra: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.extra, self.function = nn.ModuleList(extra), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self, x))


def case(function: Callable[[Any, Tensor], Tensor], *extra: Callable[[], nn.Module]) -> Case:
    return Case(lambda: Body(function, *(make() for make in extra)), lambda: torch.randn(5, 6), squares)


def added(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += x
    h += m.b(h.clone())
    return h


def in_a_row(m: Any, x: Tensor) -> Tensor:
    h = F.dropout(F.relu(m.a(x), inplace=True), 0.3, inplace=False)
    h = torch.sigmoid_(m.b(h).mul_(2.0).sub_(1.0))
    return F.leaky_relu_(h - 0.5, 0.1)


def modules_in_a_row(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    for activation in m.extra:
        h = activation(h)
    return h


def dropped(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    m.extra[0](h)  # what it returns is not taken: `h` has been changed
    return m.b(h) + h


def taken(m: Any, x: Tensor) -> Tensor:
    h = m.extra[0](m.a(x))
    return m.b(h) + h


def dropped_functions(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.mul_(2.0)
    h.add_(x).relu_()
    return m.b(h)


def row(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h[0] = 0.0
    h[1:3] += 1.0
    h[:, 2] *= 3.0
    h[3, :] = m.b(x)[0]
    return h


def view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    flat = h.view(-1)
    flat.mul_(0.5)
    h.t()[0].add_(1.0)
    return h + m.b(h)


def chunks(m: Any, x: Tensor) -> Tensor:
    left, right = m.a(x).tensor_split(2, dim=-1)
    return torch.cat([left * 2, right.sigmoid()], -1)


def filled(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(5, 6)
    out[:2] = m.a(x[:2])
    out[2:] = m.b(x[2:])
    out[4].masked_fill_(torch.arange(6) > 3, 0.0)
    return out


def scattered(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).clone()
    h.index_add_(0, torch.tensor([0, 0, 1]), m.b(x[:3]))
    h.scatter_add_(1, torch.zeros(5, 6, dtype=torch.long), m.b(x))
    h[h > 0.5] = 0.25
    return h


def copied(m: Any, x: Tensor) -> Tensor:
    h = torch.empty(5, 6)
    h.copy_(m.a(x))
    h.mul_(2.0)
    return m.b(h) + h


def output_written_after_use(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    kept = h + 0.0
    h.zero_()
    return kept + m.b(h)


def view_of_a_layer(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).unsqueeze(-1)
    flat = m.extra[0](h)
    flat *= 2.0
    return m.b(flat) + h.squeeze(-1)


def the_input(m: Any, x: Tensor) -> Tensor:
    x *= 2.0
    h = m.a(x)
    return m.b(h.sigmoid())


CASES: dict[str, Case] = {
    "h += x": case(added),
    "functions": case(in_a_row),
    "modules": case(modules_in_a_row, lambda: nn.SiLU(inplace=True), lambda: nn.Mish(inplace=True)),
    "dropout": case(modules_in_a_row, lambda: nn.Dropout(0.4, inplace=True), lambda: nn.Identity()),
    "silu and hardtanh": case(
        modules_in_a_row, lambda: nn.SiLU(inplace=True), lambda: nn.Hardtanh(-0.1, 0.1, inplace=True)
    ),
    "functions whose result is dropped": case(dropped_functions),
    "rows and columns": case(row),
    "views": case(view),
    "chunks": case(chunks),
    "a buffer that is filled": case(filled),
    "scatter and masks": case(scattered),
    "copy_": case(copied),
    "an output zeroed after use": case(output_written_after_use),
    "the input": case(the_input),
    "resnet": MODELS["resnet"],
    "cnn": MODELS["cnn"],
}


@pytest.mark.parametrize("name", CASES)
def test_in_place(name: str) -> None:
    check(CASES[name], vjp="mutate a captured Tensor" if name == "the input" else "agrees")


MODULES: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "ELU": lambda: nn.ELU(inplace=True),
    "Dropout": lambda: nn.Dropout(0.3, inplace=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_an_activation_whose_result_is_dropped(name: str) -> None:
    """It is as if it had been taken, which is what the naive version, with its copies, is made for."""
    record = check(case(dropped, MODULES[name]), outputs=False)
    as_taken = check(case(taken, MODULES[name]))
    for a, b in zip(record, as_taken, strict=True):
        np.testing.assert_array_equal(a.grad_norm, b.grad_norm, err_msg=a.name)
        assert a.reached.all()
    model = case(dropped, MODULES[name])
    transformed = gf.analyze(model.build(), seeded(model), squares, steps=4, transform="vjp")
    for a, b in zip(transformed, record, strict=True):
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5, err_msg=a.name)
    assert record.graph_record is not None
    assert all(node.reachable for node in record.graph_record.nodes)


def test_a_view_that_a_layer_returned() -> None:
    note = "No gradient could be measured at the output of 'extra.0'"
    record = check(case(view_of_a_layer, nn.Flatten), outputs=False, note=note)
    assert np.isnan(record["extra.0"].grad_norm).all()


class Broken(nn.Module):
    """Writes over what its own backward pass needs; plain PyTorch refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).exp()
        y = self.out(h)
        h.mul_(2.0)
        return y


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_what_pytorch_refuses_is_refused_as_it_refuses_it(detail: Any) -> None:
    model, x = Broken(), torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares(model(x)).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gf.analyze(model, [x] * 2, squares, detail=detail)
