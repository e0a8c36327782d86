"""Random models with planted parts that no gradient reaches, each with the reason that was planted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.records import Reason


@attrs.frozen
class Expected:
    """What was planted: at a parameter, the slices along an axis (None: all of it), for one reason."""

    parameter: str
    reason: Reason
    axis: int | None = None
    slices: frozenset[int] = frozenset()


class Branch(nn.Module):
    """A part that maps (batch, width) to (batch, width), with one planted fault."""

    expected: tuple[Expected, ...] = ()

    def plant(self, reason: Reason, *names: str, axis: int | None = None, slices: Any = ()) -> None:
        """Note what was planted at some parameters."""
        new = tuple(Expected(name, reason, axis, frozenset(slices)) for name in names)
        self.expected = (*self.expected, *new)


def _some(draw: random.Random, number: int) -> list[int]:
    return sorted(draw.sample(range(number), draw.randint(1, max(1, number // 2))))


class Alive(Branch):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.act = draw.choice([nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid])()
        self.a, self.b = nn.Linear(width, width + 1), nn.Linear(width + 1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class NotCalled(Alive):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__(draw, width)
        self.spare = nn.Linear(width, draw.randint(1, 5))
        self.plant(Reason.NOT_CALLED, "spare.weight", "spare.bias")


class Cut(Branch):
    """Cut by detach, no_grad or rounding; or a part of the outputs is used by nobody."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.how = draw.choice(["detach", "no_grad", "round", "sign", "chunk", "slice", "unused"])
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.c = nn.Linear(width, width)
        if self.how in ("chunk", "slice"):
            self.plant(Reason.CUT, "a.weight", "a.bias", axis=0, slices=range(width, 2 * width))
        else:
            self.plant(Reason.CUT, "a.weight", "a.bias")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "no_grad":
            with torch.no_grad():
                h = self.a(x)
        else:
            h = self.a(x)
        if self.how == "unused":
            return self.c(x)
        if self.how in ("chunk", "slice"):
            return self.c(h.chunk(2, -1)[0] if self.how == "chunk" else h[:, : h.shape[1] // 2])
        cuts: dict[str, Callable[[Tensor], Tensor]] = {
            "detach": Tensor.detach,
            "round": torch.round,
            "sign": torch.sign,
        }
        return self.b(cuts.get(self.how, torch.tanh)(h))


class ZeroFactor(Branch):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.how = draw.choice(["constant", "gate", "weight", "mask", "units", "spread"])
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(width))
        units = _some(draw, width)
        keep = torch.ones(width)
        keep[units] = 0
        self.keep = nn.Buffer(keep)
        if self.how == "weight":
            nn.init.zeros_(self.b.weight)
        if self.how == "units":
            self.plant(Reason.ZERO_FACTOR, "a.weight", "a.bias", axis=0, slices=units)
        else:
            self.plant(Reason.ZERO_FACTOR, "a.weight", "a.bias")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.how == "constant":
            return self.b(h) * 0.0 + x
        if self.how == "weight":
            return self.b(h)
        if self.how == "mask":
            return self.b(h) * (x[:, :1] > 1e9).to(x.dtype)
        if self.how == "units":
            return self.b(h * self.keep)
        if self.how == "spread":
            return torch.einsum("bi,ij->bj", h, torch.zeros(h.shape[1], x.shape[1], dtype=x.dtype))
        return self.gate * h


class ZeroInput(Branch):
    """Units that are always zero feed a layer: their columns get nothing."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        units = _some(draw, width)
        keep = torch.ones(width)
        keep[units] = 0
        self.keep = nn.Buffer(keep)
        self.plant(Reason.ZERO_FACTOR, "a.weight", axis=1, slices=units)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x * self.keep)


class ByData(Branch):
    """A table of which the batch asks for some rows."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.how = draw.choice(["embedding", "index", "gather", "select", "slice", "mask"])
        rows = draw.randint(6, 20)
        self.used = rows // 2
        self.table = nn.Embedding(rows, width)
        self.a = nn.Linear(width, width)
        axis_0 = self.how != "mask"
        self.plant(
            Reason.UNCHOSEN_BY_DATA, "table.weight", axis=0 if axis_0 else 1,
            slices=range(self.used, rows) if axis_0 else range(width // 2, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(len(x)) % self.used
        if self.how == "embedding":
            h = self.table(index)
        elif self.how == "index":
            h = self.table.weight[index]
        elif self.how == "gather":
            h = self.table.weight.gather(0, index[:, None].expand(-1, x.shape[1]))
        elif self.how == "select":
            h = self.table.weight.index_select(0, index)
        elif self.how == "slice":
            h = self.table.weight[: self.used].mean(0)
        else:
            hide = torch.arange(x.shape[1]) >= x.shape[1] // 2
            h = (self.table.weight.sum(0) + x).masked_fill(hide, 0.0)
        return self.a(h + 0 * x.detach())


class ByModel(Branch):
    """Codes that are never the nearest, experts that are never picked, heads that are never the largest."""

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.how = draw.choice(["nearest", "table", "router", "amax", "experts", "maximum of two"])
        codes = draw.randint(5, 12)
        lost = _some(draw, codes)
        self.a, self.table = nn.Linear(width, width), nn.Embedding(codes, width)
        self.router = nn.Linear(width, codes)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(codes)])
        with torch.no_grad():
            self.table.weight.mul_(0.1)
            self.table.weight[lost] += 1000.0
            self.router.bias[lost] = -1000.0
        if self.how == "amax":
            with torch.no_grad():
                self.table.weight[lost] -= 5000.0
        if self.how == "experts":
            names = [f"experts.{i}.{kind}" for i in lost for kind in ("weight", "bias")]
            self.plant(Reason.UNCHOSEN_BY_MODEL, *names)
        elif self.how != "maximum of two":
            self.plant(Reason.UNCHOSEN_BY_MODEL, "table.weight", axis=0, slices=lost)
        else:
            nn.init.constant_(self.a.bias, -1000.0)
            self.plant(Reason.UNCHOSEN_BY_MODEL, "a.weight", "a.bias")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "maximum of two":
            return torch.stack([self.a(x), x]).amax(0)
        h = self.a(x)
        if self.how in ("nearest", "table"):
            distance = torch.cdist(h.detach(), self.table.weight.detach())
            nearest = distance.argmin(-1)
            q = self.table(nearest) if self.how == "table" else self.table.weight[nearest]
            return h + q
        p = self.router(h).softmax(-1)
        weight, index = p.max(-1)
        if self.how == "router":
            return self.table(index) * weight[:, None] + h
        if self.how == "amax":
            return (h[:, None] + self.table.weight).amax(1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            hit = index == i
            out[hit] = expert(x[hit]) * weight[hit, None]
        return out + h


class Spike(torch.autograd.Function):
    """A step with a narrow box for its slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < 5)


class Off(Branch):
    HOW = ("relu", "clamp", "threshold", "spike", "hardtanh", "module", "relu6", "where")

    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.how = draw.choice(
            ["relu", "clamp", "threshold", "spike", "hardtanh", "module", "relu6", "where"]
        )
        self.a, self.b, self.act = nn.Linear(width, width + 2), nn.Linear(width + 2, width), nn.ReLU()
        units = _some(draw, width + 2)
        with torch.no_grad():
            self.a.bias[units] = -1000.0
        where = self.how == "where"
        reason = Reason.UNCHOSEN_BY_MODEL if where else Reason.OFF
        self.plant(reason, "a.weight", "a.bias", axis=0, slices=units)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": torch.relu, "clamp": lambda t: t.clamp(-9.0, 9.0), "module": self.act,
            "spike": lambda t: Spike.apply(t),
            "threshold": lambda t: F.threshold(t, -9.0, 0.0), "relu6": F.relu6,
            "hardtanh": lambda t: F.hardtanh(t, -9.0, 9.0),
            "where": lambda t: torch.where(t > -9.0, t, torch.zeros_like(t)),
        }  # fmt: skip
        return self.b(ways[self.how](h))


class Underflow(Branch):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.times = draw.randint(2, 4)
        self.plant(Reason.UNDERFLOW, "a.weight", "a.bias")

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        tiny = 1e-30 if x.dtype is torch.float32 else 1e-200
        for _ in range(self.times):
            h = h * tiny
        return h


class ByMathematics(Branch):
    def __init__(self, draw: random.Random, width: int) -> None:
        super().__init__()
        self.how = draw.choice(["softmax", "one", "batch norm", "feature", "unit", "difference"])
        self.a, self.norm, self.one = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 1)
        self.layer_norm, self.scale = nn.LayerNorm(1), nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))
        names = {
            "softmax": ("shift",), "one": ("one.weight", "one.bias"), "batch norm": ("a.bias",),
            "feature": ("one.weight", "one.bias"), "unit": ("scale",), "difference": ("shift",),
        }  # fmt: skip
        self.plant(Reason.BY_MATHEMATICS, *names[self.how])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "softmax":
            return (h + self.shift).softmax(-1)
        if self.how == "one":
            return h * self.one(x).softmax(-1)
        if self.how == "batch norm":
            return self.norm(h)
        if self.how == "feature":
            return h * self.layer_norm(self.one(x))
        if self.how == "unit":
            return h * (self.scale / self.scale.abs())
        return (h + self.shift) - self.shift


class Net(nn.Module):
    """A trunk, branches that are added up behind it, and a head."""

    def __init__(self, draw: random.Random, width: int, kinds: Sequence[type[Branch]]) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.branches = nn.ModuleList([kind(draw, width) for kind in kinds])  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.trunk(x))
        return self.head(x + sum(branch(x) for branch in self.branches))

    def expected(self) -> list[Expected]:
        """Return what was planted, by names of the whole."""
        return [
            attrs.evolve(e, parameter=f"branches.{i}.{e.parameter}")
            for i, branch in enumerate(self.branches)
            for e in branch.expected  # type: ignore[union-attr]
        ]


PLANTS: tuple[type[Branch], ...] = (
    Alive, NotCalled, Cut, ZeroFactor, ZeroInput, ByData, ByModel, Off, Underflow, ByMathematics,
)  # fmt: skip

NO_LOSS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda y, t: F.relu(y.tanh() - 2).mean(),  # every hinge is met
    lambda y, t: ((y - 1).square().mean(-1) * (t > 99)).sum(),  # the mask is empty
    lambda y, t: y.square().mean().clamp(min=1e9),
    lambda y, t: F.cross_entropy(y, torch.full_like(t, -100), reduction="sum"),
    lambda y, t: (y[t > 99] - 1).square().sum(),
)


@attrs.frozen(eq=False)
class Planted:
    """One random model with its batch and loss, and what was planted in it."""

    model: Net
    batch: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    expected: list[Expected]


def planted(seed: int) -> Planted:
    """Return a random model with one to three planted faults.

    Args:
        seed: the same gives the same model.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width, dtype = draw.randint(3, 7), draw.choice([torch.float32, torch.float32, torch.float64])
    nothing = draw.random() < 0.1
    kinds: Sequence[type[Branch]] = [Alive] if nothing else draw.sample(PLANTS[1:], draw.randint(1, 3))
    model = Net(draw, width, kinds).to(dtype)
    batch = torch.randn(draw.randint(16, 40), width, dtype=dtype), torch.randint(0, 3, (1,))
    batch = batch[0], torch.randint(0, 3, (len(batch[0]),))
    if nothing:
        names = [name for name, _ in model.named_parameters()]
        expected = [Expected(name, Reason.NO_LOSS) for name in names]
        return Planted(model, batch, draw.choice(NO_LOSS), expected)
    return Planted(model, batch, F.cross_entropy, model.expected())
