"""The engine's numbers against plain PyTorch: parameter gradients, output gradients, both transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gradflow.functional import analyze


class Residual(nn.Module):
    """A block that adds in place, behind an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.act(self.a(x))
        out = self.b(out)
        out += identity
        return F.relu(out, inplace=True)


class Ignored(nn.Module):
    """An in-place activation whose return value nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        kept = h
        self.act(h)
        return self.b(h) + kept


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(t))))


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 + int(x[0, 0] > 0)):
            x = torch.tanh(self.cell(x))
        return x


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class FlattenedInPlace(nn.Module):
    """Writes into a view that a layer returned, and uses the viewed tensor afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.flat, self.b = nn.Linear(6, 6), nn.Flatten(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unsqueeze(-1)
        flat = self.flat(h)
        flat *= 2.0
        return self.b(flat) + h.squeeze(-1)


def x2(*shape: int, n: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=g) for _ in range(n)]


def tokens() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, 9, (4, 5), generator=g) for _ in range(3)]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), lambda: x2(7, 6)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3),
        ),
        lambda: x2(5, 2, 8, 8),
    ),
    "residual": (lambda: nn.Sequential(nn.Linear(6, 6), Residual(), Residual()), lambda: x2(7, 6)),
    "ignored": (Ignored, lambda: x2(7, 6)),
    "tied": (Tied, tokens),
    "looped": (Looped, lambda: x2(7, 6)),
    "lstm": (lambda: Recurrent("LSTM"), lambda: x2(4, 9, 6)),
    "gru": (lambda: Recurrent("GRU"), lambda: x2(4, 9, 6)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True), lambda: x2(4, 5, 6)
    ),
    "flattened": (FlattenedInPlace, lambda: x2(7, 6)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 3)), lambda: x2(7, 6)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(6, 3)), lambda: x2(7, 6)),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    make, data = MODELS[name]
    batches = [x.to(dtype) if x.is_floating_point() else x for x in data()]
    return make().to(dtype), batches


def loss_fn(output: Tensor) -> Tensor:
    return (output.square() * torch.arange(output.numel()).view_as(output).sin()).mean()


def plain(model: nn.Module, batches: list[Any]) -> tuple[list[float], dict[str, list[Tensor]]]:
    """Losses and parameter gradients of a plain backward pass per batch, parameters held fixed."""
    losses: list[float] = []
    gradients: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss = loss_fn(model(batch))
        loss.backward()
        losses.append(loss.item())
        for n, p in model.named_parameters():
            assert p.grad is not None
            gradients[n].append(p.grad.clone())
    return losses, gradients


@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_parameter_gradients_are_those_of_a_plain_backward_pass(name: str, detail: str) -> None:
    model, batches = build(name, torch.float64)
    record = analyze(model, batches, loss_fn, steps=3, detail=detail)
    losses, gradients = plain(model, batches)
    np.testing.assert_allclose(record.losses, losses, rtol=1e-12)
    for n, expected in gradients.items():
        found = record.parameter(n)
        np.testing.assert_allclose(found.grad_norm, [g.norm() for g in expected], rtol=1e-9)
        assert found.grad_zero_share[0] == float((expected[0] == 0).double().mean())


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("flattened", "ignored")])
def test_output_gradients_are_those_retained(name: str) -> None:
    """A naive version: `retain_grad` on what each layer's forward returned, through a wrapper."""
    model, batches = build(name, torch.float64)
    record = analyze(model, batches, loss_fn, steps=3)
    for step, batch in enumerate(batches):
        kept: list[tuple[str, int, list[Tensor]]] = []
        counts: dict[str, int] = {}
        for layer in record:
            counts.setdefault(layer.module, 0)
        originals = {n: m.forward for n, m in model.named_modules() if n in counts}

        def retaining(n: str, originals: Any = originals, counts: Any = counts, kept: Any = kept) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                out = originals[n](*args, **kwargs)
                tensors = [t * 1 for t in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(t)]
                for t in tensors:
                    t.retain_grad()
                kept.append((n, counts[n], tensors))
                counts[n] += 1
                handed = [t.clone() for t in tensors]  # which the model may change in place
                return tuple(handed) if isinstance(out, tuple) else handed[0]

            return forward

        for n, m in model.named_modules():
            if n in originals and not (
                isinstance(m, (nn.LSTM, nn.GRU)) or "MultiheadAttention" in type(m).__name__
            ):
                m.__dict__["forward"] = retaining(n)
        try:
            loss_fn(model(batch)).backward()
        finally:
            for m in model.modules():
                m.__dict__.pop("forward", None)
        assert kept
        for n, number, tensors in kept:
            squares = sum(float(t.grad.square().sum()) for t in tensors if t.grad is not None)
            layer = record[f"{n}@{number}" if number else n]
            np.testing.assert_allclose(layer.grad_norm[step], np.sqrt(squares), rtol=1e-9, err_msg=layer.name)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "spectral norm"])
def test_transforms_agree(name: str) -> None:
    model, batches = build(name, torch.float64)
    fused = analyze(model, batches, loss_fn, steps=3, transform="fused")
    vjp = analyze(model, batches, loss_fn, steps=3, transform="vjp")
    assert (fused.provenance.transform, vjp.provenance.transform) == ("fused", "vjp")
    np.testing.assert_allclose(vjp.losses, fused.losses, rtol=1e-10)
    assert [layer.name for layer in vjp] == [layer.name for layer in fused]
    for a, b in zip(fused, vjp, strict=True):
        np.testing.assert_allclose(b.grad_norm, a.grad_norm, rtol=1e-8, err_msg=a.name)
        np.testing.assert_allclose(b.output_rms, a.output_rms, rtol=1e-10)
    for p, q in zip(fused.parameters, vjp.parameters, strict=True):
        np.testing.assert_allclose(q.grad_norm, p.grad_norm, rtol=1e-8, err_msg=p.name)
    assert fused.graph_record == vjp.graph_record


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "encoder", "lstm"])
def test_cheap_and_full_agree(name: str) -> None:
    model, batches = build(name)
    cheap = analyze(model, batches, loss_fn, steps=3)
    full = analyze(model, batches, loss_fn, steps=3, detail="full")
    for a, b in zip(cheap, full, strict=True):
        np.testing.assert_allclose(b.grad_norm, a.grad_norm, rtol=1e-4, err_msg=a.name)


def test_tiny_gradients_are_told_from_none_and_huge_ones_from_infinite() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for scale, power in ((1e-30, -30), (1e25, 25)):
        record = analyze(model, x2(8, 4, n=4), lambda y, s=scale: (y * s).sum(), steps=4)
        norms = record["1"].grad_norm
        assert record["1"].grad_finite.all()
        assert not record["1"].grad_zero.any()
        np.testing.assert_allclose(norms, np.sqrt(32) * 10.0**power, rtol=1e-5)
    record = analyze(model, x2(8, 4), lambda y: (y * 0.0).sum(), steps=3)
    assert record["0"].grad_zero.all()
    assert (record["0"].grad_norm == 0).all()


def test_bfloat16() -> None:
    model, batches = build("mlp", torch.bfloat16)
    record = analyze(model, batches, lambda y: y.float().square().mean(), steps=3)
    model32, _ = build("mlp")
    exact = analyze(model32, batches_to32(batches), lambda y: y.square().mean(), steps=3)
    for a, b in zip(record, exact, strict=True):
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=0.1)
    assert record.provenance.dtypes == ("bfloat16",)


def batches_to32(batches: list[Tensor]) -> list[Tensor]:
    return [b.float() for b in batches]


def test_number_of_calls_may_change_from_step_to_step() -> None:
    model, batches = build("looped")
    signs = [float(b[0, 0]) for b in batches]
    record = analyze(model, batches, loss_fn, steps=3)
    assert record["cell@1"].called.all()
    if any(s > 0 for s in signs):
        assert record["cell@2"].called.tolist() == [s > 0 for s in signs]
        assert np.isnan(record["cell@2"].grad_norm[[s <= 0 for s in signs]]).all()
