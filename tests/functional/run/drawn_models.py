"""Models whose graphs are drawn by hand.

Each model has a twin, a function in which every consumer of a tensor takes its own copy of it through
`edge(source, target, tensor)`. The gradient that a copy retains is what that consumer hands back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Hand:
    """Keeps the copies that consumers take."""

    copies: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    sources: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, source: str, target: str, tensor: Tensor) -> Tensor:
        if not any(t is tensor for t in self.sources.setdefault(source, [])):
            tensor.retain_grad()
            self.sources[source].append(tensor)
        copy = tensor.clone()
        copy.retain_grad()
        self.copies.setdefault((source, target), []).append((tensor, copy))
        return copy

    def flow(self, edge: tuple[str, str]) -> float:
        """‖Σ c‖ over the copies of one tensor, and the root of the sum of squares over tensors."""
        total: dict[int, Tensor] = {}
        for tensor, copy in self.copies[edge]:
            assert copy.grad is not None
            total[id(tensor)] = total.get(id(tensor), torch.zeros_like(copy)) + copy.grad
        return float(torch.stack([g.square().sum() for g in total.values()]).sum().sqrt())

    def grad_norm(self, source: str) -> float:
        grads = [t.grad for t in self.sources[source]]
        return float(torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt())


def end(e: Hand, source: str, y: Tensor, *, mean: str = "mean") -> Tensor:
    """The loss by hand: a square, a mean, the loss."""
    return e(mean, "loss", e("pow", mean, e(source, "pow", y).square()).mean())


class ResidualMLP(nn.Module):
    """Two residual branches in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        h = h + torch.tanh(self.a(h))
        return h + torch.tanh(self.b(h))

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        h = self.inp(x)
        a = torch.tanh(e("a", "tanh", self.a(e("inp", "a", h))))
        h2 = e("inp", "add", h) + e("tanh", "add", a)
        b = torch.tanh(e("b", "tanh@1", self.b(e("add", "b", h2))))
        return end(e, "add@1", e("add", "add@1", h2) + e("tanh@1", "add@1", b))


class ResNetBlock(nn.Module):
    """`out += identity`, where the identity is the output of an in-place ReLU that is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        bn = self.bn(e("stem", "bn", self.stem(x)))
        relu = F.relu(e("bn", "relu", bn))
        bn1 = self.bn1(e("conv1", "bn1", self.conv1(e("relu", "conv1", relu))))
        relu1 = F.relu(e("bn1", "relu@1", bn1))
        bn2 = self.bn2(e("conv2", "bn2", self.conv2(e("relu@1", "conv2", relu1))))
        out = e("bn2", "add", bn2) + e("relu", "add", relu)
        return end(e, "relu@2", F.relu(e("add", "relu@2", out)))


class DenseBlock(nn.Module):
    """Every layer takes all that came before, concatenated anew."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.one, self.two, self.out = (nn.Linear(3 * k, 3) for k in (1, 1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        found = [self.inp(x)]
        found.append(self.one(found[0]))
        found.append(self.two(torch.cat(found, -1)))
        return self.out(torch.cat(found, -1))

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        inp = self.inp(x)
        one = self.one(e("inp", "one", inp))
        two = self.two(e("cat", "two", torch.cat([e("inp", "cat", inp), e("one", "cat", one)], -1)))
        cat = torch.cat([e("inp", "cat@1", inp), e("one", "cat@1", one), e("two", "cat@1", two)], -1)
        return end(e, "out", self.out(e("cat@1", "out", cat)))


class GPTBlock(nn.Module):
    """Pre-norm attention with one projection for query, key and value, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.ln1, self.ln2 = nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.proj, self.up, self.down = (nn.Linear(*s) for s in ((4, 12), (4, 4), (4, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        q, k, v = self.qkv(self.ln1(h)).chunk(3, -1)
        weights = torch.bmm(q, k.mT).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e30).softmax(-1)
        h = h + self.proj(torch.bmm(weights, v))
        return h + self.down(F.gelu(self.up(self.ln2(h))))

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        h = self.inp(x)
        qkv = self.qkv(e("ln1", "qkv", self.ln1(e("inp", "ln1", h))))
        q, k, v = e("qkv", "split", qkv).chunk(3, -1)
        scores = torch.bmm(e("split", "bmm", q), e("transpose", "bmm", e("split", "transpose", k).mT))
        masked = e("bmm", "masked_fill", scores).masked_fill(torch.ones(3, 3).triu(1).bool(), -1e30)
        weights = e("masked_fill", "softmax", masked).softmax(-1)
        mixed = torch.bmm(e("softmax", "bmm@1", weights), e("split", "bmm@1", v))
        h2 = e("inp", "add", h) + e("proj", "add", self.proj(e("bmm@1", "proj", mixed)))
        up = self.up(e("ln2", "up", self.ln2(e("add", "ln2", h2))))
        down = self.down(e("gelu", "down", F.gelu(e("up", "gelu", up))))
        return end(e, "add@1", e("add", "add@1", h2) + e("down", "add@1", down))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.pool = nn.Conv1d(1, 2, 3, padding=1), nn.AvgPool1d(2)
        self.mid, self.up = nn.Conv1d(2, 4, 3, padding=1), nn.ConvTranspose1d(4, 2, 2, stride=2)
        self.dec = nn.Conv1d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        enc = torch.relu(self.enc(x))
        up = self.up(torch.relu(self.mid(self.pool(enc))))
        return self.dec(torch.cat([up, enc], 1))

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        enc = torch.relu(e("enc", "relu", self.enc(x)))
        mid = self.mid(e("pool", "mid", self.pool(e("relu", "pool", enc))))
        up = self.up(e("relu@1", "up", torch.relu(e("mid", "relu@1", mid))))
        both = torch.cat([e("up", "cat", up), e("relu", "cat", enc)], 1)
        return end(e, "dec", self.dec(e("cat", "dec", both)))


class Siamese(nn.Module):
    """One encoder, a sequence of modules, called on two inputs that share a layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.Tanh())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.encoder(self.inp(x)) - self.encoder(self.inp(y))).abs()

    def by_hand(self, e: Hand, x: Tensor, y: Tensor) -> Tensor:
        sides = []
        for at, z in (("", x), ("@1", y)):
            h = self.encoder[0](e(f"inp{at}", f"encoder.0{at}", self.inp(z)))
            sides.append(torch.tanh(e(f"encoder.0{at}", f"encoder.1{at}", h)))
        difference = e("encoder.1", "sub", sides[0]) - e("encoder.1@1", "sub", sides[1])
        return end(e, "abs", e("sub", "abs", difference).abs())


class Experts(nn.Module):
    """A mixture of experts: each row goes to the expert that its gate likes best, weighted by the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate = nn.Linear(4, 4), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def route(self, x: Tensor) -> list[Tensor]:
        return [(self.gate(self.inp(x)).detach().argmax(-1) == k).nonzero()[:, 0] for k in range(2)]

    def forward(self, x: Tensor, rows0: Tensor, rows1: Tensor) -> Tensor:
        h = self.inp(x)
        p = self.gate(h).softmax(-1)
        out = torch.zeros(len(x), 3, dtype=x.dtype)
        for k, rows in enumerate((rows0, rows1)):
            out = out.index_add(0, rows, self.experts[k](h[rows]) * p.select(1, k)[rows].unsqueeze(-1))
        return out

    def by_hand(self, e: Hand, x: Tensor, rows0: Tensor, rows1: Tensor) -> Tensor:
        h = self.inp(x)
        p = e("gate", "softmax", self.gate(e("inp", "gate", h))).softmax(-1)
        out, behind = torch.zeros(len(x), 3, dtype=x.dtype), ""
        marks = (("index", "select", "index@1", "unsqueeze", "mul", "index_add"),
                 ("index@2", "select@1", "index@3", "unsqueeze@1", "mul@1", "index_add@1"))  # fmt: skip
        for k, (rows, (take, column, share, wide, mul, add)) in enumerate(
            zip((rows0, rows1), marks, strict=True)
        ):
            y = self.experts[k](e(take, f"experts.{k}", e("inp", take, h)[rows]))
            weight = e(column, share, e("softmax", column, p)[:, k])[rows]
            weight = e(wide, mul, e(share, wide, weight).unsqueeze(-1))
            product = e(f"experts.{k}", mul, y) * weight
            base = e(behind, add, out) if behind else out
            out, behind = base.index_add(0, rows, e(mul, add, product)), add
        return end(e, "index_add@1", out)


class ClassToken(nn.Module):
    """A model that owns a parameter and has layers in it: what happens between them are operations."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.a(x)], 1)
        return self.b(h.select(1, 0) * h.sum(1))  # `h[:, 0]` is two operations in older releases

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        h = torch.cat([e("expand", "cat", token), e("a", "cat", self.a(x))], 1)
        product = e("select", "mul", e("cat", "select", h)[:, 0]) * e("sum", "mul", e("cat", "sum", h).sum(1))
        out = self.b(e("mul", "b", product))
        return end(e, "(model)", e("b", "(model)", out).clone())


class Several(nn.Module):
    """A tensor that one consumer takes twice, and layers with several inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)
        self.c, self.d = nn.Linear(3, 2), nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y, (hidden, cell) = self.rnn(h * h)
        return self.c(y).mean(1) + self.d(hidden[0], cell[0])

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        h = self.a(x)
        y, (hidden, cell) = self.rnn(e("mul", "rnn", e("a", "mul", h) * e("a", "mul", h)))
        mean = e("c", "mean", self.c(e("rnn", "c", y))).mean(1)
        first = e("select", "d", e("rnn", "select", hidden)[0])
        second = e("select@1", "d", e("rnn", "select@1", cell)[0])
        total = e("mean", "add", mean) + e("d", "add", self.d(first, second))
        return end(e, "add", total, mean="mean@1")


class Broadcast(nn.Module):
    """Operations that broadcast, change the dtype, and join a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.column, self.scale = nn.Linear(4, 3), nn.Linear(4, 1), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.row(x).float() * self.column(x)) * self.scale

    def by_hand(self, e: Hand, x: Tensor) -> Tensor:
        row = e("row", "to_copy", self.row(x)).float()
        product = e("to_copy", "mul", row) * e("column", "mul", self.column(x))
        out = e("mul", "mul@1", product) * self.scale
        return end(e, "(model)", e("mul@1", "(model)", out).clone())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# name -> (model, batch, edges from inputs, which need no gradient)
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], set[tuple[str, str]]]] = {
    "residual MLP": (ResidualMLP, lambda m: normal(5, 4), {("input", "inp")}),
    "ResNet block": (ResNetBlock, lambda m: normal(3, 2, 4, 4), {("input", "stem")}),
    "dense block": (DenseBlock, lambda m: normal(5, 3), {("input", "inp")}),
    "GPT block": (GPTBlock, lambda m: normal(2, 3, 4), {("input", "inp")}),
    "U-Net": (UNet, lambda m: normal(3, 1, 8), {("input", "enc")}),
    "siamese": (Siamese, lambda m: (normal(5, 4), normal(5, 4)), {("input.0", "inp"), ("input.1", "inp@1")}),
    "experts": (
        Experts,
        lambda m: (x := normal(9, 4), *m.route(x)),
        {("input.0", "inp"), *((f"input.{1 + i // 2}", f"index@{i}" if i else "index") for i in range(4)),
         ("input.1", "index_add"), ("input.2", "index_add@1")},
    ),
    "class token": (ClassToken, lambda m: normal(5, 3, 4), {("input", "a"), ("input", "(model)")}),
    "several": (Several, lambda m: normal(5, 3, 4), {("input", "a")}),
    "broadcast": (Broadcast, lambda m: normal(5, 4), {("input", n) for n in ("row", "column", "(model)")}),
}  # fmt: skip


def built(name: str) -> tuple[Any, Any, set[tuple[str, str]]]:
    torch.manual_seed(3)
    make, draw, inputs = MODELS[name]
    model = make().double()
    return model, draw(model), inputs
