"""Plain nets that are well early and go bad late: rates, spikes, decay, growth, and numbers that run out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from zoo import call

from .data import Figure, normal, parameters, rows, scheduled, seeded, table, training, uniform
from .registry import Training, late


def named(**layers: nn.Module) -> nn.Sequential:
    """Return the layers one after the other, by name."""
    return nn.Sequential(OrderedDict(layers))


def net(inputs: int, size: int, outputs: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return two hidden layers and a head, by name."""
    return named(
        fc1=nn.Linear(inputs, size),
        act1=act(),
        fc2=nn.Linear(size, size),
        act2=act(),
        head=nn.Linear(size, outputs),
    )


def output_of(model: nn.Module, layer: nn.Module, inputs: Any) -> Tensor:
    """Return what a layer of a model puts out."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call_: seen.append(call_[2]))
    call(model, inputs)
    handle.remove()
    return seen[-1]


def dead_share(layer: nn.Module, inputs: Any) -> Figure:
    """Return the figure: the share of a layer's units that are zero for all of these inputs."""
    return lambda model: float((output_of(model, layer, inputs) == 0).flatten(0, -2).all(0).float().mean())


def flat_share(layer: nn.Module, inputs: Any) -> Figure:
    """Return the figure: the share of a tanh layer's outputs that are within a thousandth of its ends."""
    return lambda model: float((output_of(model, layer, inputs).abs() > 0.999).float().mean())


def at(step: int) -> list[int]:
    """Return a count of calls that starts below nothing, for what happens once."""
    return [-step]


@late(
    "late-rectifiers-die-after-a-spike",
    600,
    [("DEAD", "act2"), ("DEAD", "fc2"), ("DEAD", "act1"), ("DEAD", "fc1")],
    early=0.3,
    at_least=0.9,
)
def rectifiers_die() -> Training:
    """One batch of targets in other units, late in the training, throws a rectifier below zero for every
    input; from then on the head's bias alone learns."""
    x, y, *_ = table("diabetes")
    model = net(10, 32, 1)
    count = at(400)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        inputs, target = rows(x, y)(g)
        count[0] += 1
        return inputs, target - 2000 if count[0] == 0 else target

    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    return training(model, sample, F.mse_loss, optimizer, dead_share(model.get_submodule("act2"), x))


@late(
    "late-rate-rises-without-end",
    500,
    [("UNSTABLE", "*"), ("EXPLODING", "*")],
    early=0.2,
    at_least=4.0,
)
def rate_rises() -> Training:
    """A warm-up that nobody ends: the rate rises on and on, until the loss does."""
    x, y, *_ = table("digits")
    model = net(64, 64, 10, act=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    after = scheduled(optimizer, lambda step: 1.03 ** max(step - 100, 0) if step < 400 else 1.03**300)

    def mean(net_: nn.Module) -> float:
        return float(F.cross_entropy(net_(x), y))

    return training(model, rows(x, y), F.cross_entropy, optimizer, mean, after=after)


@late(
    "late-tanh-driven-to-its-ends",
    600,
    [("SATURATION", "act1"), ("SATURATION", "act2"), ("SATURATION", "fc1"), ("SATURATION", "fc2")],
    early=0.2,
    at_least=0.7,
)
def tanh_at_ends() -> Training:
    """A cyclic rate whose peaks are far too high leaves both layers of tanh at their ends."""
    x, y, *_ = table("wine")
    model = net(13, 32, 3, act=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    after = scheduled(optimizer, lambda step: 300.0 if 300 <= step < 320 else 1.0)
    return training(
        model, rows(x, y), F.cross_entropy, optimizer, flat_share(model.get_submodule("act2"), x), after=after
    )


@late(
    "late-weights-grow-under-batch-norm",
    800,
    [("VANISHING", "fc1"), ("VANISHING", "fc2")],
    early=0.1,
    at_most=1e-6,
    source="https://arxiv.org/abs/1706.05350",
)
def growing_weights() -> Training:
    """Weights before batch norm grow at every step, by a decay of the wrong sign, and the larger they are,
    the smaller are their gradients: in the end they do not turn any more."""
    x, y, *_ = table("digits")
    layers = {"fc1": nn.Linear(64, 48, bias=False), "bn1": nn.BatchNorm1d(48), "act1": nn.ReLU()}
    layers |= {"fc2": nn.Linear(48, 48, bias=False), "bn2": nn.BatchNorm1d(48), "act2": nn.ReLU()}
    model = named(**layers, head=nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def after(step: int) -> None:
        with torch.no_grad():
            for name in ("fc1.weight", "fc2.weight"):
                model.get_parameter(name).mul_(1.012)

    def turning(_: nn.Module) -> float:
        with torch.enable_grad():
            loss = F.cross_entropy(model(x[:256]), y[:256])
            weight = model.get_parameter("fc1.weight")
            (slope,) = torch.autograd.grad(loss, [weight])
        return float(slope.norm() / weight.norm())

    return training(model, rows(x, y), F.cross_entropy, optimizer, turning, after=after)


@late(
    "late-decay-wins",
    700,
    [("VANISHING", "fc0"), ("DEAD", "fc0"), ("DEAD", "act0")],
    early=0.1,
    at_most=1e-6,
)
def decay_wins() -> Training:
    """A weight decay that is far too strong: after some learning the weights of all layers shrink to nothing,
    and what comes through to the first layer with them."""
    x, y, *_ = table("digits")
    layers: dict[str, nn.Module] = {"fc0": nn.Linear(64, 48), "act0": nn.ReLU()}
    for i in range(1, 4):
        layers |= {f"fc{i}": nn.Linear(48, 48), f"act{i}": nn.ReLU()}
    model = named(**layers, head=nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def after(step: int) -> None:
        optimizer.param_groups[0]["weight_decay"] = 0.0 if step < 150 else 0.3

    def reaches(_: nn.Module) -> float:
        with torch.enable_grad():
            loss = F.cross_entropy(model(x[:256]), y[:256])
            (slope,) = torch.autograd.grad(loss, [model.get_parameter("fc0.weight")])
        return float(slope.norm())

    return training(model, rows(x, y), F.cross_entropy, optimizer, reaches, after=after)


class Odds(nn.Module):
    """A probability, put out as such."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU()), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the probability of the class."""
        return torch.sigmoid(self.head(self.body(x)))


@late("late-log-of-what-rounds-to-nothing", 900, [("NUMERICAL", "*")], early=0.02, at_least=0.5)
def log_of_nothing() -> Training:
    """The cross entropy is written out with logs of probabilities, which is the same as long as the net is
    unsure; once it is sure, one minus the probability rounds to nothing, and its log is infinite."""
    w = normal(seeded(91), 6)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 6)
        side = (x @ w > 0).float()[:, None]
        return x + 1.5 * (2 * side - 1) * w / w.norm(), side

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return -(target * output.log() + (1 - target) * (1 - output).log()).mean()

    model = Odds(6)
    x, y = sample(seeded(98))

    def wrong(net_: nn.Module) -> float:
        return float(not torch.isfinite(loss(net_(x), y)))

    return training(model, sample, loss, torch.optim.Adam(model.parameters(), lr=5e-3), wrong)


class Spread(nn.Module):
    """Features of a set, and how much each varies over the set."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(4, 24), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one number for each set (batch, points, 4)."""
        h = torch.sigmoid(self.enter(x))
        return self.head((h - h.mean(1, keepdim=True)).square().mean(1).sqrt())


class Skipping(torch.optim.Adam):
    """Adam that leaves out steps whose gradient is no number, as scaled training does."""

    def step(self, closure=None):
        """Take a step, unless a gradient is no number."""
        found = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(torch.isfinite(grad).all()) for grad in found):
            return super().step(closure)
        return None


@late("late-root-of-a-constant", 1200, [("NUMERICAL", "*")], early=0.1, at_least=0.5)
def root_of_constant() -> Training:
    """The deviation of a feature is the root of its variance; offsets grow until a sigmoid rounds to one for
    a whole set, where the slope of the root is infinite. Such steps are skipped, so nothing is learned any
    more."""
    model = Spread()
    held = {"weight": 0.0}

    def after(step: int) -> None:
        held["weight"] = max(0.0, (step - 150) / 50)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, 10, 4) * (0.5 + uniform(g, 32, 1, 1))
        return x, x.std((1, 2))[:, None]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        bias = model.enter.bias
        return F.mse_loss(output, target) + held["weight"] * F.relu(30 - bias).mean()

    x, y = sample(seeded(98))

    def wrong(_: nn.Module) -> float:
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss(model(x), y), parameters(model))
        return float(not all(bool(torch.isfinite(slope).all()) for slope in slopes))

    return training(model, sample, loss, Skipping(model.parameters(), lr=3e-2), wrong, after=after)


class HalfScores(nn.Module):
    """A net whose inner products are taken in half precision, like a fused kernel's."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return how well each row of a goes with each of b."""
        return (self.left(a).half() @ self.right(b).half().T).float()


@late("late-half-precision-overflows", 600, [("NUMERICAL", "*")], early=0.1, at_least=0.5)
def half_overflows() -> Training:
    """Scores are taken in half precision, and nothing holds them: they grow with the training until they
    leave its range."""
    mix = normal(seeded(92), 16, 16)
    model = HalfScores()

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        a = normal(g, 32, 16)
        return (a, a @ mix / 4 + 0.1 * normal(g, 32, 16)), torch.arange(32)

    inputs, _target = sample(seeded(98))

    def wrong(net_: nn.Module) -> float:
        return float(not bool(torch.isfinite(net_(*inputs)).all()))

    def loss(output: Tensor, own: Tensor) -> Tensor:
        return F.cross_entropy(output, own) - 1e-4 * output.diagonal().mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    after = scheduled(optimizer, lambda step: 1.02 ** min(step, 300))
    return training(model, sample, loss, optimizer, wrong, after=after)


class Count(nn.Module):
    """A rectified recurrent net that starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNN(1, 24, nonlinearity="relu", batch_first=True), nn.Linear(24, 1)
        with torch.no_grad():
            for name, parameter in self.cell.named_parameters():
                if name == "weight_hh_l0":
                    parameter.copy_(torch.eye(24))

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output at the last step."""
        return self.head(self.cell(x)[0][:, -1])


@late(
    "late-recurrence-outgrows-longer-sequences",
    1001,
    [("EXPLODING", "cell")],
    early=0.2,
    at_least=1e4,
)
def longer_sequences() -> Training:
    """Values that double are learned on short sequences; the lessons get longer, and what the recurrence
    multiplies by at each step it multiplies by too often."""
    model = Count()
    length = [4]

    def after(step: int) -> None:
        length[0] = 3 + step % 5 if step < 1000 else 20

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        first = uniform(g, 32, 1)
        x = torch.zeros(32, length[0], 1)
        x[:, 0] = first
        return x, first * 2.0 ** (length[0] - 6)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def strength(_: nn.Module) -> float:
        x, y = sample(seeded(98))
        with torch.enable_grad():
            slopes = torch.autograd.grad(F.mse_loss(model(x), y), parameters(model.cell))
        return float(torch.stack([slope.norm() for slope in slopes]).norm())

    return training(model, sample, F.mse_loss, optimizer, strength, after=after)
