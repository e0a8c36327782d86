"""Cases re-created from public reports: a physics-informed network, the pretraining of a tabular model,
meta-learning; and two healthy models of these fields."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import Claim, every, flat, no_gradient, stuck, training
from .data import normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------- physics-informed network


class FNN(nn.Module):
    """Tanh network of one coordinate, which may first be brought to between -1 and 1."""

    def __init__(self, hidden: int, depth: int, length: float, scaled: bool) -> None:
        super().__init__()
        sizes = [1, *[hidden] * depth, 1]
        linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.linears = nn.ModuleList(linears)
        self.length, self.scaled = length, scaled

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates, which now want a gradient, and the solution there: both (points, 1)."""
        x = x.detach().requires_grad_()
        y = 2 * x / self.length - 1 if self.scaled else x
        for linear in self.linears[:-1]:
            y = torch.tanh(linear(y))
        return x, self.linears[-1](y)


def _slope(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


@sick(
    "contact4b-pinn-long_domain",
    expect=[("SATURATION", "*")],
    claim=every(flat("linears.0", "tanh of", 0.8), stuck(0.2, steps=400)),
    allow=["VANISHING", "DEAD", "BOTTLENECK", "UNSTABLE"],
    source="https://github.com/lululxvi/deepxde/issues/794",
    steps=400,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def long_domain(sick: bool, width: int) -> Setup:
    """Boundary value problem on a domain of length 1000, with the solution known at some points: the raw
    coordinate puts the first tanh at its flat ends nearly everywhere. Repair: the coordinate is scaled."""
    length = 1000.0
    wave = 3 * math.pi / length
    model = FNN(width, 3, length, scaled=not sick)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = length * uniform(g, 64, 1)
        x[0], x[1] = 0.0, length
        return x, torch.sin(wave * x)

    def loss(output: tuple[Tensor, Tensor], known: Tensor) -> Tensor:
        x, y = output
        residual = _slope(_slope(y, x), x) + wave**2 * y
        boundary = (y[:2] - known[:2]).square().mean()
        return residual.square().mean() + boundary + (y[2:] - known[2:]).square().mean()

    return setup(model, sample, loss, 5e-3)


# -------------------------------------------------------------------- pretraining on a table


class GatedBlock(nn.Module):
    """Linear layer, batch normalisation, gated linear unit."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(inputs, 2 * outputs, bias=False), nn.BatchNorm1d(2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return (samples, outputs)."""
        return F.glu(self.bn(self.fc(x)), dim=1)


class TablePretrainer(nn.Module):
    """Predicts the columns of a table from the columns that are not hidden."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.shared = GatedBlock(columns, hidden)
        self.steps = nn.ModuleList(GatedBlock(hidden, hidden) for _ in range(2))
        self.reconstruct = nn.Linear(hidden, columns)

    def forward(self, table: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        """Return the predicted table and which of its cells, (samples, columns), were hidden."""
        h = self.shared(table * (1 - hidden))
        for step in self.steps:
            h = (h + step(h)) * math.sqrt(0.5)
        return {"table": self.reconstruct(h), "hidden": hidden}


def _runs_to_minus_infinity(times: float, steps: int) -> Claim:
    """The loss ends below zero by more than a multiple of its first size."""

    def claim(setup: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(setup, steps)]
        return losses[-1] < -times * abs(losses[0]), f"loss goes from {losses[0]:.3g} to {losses[-1]:.3g}"

    return claim


@sick(
    "contact4b-tabular-negative_scale",
    expect=[("UNSTABLE", "*")],
    claim=_runs_to_minus_infinity(10.0, 100),
    allow=["EXPLODING", "NUMERICAL"],
    source="https://github.com/dreamquark-ai/tabnet/issues/515",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def negative_scale(sick: bool, width: int) -> Setup:
    """Pretraining on a table whose error is divided by each column's variance, or by its mean where a
    column is constant: a small negative mean makes the error there a gain without end, and the loss runs
    to minus infinity. Repair: the absolute value of the mean."""
    mix = normal(seeded(43), 4, 12) / 2

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        table = normal(g, 64, 4) @ mix + 0.1 * normal(g, 64, 12)
        table[:, 3], table[:, 8] = -0.05, 0.5
        return (table, (uniform(g, 64, 12) < 0.3).float()), table

    def loss(output: dict[str, Tensor], table: Tensor) -> Tensor:
        mean, scale = table.mean(0), table.std(0).square()
        constant = table.amax(0) == table.amin(0)
        scale = torch.where(constant, mean if sick else mean.abs(), scale)
        errors = ((output["table"] - table) * output["hidden"]).square() / scale
        return (errors.sum(1) / output["hidden"].sum(1).clamp_min(1)).mean()

    return setup(TablePretrainer(12, width), sample, loss, 2e-2)


# ------------------------------------------------------------------------------ meta-learning


class WaveNet(nn.Module):
    """Regression of one number on another."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(1, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (points, 1)."""
        return self.out(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class MetaLearner(nn.Module):
    """Model-agnostic meta-learning: predicts a task's queries after steps on the task's support."""

    def __init__(self, hidden: int, kind: str, rate: float = 0.05, steps: int = 2) -> None:
        super().__init__()
        self.net = WaveNet(hidden)
        self.kind, self.rate, self.steps = kind, rate, steps

    def _by_data(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        adapted = copy.deepcopy(self.net)
        for _ in range(self.steps):
            loss = F.mse_loss(adapted(x), y)
            grads = torch.autograd.grad(loss, list(adapted.parameters()), create_graph=True)
            for param, grad in zip(adapted.parameters(), grads, strict=True):
                param.data -= self.rate * grad
        return adapted(query)

    def _by_function(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(self.net.named_parameters())
        second = self.kind == "second order"
        for _ in range(self.steps):
            loss = F.mse_loss(torch.func.functional_call(self.net, weights, (x,)), y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=second)
            pairs = zip(weights.items(), grads, strict=True)
            weights = {name: weight - self.rate * grad for (name, weight), grad in pairs}
        return torch.func.functional_call(self.net, weights, (query,))

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Return the queries' predictions, (tasks, queries, 1), from the support x, y: (tasks, shots, 1)."""
        adapt = self._by_data if self.kind == "data" else self._by_function
        return torch.stack([adapt(*task) for task in zip(x, y, query, strict=True)])


def _waves(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    tasks, shots = 4, 10
    size, shift = 1 + 0.5 * uniform(g, tasks, 1, 1), 0.6 * uniform(g, tasks, 1, 1)
    x, query = 6 * uniform(g, tasks, shots, 1) - 3, 6 * uniform(g, tasks, shots, 1) - 3
    return (x, size * torch.sin(x + shift), query), size * torch.sin(query + shift)


@sick(
    "contact4b-meta-inner_loop_by_data",
    expect=[("DEAD", "net")],
    claim=no_gradient("net"),
    allow=["VANISHING"],
    source="https://github.com/KanishJebaMathewM/Truxify/issues/13118",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def inner_by_data(sick: bool, width: int) -> Setup:
    """Meta-learning that adapts a copy of the network by writing to its parameters' data: the queries' loss
    has no path back to the network that is to be meta-learnt. Repair: the adapted weights are functions of
    the network's own."""
    model = MetaLearner(width, "data" if sick else "second order")
    return setup(model, _waves, F.mse_loss, 5e-3)


# ------------------------------------------------------------------------------------- healthy


@healthy("contact4b-meta-first_order", widths=(32,), dtypes=(FLOAT32,))
def first_order(width: int) -> Setup:
    """First-order meta-learning: the inner gradients are constants to the outer one, by choice, and the
    network learns all the same, since the adapted weights still start from its own."""
    return setup(MetaLearner(width, "first order"), _waves, F.mse_loss, 5e-3)


class Siren(nn.Module):
    """Sines of large arguments, as implicit representations use them."""

    def __init__(self, hidden: int, omega: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, hidden), nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 1)
        self.omega = omega
        with torch.no_grad():
            self.first.weight.uniform_(-1, 1)
            for linear in (self.second, self.last):
                bound = math.sqrt(6 / hidden) / omega
                linear.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates and the solution there: both (points, 1)."""
        x = x.detach().requires_grad_()
        h = torch.sin(self.omega * self.first(x))
        return x, self.last(torch.sin(self.omega * self.second(h)))


@healthy("contact4b-pinn-sine_network", steps=200, widths=(64,), dtypes=(FLOAT32,))
def sine_network(width: int) -> Setup:
    """Sine network that learns a function from its slope and one value: arguments are multiplied by a large
    number before each sine, and gradients by it at each layer, which its initialisation evens out."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 2 * uniform(g, 128, 1) - 1
        return x, 6 * torch.cos(6 * x)

    def loss(output: tuple[Tensor, Tensor], slope: Tensor) -> Tensor:
        x, y = output
        return 0.05 * (_slope(y, x) - slope).square().mean() + (y - torch.sin(6 * x.detach())).square().mean()

    return setup(Siren(width, 10.0), sample, loss, 1e-3)
