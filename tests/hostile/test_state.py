"""Models with a state: norms, hooks of the users, stored activations, counters, failures on the way."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from tests.functional.snapshots import difference
from tests.hostile.harness import check, untouched
from tests.models import CASES as MODELS
from tests.models import Case, squares


def vectors() -> Tensor:
    return torch.randn(5, 6)


# ------------------------------------------------------------------------------------------- norms


def normed(norm: Callable[[], nn.Module]) -> Case:
    def make() -> nn.Module:
        inner = (nn.Conv2d(2, 4, 3), norm(), nn.ReLU(inplace=True))
        model = nn.Sequential(*inner, nn.Flatten(), nn.Linear(144, 2))
        for tensor in model[1].state_dict().values():
            tensor.add_(1)
        return model

    return Case(make, lambda: torch.randn(5, 2, 8, 8), squares)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "BatchNorm, cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "BatchNorm without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "BatchNorm without parameters": lambda: nn.BatchNorm2d(4, affine=False),
    "SyncBatchNorm without a group": lambda: nn.SyncBatchNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
}


@pytest.mark.parametrize("mode", ["train", "eval", "keep"])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, mode: str) -> None:
    record = check(normed(NORMS[name]), mode=mode)
    assert record.provenance.mode == mode


def test_an_instance_norm_whose_output_is_written_to_is_noted() -> None:
    """It returns a view, of which nobody can tell whether something else looks at the same storage."""
    case = normed(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    check(case, outputs=False, note="No gradient could be measured at the output of '1'")


def test_norms_in_both_modes_at_once() -> None:
    def make() -> nn.Module:
        model: Any = MODELS["resnet"].make()
        model.block1.bn1.eval()
        model.block2.eval()
        return model

    check(Case(make, MODELS["resnet"].draw, squares), mode="keep")


# ------------------------------------------------------------------------------------------- hooks


class Log:
    """What hooks have seen; a copy of it is itself."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, *args: Any) -> None:
        self.seen.append(1.0)


def quarter(module: nn.Module, args: Any, out: Tensor) -> None:
    out.register_hook(lambda g: g * 0.25)


def halve_in_place(module: nn.Module, args: Any, out: Tensor) -> None:
    def halve(g: Tensor) -> None:
        g.mul_(0.5)

    out.register_hook(halve)


def hooked(kind: str) -> nn.Module:
    """Return a model with a hook that changes what passes, by each way that PyTorch has."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    layer: Any = model[2]
    if kind == "forward":
        layer.register_forward_hook(lambda m, args, out: out * 1.5)
    elif kind == "forward with keywords":
        layer.register_forward_hook(lambda m, args, kwargs, out: 1.5 * out, with_kwargs=True)
    elif kind == "forward pre":
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 1.5,))
    elif kind == "full backward":
        layer.register_full_backward_hook(lambda m, into, out: (into[0] * 0.25,))
    elif kind == "full backward pre":
        layer.register_full_backward_pre_hook(lambda m, out: (out[0] * 0.25,))
    elif kind == "tensor":
        layer.register_forward_hook(quarter)
    elif kind == "tensor, in place":
        layer.register_forward_hook(halve_in_place)
    elif kind == "parameter":
        layer.weight.register_hook(lambda g: g * 0.25)
        layer.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        layer.bias.register_hook(lambda g: None)
    elif kind == "tied parameter":
        model[0].weight = layer.weight
        layer.weight.register_hook(lambda g: g * 0.25)
    elif kind == "removed":
        layer.weight.register_hook(lambda g: g * 0.25).remove()
    return model


HOOKS = (
    "forward", "forward with keywords", "forward pre", "full backward", "full backward pre", "tensor",
    "tensor, in place", "parameter", "tied parameter", "removed",
)  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_the_users_act_as_in_a_plain_backward_pass(kind: str) -> None:
    # the naive version hooks in behind them
    outputs = kind in ("parameter", "tied parameter", "removed")
    vjp = "setup_context" if kind.startswith("full backward") else "agrees"
    check(Case(lambda: hooked(kind), vectors, squares), outputs=outputs, vjp=vjp)


def test_hooks_that_run_after_a_gradient_was_accumulated_are_noted_and_not_run() -> None:
    model, seen, x = hooked(""), [], vectors()

    def step(p: Tensor) -> None:
        assert p.grad is not None
        seen.append(p.grad.norm().item())
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with untouched(model):
        record = gf.analyze(model, [x] * 2, squares)
    assert seen == []
    assert [n for n in record.provenance.notes if "after a gradient was accumulated are not run" in n]
    squares(model(x)).backward()
    found = {float(p.grad_norm[0]) for p in record.parameters}
    np.testing.assert_allclose(sorted(found), sorted(seen), rtol=1e-6)


def test_step_hooks_of_an_optimizer_are_noted_and_not_run() -> None:
    model, log = hooked(""), Log()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(log)
    record = gf.analyze(model, [vectors()] * 3, squares, optimizer=optimizer)
    assert log.seen == []
    assert [n for n in record.provenance.notes if n.startswith("The step hooks of the SGD are not run")]


def test_hooks_for_all_modules_run() -> None:
    log = Log()
    handle = nn.modules.module.register_module_forward_hook(log)
    try:
        check(MODELS["relu modules"])
    finally:
        handle.remove()
    assert log.seen


# --------------------------------------------------------------------------------- stores and counts


class Keeps(nn.Module):
    """Stores what it computes on itself, and uses what it stored in a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)
        self.kept: list[Tensor] = []
        self.last: Any = None
        self.by_name: dict[str, Any] = {}
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.kept.append(h)
        self.last, self.by_name["h"] = h, {"h": h, "x": x}
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        self.none = h.detach()
        return self.b(torch.tanh(h - self.average)) + self.kept[-1].mean() + self.last.square().sum()


class KeepsInLayer(nn.Module):
    """A layer that keeps its own output, which the model's loss takes from there."""

    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.seen = super().forward(input)
            return self.seen

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self.Layer(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) + self.a.seen.square().mean()


class Counts(nn.Module):
    """Behaves by how often it was called, and by what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 6), nn.Linear(6, 2), 0
        self.register_buffer("step", torch.tensor(0))
        self.random, self.generator = random.Random(1), torch.Generator().manual_seed(2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.step += 1
        h = self.a(x) * (1.0 + 0.1 * self.calls) + 0.1 * float(self.step)
        h = h + self.random.random() + torch.rand((), generator=self.generator)
        return self.b(F.dropout(h, 0.3))


class Cached(nn.Module):
    """Keeps a mask that it built in the first call, and a table of positions that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mask, self.tables = nn.Linear(6, 6), None, {}

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.linspace(0, 1, 6)
        table = self.tables.setdefault(x.shape[0], torch.linspace(0, 1, x.shape[0]))
        return self.a(x) * self.mask + table[:, None]


class Stateful(nn.Module):
    """Carries a hidden state from call to call, detached."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out, self.h = nn.GRUCell(6, 4), nn.Linear(4, 2), torch.zeros(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.cell(x, self.h.detach())
        return self.out(self.h)


STATES: dict[str, Case] = {
    "keeps activations": Case(Keeps, vectors, squares),
    "counts": Case(Counts, vectors, squares),
    "caches": Case(Cached, vectors, squares),
    "carries a state": Case(Stateful, vectors, squares),
}


@pytest.mark.parametrize("name", STATES)
def test_states(name: str) -> None:
    check(STATES[name])


def test_a_layer_that_keeps_its_output_where_the_loss_finds_it() -> None:
    check(Case(KeepsInLayer, vectors, squares), outputs=False, rtol=1e-6)  # their gradient is whole


def test_an_iterator_on_a_model_is_noted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.number = nn.Linear(6, 2), itertools.count()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * (1 + next(self.number))

    record = gf.analyze(Model(), [vectors()] * 2, squares)
    assert [n for n in record.provenance.notes if "'number' is an iterator, which cannot be put back" in n]


# ------------------------------------------------------------------------------------------ failures


class Fails(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.bn, self.calls = nn.Linear(6, 6), nn.Linear(6, 2), nn.BatchNorm1d(6), 0
        self.kind, self.kept = kind, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(h := self.bn(self.a(x)))
        if self.calls == 3 and self.kind == "forward":
            raise ValueError("the third batch")
        if self.calls == 3 and self.kind == "shape":
            h = h[:, :5]
        if self.calls == 3 and self.kind == "backward":
            h.register_hook(lambda g: 1 / 0)
        return self.b(h)


FAILURES: dict[str, tuple[type[Exception], str]] = {
    "forward": (ValueError, "the third batch"),
    "shape": (RuntimeError, "shapes cannot be multiplied"),
    "backward": (ZeroDivisionError, "division by zero"),
}


@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("kind", FAILURES)
def test_a_model_that_raises_on_the_third_batch(kind: str, detail: Any) -> None:
    error, message = FAILURES[kind]
    torch.manual_seed(0)
    model, batches = Fails(kind), [vectors() for _ in range(5)]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with untouched(model), pytest.raises(error, match=message) as caught:
        gf.diagnose(model, batches, squares, detail=detail, optimizer=torch.optim.Adam(model.parameters()))
    assert any("raised at step 2" in note for note in caught.value.__notes__)
    model.kind = ""
    assert gf.analyze(model, batches, squares, detail=detail).steps == 5


def test_an_analysis_inside_a_training_loop_changes_nothing_in_it() -> None:
    def train(look: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model, found = MODELS["cnn"].build(), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            loss = squares(model(MODELS["cnn"].batch()))
            loss.backward()
            if look and step % 2:
                gf.diagnose(model, [MODELS["cnn"].batch()] * 2, squares, optimizer=optimizer)
            optimizer.step()
            found.append(loss.item())
        return {"losses": found, "weights": [p.detach().numpy().tobytes() for p in model.parameters()]}

    assert difference(train(False), train(True)) == ""
