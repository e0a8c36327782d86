"""Sessions: what a measurement hears of a run, in which order, and that it leaves no trace."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional.measurement import Session, gradients
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.recorder import Recorder
from gradflow.pipelines import Pipeline, flow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Listening(Session):
    """Writes down what it hears, and takes the gradients of every layer call's output."""

    def __init__(self, heard: list[Any]) -> None:
        self.heard = heard
        self.outputs: dict[str, Tensor] = {}

    def begin(self, step: int, recorder: Recorder) -> None:
        self.recorder, self.outputs = recorder, {}
        self.heard.append(("begin", step))

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        assert not torch.is_grad_enabled()
        self.heard.append(("entered", call.name, len(args)))

    def left(self, call: Call, output: Any) -> None:
        self.outputs[call.name] = output

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        if func is not F.relu:
            return None
        inside = [call.name for call in self.recorder.running()]
        return lambda out: self.heard.append(("relu", inside, bool((out >= 0).all())))

    def differentiate(self, loss: Tensor) -> None:
        found = gradients(loss, list(self.outputs.values()))
        norms = {n: float(g.norm()) for n, g in zip(self.outputs, found, strict=True) if g is not None}
        self.heard.append(("gradients", norms))

    def end(self) -> None:
        self.outputs = {}
        self.heard.append(("end",))

    def notes(self) -> tuple[str, ...]:
        return ("It listened.",)


@attrs.frozen
class Ear:
    """A measurement that hands its session out."""

    heard: list[Any] = attrs.field(eq=False, hash=False)

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        assert set(modules) == {name for name, _ in model.named_modules()}
        return Listening(self.heard)


def model_and_batch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(4, 2)), torch.randn(8, 4)


def loss_of(y: Tensor) -> Tensor:
    return y.square().mean()


def test_what_a_session_hears_and_in_which_order() -> None:
    model, x = model_and_batch()
    heard: list[Any] = []
    record = gf.analyze(model, [x] * 3, loss_of, measurements=[Ear(heard)])
    step = heard[: len(heard) // 3]
    assert [h for h in heard if h[0] == "begin"] == [("begin", 0), ("begin", 1), ("begin", 2)]
    assert [h[:3] for h in step if h[0] != "gradients"] == [
        ("begin", 0),
        ("entered", "", 1),
        ("entered", "0", 1),
        ("entered", "0.first", 1),
        ("relu", ["", "0"], True),
        ("entered", "0.second", 1),
        ("entered", "1", 1),
        ("end",),
    ]
    assert [h[0] for h in step[-2:]] == ["gradients", "end"]
    assert "It listened." in record.provenance.notes


def test_gradients_are_those_that_the_engine_and_plain_autograd_find() -> None:
    model, x = model_and_batch()
    heard: list[Any] = []
    record = gf.analyze(model, [x] * 2, loss_of, measurements=[Ear(heard)])
    norms = [h[1] for h in heard if h[0] == "gradients"]
    for name in ("0.first", "0.second", "1"):
        assert norms[1][name] == pytest.approx(record[name].grad_norm[1], rel=1e-5)
    assert isinstance(model, nn.Sequential)
    h = model[0](x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(model[1](h)), [h])
    assert norms[0]["0"] == pytest.approx(float(grad.norm()), rel=1e-5)


def test_only_steps_that_are_looked_at_are_heard_and_nothing_else_changes() -> None:
    model, x = model_and_batch()
    heard: list[Any] = []
    with_ear = gf.analyze(model, [x] * 12, loss_of, measurements=[Ear(heard)])
    assert [h[1] for h in heard if h[0] == "begin"] == [0, 1, 4, 11]
    plain = gf.analyze(model, [x] * 12, loss_of)
    notes = plain.provenance.notes
    assert attrs.evolve(with_ear, provenance=attrs.evolve(with_ear.provenance, notes=notes)) == plain


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_full_detail_and_an_optimizer(detail: Any) -> None:
    model, x = model_and_batch()
    heard: list[Any] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    record = gf.analyze(
        model, [x] * 3, loss_of, measurements=[Ear(heard)], optimizer=optimizer, detail=detail
    )
    norms = [h[1]["1"] for h in heard if h[0] == "gradients"]
    assert norms == pytest.approx(record["1"].grad_norm.tolist(), rel=1e-5)
    assert norms[0] != norms[2]


class Holder(nn.Module):
    """Uses the parameters of a child without calling it, so it is the layer: found out in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight)


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_a_first_step_that_is_run_again_ends_once(transform: Any) -> None:
    torch.manual_seed(0)
    heard: list[Any] = []
    model = nn.Sequential(Holder(), nn.Linear(4, 2))
    gf.analyze(model, [torch.randn(8, 4)], loss_of, measurements=[Ear(heard)], transform=transform)
    assert [h[:2] for h in heard if h[0] in ("begin", "end")] == [("begin", 0), ("begin", 0), ("end",)]


def test_under_vjp_the_first_step_is_heard() -> None:
    model, x = model_and_batch()
    heard: list[Any] = []
    gf.analyze(model, [x] * 3, loss_of, measurements=[Ear(heard)], transform="vjp")
    assert [h[1] for h in heard if h[0] == "begin"] == [0]


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)


def test_inside_a_reentrant_checkpoint_there_are_no_gradients_but_no_failure() -> None:
    model, x = model_and_batch()
    heard: list[Any] = []
    record = gf.analyze_custom(
        Checkpointed(model),
        lambda m, step: m(x.clone().requires_grad_()),
        loss_of,
        steps=1,
        measurements=[Ear(heard)],
    )
    assert [h[0] for h in heard[-2:]] == ["gradients", "end"]
    loss_of(model(x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = float(parameter.grad.norm())
        assert record.parameter(f"inner.{name}").grad_norm[0] == pytest.approx(expected, rel=1e-5)


def test_vector_jacobian_products_from_a_tensor() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = x.square()
    loss = (y * torch.tensor([1.0, 2.0, 3.0])).sum()
    (cotangent,) = gradients(loss, [y])
    assert cotangent is not None
    (by_chain,) = gradients(y, [x], cotangent)
    (direct, none) = gradients(loss, [x, torch.zeros(1)])
    assert none is None
    torch.testing.assert_close(by_chain, direct)
    torch.testing.assert_close(direct, torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64) * x)


def test_pipelines_join_their_measurements() -> None:
    a, b = Ear([]), Ear([])
    joined = Pipeline("a", [], measurements=[a]) + Pipeline("b", [], measurements=[b]) + flow()
    assert joined.measurements == (a,)  # the two are equal, so one is enough
    assert len(joined.detectors) == len(flow().detectors)


@pytest.mark.parametrize("nested", [False, True])
def test_diagnose_measures_what_its_pipeline_needs(nested: bool) -> None:
    model, x = model_and_batch()
    heard: list[Any] = []
    pipeline = flow() + Pipeline("ear", [], measurements=[Ear(heard)])
    gf.diagnose(model, [x] * 2, loss_of, pipeline=[pipeline] if nested else pipeline)
    assert ("end",) in heard


def test_what_is_no_measurement_is_refused() -> None:
    model, x = model_and_batch()
    with pytest.raises(gf.GradflowError, match="is no measurement. A factory must be called first"):
        gf.analyze(model, [x], loss_of, measurements=[Ear])  # type: ignore[list-item]
    with pytest.raises(gf.GradflowError, match="'attention', which is no measurement"):
        gf.analyze(model, [x], loss_of, measurements=["attention"])  # type: ignore[list-item]


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_nothing_holds_a_step_that_is_over(detail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Recorder]] = []
    seen: list[int] = []
    original = Recorder.__attrs_post_init__

    def made(self: Recorder) -> None:
        alive.append(weakref.ref(self))
        original(self)

    monkeypatch.setattr(Recorder, "__attrs_post_init__", made)
    measurements = [gf.functional.attention(), gf.functional.recurrence(), gf.functional.policy_heads()]
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    gf.analyze(
        model,
        lambda: torch.randn(2, 3, 4),
        lambda y: y.square().mean(),
        steps=6,
        detail=detail,
        measurements=measurements,
        progress=lambda *_: seen.append(sum(recorder() is not None for recorder in alive)),
    )
    assert len(alive) == 6
    assert seen == [0] * 6
