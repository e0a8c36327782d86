"""Models that take and return more than one tensor: containers of every kind, other dtypes, empty batches."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gradflow as gf
from tests.hostile.harness import check
from tests.models import CASES as MODELS
from tests.models import Case, squares


class Pair(NamedTuple):
    y: Tensor
    extra: Tensor | None


@dataclasses.dataclass
class Fields:
    y: Tensor
    extra: Any = None
    name: str = "fields"


@dataclasses.dataclass(frozen=True)
class Frozen:
    y: Tensor
    inner: Fields


class Layer(nn.Module):
    """A layer with a weight of its own that packs its output by a function."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.pack = nn.Parameter(torch.randn(4, 4)), pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x @ self.weight)


class Packed(nn.Module):
    """A layer with a packed output, between two plain ones; returns a packed output itself."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inp, self.layer, self.out = nn.Linear(4, 4), Layer(pack), nn.Linear(4, 4)
        self.pack, self.unpack = pack, unpack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.out(self.unpack(self.layer(torch.tanh(self.inp(x))))))


def model_output(y: Tensor) -> Any:
    found = pytest.importorskip("transformers.modeling_outputs", reason="transformers is not installed")
    return found.BaseModelOutput(last_hidden_state=y, hidden_states=(y * 2, y.sin()))


PACKS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dict": (lambda y: {"y": y, "extra": None, "n": 3}, lambda o: o["y"]),
    "ordered dict": (lambda y: OrderedDict(y=y, z=y.sin()), lambda o: o["y"] + o["z"]),
    "tuple": (lambda y: (y, y * 2), lambda o: o[0] * o[1]),
    "list": (lambda y: [y, None, y.cos()], lambda o: o[0] + o[2]),
    "named tuple": (lambda y: Pair(y, None), lambda o: o.y),
    "dataclass": (lambda y: Fields(y, [y.exp()]), lambda o: o.y + o.extra[0]),
    "frozen dataclass": (lambda y: Frozen(y, Fields(y.sin())), lambda o: o.y * o.inner.y),
    "nested": (
        lambda y: {"a": [(y, {"b": Pair(y.sin(), y.cos())})], "c": None},
        lambda o: o["a"][0][0] + o["a"][0][1]["b"].y * o["a"][0][1]["b"].extra,
    ),
    "the same tensor twice": (lambda y: (y, y), lambda o: o[0] * o[1]),
    "views of one tensor": (lambda y: y.chunk(2, -1), lambda o: torch.cat([o[1], o[0]], -1)),
    "unbound": (lambda y: y.unbind(-1), lambda o: torch.stack(list(o), -1)),
    "with integers": (lambda y: (y, y.argmax(-1), y > 0), lambda o: o[0] * o[2] + o[1][:, None]),
    "ModelOutput": (model_output, lambda o: o.last_hidden_state + o.hidden_states[1] * o[1][0]),
}


@pytest.mark.parametrize("name", PACKS)
def test_outputs(name: str) -> None:
    pack, unpack = PACKS[name]
    # where an output is used inside the layer as well, a probe changes the order of the sum
    rtol = 1e-6 if name in ("nested", "ModelOutput") else 0.0
    case = Case(lambda: Packed(pack, unpack), lambda: torch.randn(5, 4), lambda out: squares(unpack(out)))
    check(case, rtol=rtol)


class ReturnsNothing(nn.Module):
    """Its layers write their results where others find them, and return None."""

    class Writer(nn.Module):
        def __init__(self, store: dict[str, Tensor]) -> None:
            super().__init__()
            self.weight, self.store = nn.Parameter(torch.randn(4, 4)), store

        def forward(self, x: Tensor) -> None:
            self.store["h"] = x @ self.weight

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Tensor] = {}
        self.inp, self.writer, self.out = nn.Linear(4, 4), self.Writer(self.store), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        assert self.writer(self.inp(x)) is None
        return self.out(self.store["h"])


class Opaque:
    """An output of a class that nobody knows."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_a_layer_that_returns_none_is_noted() -> None:
    case = Case(ReturnsNothing, lambda: torch.randn(5, 4), squares)
    record = check(case, outputs=False, note="'writer' elsewhere than by what it returned")
    assert record.parameter("writer.weight").reached.all()
    assert record.graph_record is not None
    assert all(node.reachable for node in record.graph_record.nodes)


def test_an_output_of_an_unknown_class_is_handed_on_and_noted() -> None:
    case = Case(lambda: Packed(Opaque, lambda o: o.y), lambda: torch.randn(5, 4), lambda out: squares(out.y))
    check(case, outputs=False, note="'layer' elsewhere than by what it returned")


# ---------------------------------------------------------------------------------------- arguments


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(4, 4), self.Inner()

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(4, 4)

        def forward(self, *, h: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
            h = self.b(input=h) * scale
            return h if mask is None else h.masked_fill(mask, 0.0)

    def forward(self, x: Tensor, /, *, bias: Tensor | None = None, depth: int = 2, **rest: Any) -> Tensor:
        h = self.a(x) if bias is None else self.a(x) + bias
        for _ in range(depth):
            h = self.inner(h=torch.tanh(h), mask=rest.get("mask"))
        return h


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = KeywordOnly()

    def forward(self, *, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, bias=bias, mask=mask)


class Kinds(nn.Module):
    """Takes integers, booleans and plain numbers beside floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.order: Tensor
        self.allowed: Tensor
        self.register_buffer("order", torch.arange(4))
        self.register_buffer("allowed", torch.tensor([True, False, True, True]))

    def forward(self, t: Tensor, mask: Tensor, x: Tensor, power: int, name: str) -> Tensor:
        h = self.embedding(t.to(torch.int32)).sum(1) * mask[:, None] + x.to(torch.float32)
        return self.out(h[:, self.order.flip(0)] ** power) * self.allowed


def kinds() -> Any:
    return (
        torch.randint(0, 7, (5, 3)),
        torch.rand(5) > 0.3,
        torch.randint(0, 9, (5, 4), dtype=torch.uint8),
        2,
        "",
    )


class Complex(nn.Module):
    """Complex parameters, activations and outputs, made real by the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4, dtype=torch.complex64)
        self.b, self.real = nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.rfft(x)  # (5, 4)
        h = self.b(torch.polar(self.a(h).abs(), self.a(h).angle()))
        return torch.fft.irfft(h, n=6)[:, :3] @ self.real.weight


class ComplexOutput(Complex):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(torch.fft.rfft(x)))


class PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rnn, self.out = nn.Linear(3, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.inp(x), lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(y)


class TakesPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 5, bidirectional=True), nn.Linear(10, 2)

    def forward(self, packed: PackedSequence) -> PackedSequence:
        y, _ = self.rnn(packed)
        return y._replace(data=self.out(y.data))


class WithWeights(nn.Module):
    """Multi-head attention that returns its weights, masked, and uses them."""

    def __init__(self, average: bool, need: bool) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.average, self.need = average, need

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y, weights = self.attention(
            h, h, h, need_weights=self.need, average_attn_weights=self.average, attn_mask=mask
        )
        y = self.out(y)
        return y if weights is None else y + weights.square().sum()


def size(y: Tensor) -> Tensor:
    return (y * (1 + 2j) + y.conj() * 0.5j).abs().square().mean()


def sequences() -> Tensor:
    return torch.randn(4, 5, 3)


def packed() -> PackedSequence:
    return pack_padded_sequence(torch.randn(6, 3, 3), torch.tensor([6, 4, 1]))


CASES: dict[str, Case] = {
    "keyword-only and default inputs": Case(KeywordOnly, lambda: torch.randn(5, 4), squares),
    "inputs by name": Case(
        ByName, lambda: {"x": torch.randn(5, 4), "mask": torch.rand(5, 4) > 0.5, "bias": None}, squares
    ),
    "integers and booleans": Case(Kinds, kinds, squares),
    "complex inside": Case(Complex, lambda: torch.randn(5, 6), squares),
    "complex output": Case(ComplexOutput, lambda: torch.randn(5, 6), size),
    "packed inside": Case(PackedLSTM, lambda: (torch.randn(3, 6, 3), torch.tensor([2, 6, 3])), squares),
    "packed in and out": Case(TakesPacked, packed, lambda out: squares(out.data)),
    "attention without weights": MODELS["attention"],
    "attention with weights, averaged": Case(lambda: WithWeights(True, True), sequences, squares),
    "attention with weights of each head": Case(lambda: WithWeights(False, True), sequences, squares),
    "masked attention without weights": Case(lambda: WithWeights(True, False), sequences, squares),
}


@pytest.mark.parametrize("name", CASES)
def test_arguments(name: str) -> None:
    check(CASES[name], vjp="have storage" if name.startswith("packed") else "agrees")


# -------------------------------------------------------------------------------------- empty batches


def empty_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


EMPTY: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), lambda: torch.randn(0, 4)),
    "convolution": (empty_cnn, lambda: torch.randn(0, 2, 8, 8)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)),
        lambda: torch.zeros(0, 3, dtype=torch.long),
    ),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), lambda: torch.randn(0, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_empty_batches(name: str) -> None:
    make, draw = EMPTY[name]
    record = check(Case(make, draw, lambda y: y.square().sum()), outputs=False)
    assert all((p.grad_norm == 0).all() for p in record.parameters)


def test_an_empty_batch_whose_loss_is_nan() -> None:
    case = Case(EMPTY["linear"][0], EMPTY["linear"][1], lambda y: F.mse_loss(y, torch.zeros_like(y)))
    record = check(case, outputs=False)
    assert record.losses[0] != record.losses[0]


def test_an_empty_batch_between_full_ones() -> None:
    batches = [torch.randn(n, 4) for n in (5, 0, 3)]
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    report = gf.diagnose(model, batches, lambda y: y.square().sum())
    assert [layer.num_elements.tolist() for layer in report.record] == [[25, 0, 15], [25, 0, 15], [10, 0, 6]]
    assert report.record.parameter("0.weight").grad_norm[1] == 0
    assert str(report)
