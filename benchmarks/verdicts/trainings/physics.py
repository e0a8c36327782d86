"""Trainings that know of equations, and nets built in unusual ways: implicit, continuous, made by others."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import (
    accuracy,
    choice,
    explained,
    moons,
    normal,
    pictures,
    rows,
    seeded,
    table,
    training,
    uniform,
)
from .registry import Training, healthy
from .tables import mlp


def slope(y: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the sum of y by x, of which gradients can be taken again."""
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


class Still(nn.Module):
    """A net of the time squared, whose slope at zero is nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor) -> Tensor:
        """Return the inner net's output at the square of the time."""
        return self.inner(t.square() / 3)


class Residual(nn.Module):
    """A net together with how far it is from a pendulum's equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Still(mlp(1, 32, 32, 1, act=nn.Tanh))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the solution at times, and what is left of x'' + 0.4 x' + 4 x."""
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            x = self.net(t)
            speed = slope(x, t)
            return x, slope(speed, t) + 0.4 * speed + 4 * x


def pendulum(t: Tensor) -> Tensor:
    """Return the damped pendulum that starts at one, at rest."""
    w = math.sqrt(4 - 0.04)
    return torch.exp(-0.2 * t) * (torch.cos(w * t) + 0.2 / w * torch.sin(w * t))


@healthy("physics-damped-pendulum", 1500, at_most=0.05, source="https://arxiv.org/abs/1711.10561")
def damped() -> Training:
    """A net meets a differential equation and how it starts: second derivatives inside the forward."""

    def sample(g: Generator) -> tuple[Tensor, None]:
        return torch.cat([torch.zeros(1, 1), 3 * uniform(g, 63, 1)]), None

    def loss(output: tuple[Tensor, Tensor], target: None) -> Tensor:
        x, rest = output
        return rest.square().mean() + 20 * (x[0] - 1).square().sum()

    model = Residual()
    t = torch.linspace(0, 3, 50)[:, None]

    def error(net: nn.Module) -> float:
        return float((model.net(t) - pendulum(t)).square().mean())

    return training(model, sample, loss, 5e-3, error)


class Energy(nn.Module):
    """A net for the energy; the output is the motion that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 48, 48, 1, act=nn.Tanh)

    def forward(self, state: Tensor) -> Tensor:
        """Return the change of (place, momentum)."""
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            by = slope(self.net(state), state)
        return torch.stack([by[:, 1], -by[:, 0]], 1)


@healthy("physics-hamiltonian-spring", 700, at_least=0.9, source="https://arxiv.org/abs/1906.01563")
def hamiltonian() -> Training:
    """The motion is the gradient of a net: what is learned are first derivatives."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        state = 2 * normal(g, 64, 2)
        return state, torch.stack([state[:, 1], -torch.sin(state[:, 0])], 1) + 0.05 * normal(g, 64, 2)

    return training(Energy(), sample, F.mse_loss, 3e-3, explained(*sample(seeded(98))))


class Operator(nn.Module):
    """What a function's values say, times what the place says."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.branch, self.trunk = mlp(20, 48, size, act=nn.Tanh), mlp(1, 48, size, act=nn.Tanh)

    def forward(self, values: Tensor, place: Tensor) -> Tensor:
        """Return the operator's result at places (batch, places, 1)."""
        return torch.einsum("bd,bpd->bp", self.branch(values), self.trunk(place))


@healthy("physics-operator-integral", 700, at_least=0.9, source="https://arxiv.org/abs/1910.03193")
def operator() -> Training:
    """A net for an operator: the integral of a function that is given by its values."""
    grid = torch.linspace(0, 1, 20)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        a, k = normal(g, 32, 3, 1), torch.tensor([1.0, 2.0, 3.0])[:, None]
        place = uniform(g, 32, 8, 1)
        values = (a * torch.cos(3 * k * grid)).sum(1)
        return (values, place), (a * torch.sin(3 * k * place.transpose(1, 2)) / (3 * k)).sum(1)

    return training(Operator(32), sample, F.mse_loss, 3e-3, explained(*sample(seeded(98))))


class Sine(nn.Module):
    """A layer of sines."""

    def __init__(self, inputs: int, outputs: int, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / 15
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        return torch.sin(15 * self.linear(x))


@healthy("physics-picture-as-sines", 500, at_least=0.9, source="https://arxiv.org/abs/2006.09661")
def sines() -> Training:
    """A net of sines becomes one picture: a function from the place to the brightness."""
    whole = F.interpolate(pictures()[0][:1], size=(24, 24), mode="bicubic")[0, 0]
    line = torch.linspace(-1, 1, 24)
    places = torch.cartesian_prod(line, line)
    target = whole.reshape(-1, 1)
    model = nn.Sequential(Sine(2, 48, first=True), Sine(48, 48), nn.Linear(48, 1))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        chosen = choice(g, len(places), 128)
        return places[chosen], target[chosen]

    return training(model, sample, F.mse_loss, 5e-4, explained(places, target))


class Splines(nn.Module):
    """A layer whose edges are sums of bumps, with a smooth path beside them."""

    def __init__(self, inputs: int, outputs: int, bumps: int = 8) -> None:
        super().__init__()
        self.centres = nn.Buffer(torch.linspace(-2, 2, bumps))
        self.weight = nn.Parameter(0.1 * torch.randn(outputs, inputs, bumps))
        self.base = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sums over edges."""
        bump = torch.exp(-(2 * (x[..., None] - self.centres)).square())
        return self.base(F.silu(x)) + torch.einsum("bik,oik->bo", bump, self.weight)


@healthy("built-edges-as-splines", 600, at_least=0.9, source="https://arxiv.org/abs/2404.19756")
def splines() -> Training:
    """A net whose edges learn functions of one number."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 2 * uniform(g, 64, 3) - 1
        return x, torch.exp(torch.sin(math.pi * x[:, :1]) + x[:, 1:2] ** 2) - x[:, 2:]

    model = nn.Sequential(Splines(3, 6), Splines(6, 1))
    return training(model, sample, F.mse_loss, 5e-3, explained(*sample(seeded(98))))


class Hyper(nn.Module):
    """A net whose weights another net makes from the task."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.make, self.size = mlp(2, 32, 3 * size + 1), size

    def forward(self, task: Tensor, x: Tensor) -> Tensor:
        """Return the made net's output at x (batch, points)."""
        made = self.make(task)
        w, b, v = made[:, :-1].unflatten(1, (3, self.size)).unbind(1)
        hidden = torch.tanh(3 * x[..., None] * w[:, None] + b[:, None])
        return (hidden * v[:, None]).sum(-1) + made[:, -1:]


@healthy("built-hypernetwork-waves", 900, at_least=0.85)
def hyper() -> Training:
    """Waves of a given height and phase, each by a net that is made for it."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        task, x = 2 * uniform(g, 32, 2) - 1, 2 * uniform(g, 32, 16) - 1
        return (task, x), task[:, :1] * torch.sin(3 * x + 2 * task[:, 1:])

    return training(Hyper(12), sample, F.mse_loss, 3e-3, explained(*sample(seeded(98))), clip=1.0)


class Equilibrium(nn.Module):
    """A layer at its fixed point: found without a gradient, then stepped from with one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(64, size), nn.Linear(size, size), nn.Linear(size, 10)
        nn.init.orthogonal_(self.again.weight, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.enter(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(15):
                z = torch.tanh(self.again(z) + x)
        for _ in range(3):
            z = torch.tanh(self.again(z) + x)
        return self.head(z)


@healthy("built-deep-equilibrium", 500, at_least=0.92, source="https://arxiv.org/abs/1909.01377")
def equilibrium() -> Training:
    """A layer's fixed point tells digits; the gradient goes through its last steps alone."""
    x, y, xt, yt = table("digits")
    return training(Equilibrium(48), rows(x, y), F.cross_entropy, 2e-3, accuracy(xt, yt))


class Flow(nn.Module):
    """The same small net, followed for a while in small steps."""

    def __init__(self, size: int, steps: int) -> None:
        super().__init__()
        self.field, self.head, self.steps = mlp(5, size, 4, act=nn.Tanh), nn.Linear(4, 2), steps

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of points (batch, 2)."""
        x = F.pad(x, (0, 2))
        for i in range(self.steps):
            time = torch.full((len(x), 1), i / self.steps)
            x = x + 2 * self.field(torch.cat([x, time], 1)) / self.steps
        return self.head(x)


@healthy("built-neural-ode-moons", 500, at_least=0.95)
def ode() -> Training:
    """Points flow along a field until a line parts the moons, in eight steps of the same net."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return moons(g, 64)

    x, y = moons(seeded(98), 512)
    return training(Flow(24, 8), sample, F.cross_entropy, 5e-3, accuracy(x, y))


class Learner(nn.Module):
    """A net that takes one step of gradient descent on a task before it answers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net, self.rate = mlp(1, size, size, 1), 0.02

    def forward(self, x: Tensor, y: Tensor, asked: Tensor) -> Tensor:
        """Return answers (tasks, points, 1) after a step on the points that are shown."""
        names, answers = dict(self.net.named_parameters()), []
        with torch.enable_grad():
            for i in range(len(x)):
                error = F.mse_loss(self.net(x[i]), y[i])
                moves = torch.autograd.grad(error, list(names.values()), create_graph=True)
                moved = {n: p - self.rate * m for (n, p), m in zip(names.items(), moves, strict=True)}
                answers.append(torch.func.functional_call(self.net, moved, (asked[i],)))
        return torch.stack(answers)


@healthy("built-meta-learned-step", 500, at_least=0.3, source="https://arxiv.org/abs/1703.03400")
def meta() -> Training:
    """What is learned is where to start from, so that one step on a new wave helps."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        height, phase = 0.5 + 2 * uniform(g, 8, 1, 1), 1.5 * uniform(g, 8, 1, 1)
        x, asked = (4 * uniform(g, 8, 10, 1) - 2 for _ in range(2))
        return (x, height * torch.sin(x + phase), asked), height * torch.sin(asked + phase)

    many = [sample(seeded(900 + i)) for i in range(8)]

    def figure(net: nn.Module) -> float:
        error = sum(float(F.mse_loss(net(*inputs), target)) for inputs, target in many)
        return 1 - error / sum(float(target.var()) for _, target in many)

    return training(Learner(32), sample, F.mse_loss, 3e-3, figure)
