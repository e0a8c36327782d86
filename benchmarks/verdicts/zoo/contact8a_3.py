"""Reported failures of graph networks and scientific models, each with its repair."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, fading, growing, no_gradient, not_finite, training, zero_at_first
from .data import normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

# --------------------------------------------------------------------------- citations: sums over the hubs


def hubs(papers: int) -> Tensor:
    """Return the links of a graph in which few papers are cited by many, without loops."""
    g = seeded(41)
    fame = 1 / (1 + torch.arange(papers).float())
    links = (uniform(g, papers, papers) < 3 * (fame[:, None] + fame) ** 0.7).float().triu(1)
    return links + links.T


class GraphConv(nn.Module):
    """Prepares the neighbours' messages, gathers them, and updates the node."""

    def __init__(self, inputs: int, width: int, gather: Tensor) -> None:
        super().__init__()
        self.register_buffer("gather", gather)
        self.prepare = nn.Sequential(nn.Linear(inputs, width), nn.GELU())
        self.update = nn.Sequential(nn.Linear(inputs + width, width), nn.GELU())

    def forward(self, nodes: Tensor) -> Tensor:
        return self.update(torch.cat([nodes, self.gather @ self.prepare(nodes)], 1))


class CitationNet(nn.Module):
    """Graph layers, and a head that tells the subject of each paper."""

    def __init__(self, words: int, subjects: int, width: int, gather: Tensor) -> None:
        super().__init__()
        self.convs = nn.ModuleList(GraphConv(words if i == 0 else width, width, gather) for i in range(4))
        self.head = nn.Linear(width, subjects)

    def forward(self, words: Tensor) -> Tensor:
        x = self.convs[0](words)
        for conv in self.convs[1:]:
            x = x + conv(x)
        return self.head(x)


@sick(
    "contact8a-graph-citations",
    expect=[("EXPLODING", "convs")],
    allow=["UNSTABLE"],
    claim=growing("convs.0", "convs.3", 30.0),
    source="https://github.com/keras-team/keras-io/pull/2304",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def citations(sick: bool, width: int) -> Setup:
    """The report is of a node classifier on citations that was not stable: each layer adds up the messages of
    all neighbours, so that features explode at papers with many links. Self loops, dividing by the degree and
    normalising the rows of words repair it."""
    papers, words, subjects = 96, 40, 5
    links = hubs(papers)
    loops = links + torch.eye(papers)
    gather = links if sick else loops / loops.sum(1, keepdim=True)
    g0 = seeded(42)
    subject = torch.randint(0, subjects, (papers,), generator=g0)
    topic = uniform(g0, subjects, words) < 0.25

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        chance = torch.where(topic[subject], 0.6, 0.08)
        bag = (uniform(g, papers, words) < chance).float()
        return bag if sick else math.sqrt(words) * F.normalize(bag, dim=1), subject

    return setup(CitationNet(words, subjects, width, gather), sample, F.cross_entropy, 3e-3)


# -------------------------------------------------------------------- atoms: many message passings in a row


class HydraGNN(nn.Module):
    """A long stack of message passing over a ring of atoms, with or without skip connections."""

    def __init__(self, features: int, width: int, layers: int, *, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.embed = nn.Linear(features, width)
        self.graph_convs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.energy_head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, atoms: Tensor) -> Tensor:
        x = self.embed(atoms)
        for conv in self.graph_convs:
            around = (x.roll(1, 1) + x.roll(-1, 1)) / 2
            new = F.relu(conv(torch.cat([x, around], 2)))
            x = x + new / len(self.graph_convs) ** 0.5 if self.skip else new
        return self.energy_head(x.mean(1))


@sick(
    "contact8a-graph-hydra",
    expect=[("VANISHING", "graph_convs")],
    allow=["BOTTLENECK"],
    claim=fading("graph_convs.0", "graph_convs.13", 1e-3),
    source="https://github.com/ORNL/HydraGNN/issues/164",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def hydra(sick: bool, width: int) -> Setup:
    """The report asks for skip connections in a graph network for atomic structures, since in deep stacks of
    message passing the gradient vanishes on its way to the first layers and results degrade. The same stack
    with a skip connection round each layer trains."""
    charge = normal(seeded(43), 5)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        atoms = normal(g, 64, 10, 5)
        q = torch.tanh(atoms @ charge)
        energy = (q * q.roll(1, 1)).mean(1, keepdim=True) * 2 + q.mean(1, keepdim=True)
        return atoms, 3 * energy

    return setup(HydraGNN(5, width, 14, skip=not sick), sample, F.mse_loss, 8e-4)


# ----------------------------------------------------------------- flows: a solver that records no gradient


class Velocity(nn.Module):
    """The velocity of a point at a time."""

    def __init__(self, width: int, *, zero_last: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 2)
        if zero_last:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.hidden(torch.cat([x, t.expand(len(x), 1)], 1)))


class FlowObserver(nn.Module):
    """Carries points along a learned flow with a midpoint solver, and reads off what is seen at the end."""

    def __init__(self, width: int, *, enable_grad: bool) -> None:
        super().__init__()
        self.enable_grad = enable_grad
        self.velocity = Velocity(width)
        self.readout = nn.Linear(2, 3)

    def solve(self, x: Tensor, steps: int) -> Tensor:
        with torch.set_grad_enabled(self.enable_grad and torch.is_grad_enabled()):
            for i in range(steps):
                t, h = torch.tensor([[i / steps]]), 1 / steps
                middle = x + h / 2 * self.velocity(x, t)
                x = x + h * self.velocity(middle, t + h / 2)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.solve(x, 6))


@sick(
    "contact8a-flow-solver",
    expect=[("DEAD", "velocity")],
    claim=no_gradient("velocity"),
    source="https://github.com/facebookresearch/flow_matching/pull/19",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def flow_solver(sick: bool, width: int) -> Setup:
    """The report says that the ODE solver of the library runs under `no_grad`, which who trains through it
    cannot undo: what is solved carries no graph, and the velocity network never gets a gradient. Solving
    with the gradient enabled repairs it."""
    see = normal(seeded(44), 2, 3)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 2)
        turn = 2.0 / (1 + x.square().sum(1))
        cos, sin = torch.cos(turn), torch.sin(turn)
        end = torch.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], 1)
        return x, (end + 1.5 * torch.sin(2 * end.flip(1))) @ see

    return setup(FlowObserver(width, enable_grad=not sick), sample, F.mse_loss, 1e-2)


# --------------------------------------------------------- sensors: a bias that is whatever memory held


class FeatureAttention(nn.Module):
    """Attention among the sensors of a window, with a bias for each pair of sensors."""

    def __init__(self, sensors: int, window: int, width: int, *, filled: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(2 * window, width)
        self.a = nn.Linear(width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(sensors, sensors))
        if not filled:  # stands for torch.empty on memory that was used before: the same at every build
            with torch.no_grad():
                self.bias.view(-1)[torch.tensor([3, 11])] = math.nan
                self.bias.view(-1)[torch.tensor([7, 20])] = 3e-41

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        count = rows.shape[1]
        pairs = torch.cat([rows.repeat_interleave(count, 1), rows.repeat(1, count, 1)], 2)
        scores = self.a(F.leaky_relu(self.lin(pairs), 0.2)).view(-1, count, count) + self.bias
        return torch.sigmoid(scores.softmax(2) @ rows).transpose(1, 2)


class MTADGAT(nn.Module):
    """The window and what its sensors say of each other, into a recurrent forecaster of the next reading."""

    def __init__(self, sensors: int, window: int, width: int, *, filled: bool) -> None:
        super().__init__()
        self.feature_gat = FeatureAttention(sensors, window, width, filled=filled)
        self.gru = nn.GRU(2 * sensors, width, batch_first=True)
        self.forecast = nn.Linear(width, sensors)

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.gru(torch.cat([x, self.feature_gat(x)], 2))
        return self.forecast(last[0])


@sick(
    "contact8a-anomaly-gatbias",
    expect=[("NUMERICAL", "feature_gat")],
    claim=not_finite(loss=True),
    source="https://github.com/ML4ITS/mtad-gat-pytorch/issues/13",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gat_bias(sick: bool, width: int) -> Setup:
    """The report says that the outputs of the attention among features are NaN although the data are fine:
    the bias is made with `torch.empty` and never filled, so it holds what the memory held, NaN among it.
    Filling it with zeros repairs it."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        phase = 6.3 * uniform(g, 32, 1, 1)
        speed = torch.tensor([0.4, 0.5, 0.7, 0.9, 1.1])
        waves = torch.sin(torch.arange(13)[None, :, None] * speed + phase)
        waves = waves + 0.5 * waves.roll(1, 2) + 0.05 * normal(g, 32, 13, 5)
        return waves[:, :12], waves[:, 12]

    return setup(MTADGAT(5, 12, width, filled=not sick), sample, F.mse_loss, 5e-3)


# ------------------------------------------------------------------ healthy: a flow that starts at rest


class FlowMatching(nn.Module):
    """Predicts the velocity at points between noise and data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.velocity = Velocity(width, zero_last=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity(x, t)


@healthy(
    "contact8a-flow-zerohead",
    looks=zero_at_first("velocity.hidden"),
    source="https://github.com/atong01/conditional-flow-matching/issues/134",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def zero_head(width: int) -> Setup:
    """Conditional flow matching with a last layer of zeros. The question is whether all outputs are then
    zero; the author answers that they are at the start only. The last layer moves first, then the others."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        noise, angle, t = normal(g, 128, 2), 6.3 * uniform(g, 128), uniform(g, 128, 1)
        ring = torch.stack([3 + torch.cos(angle), 2 + torch.sin(angle)], 1)
        return ((1 - t) * noise + t * ring, t), ring - noise

    return setup(FlowMatching(width), sample, F.mse_loss, 3e-3)


# ------------------------------------------------------------ healthy: weights that climb against the loss


class SelfAdaptivePINN(nn.Module):
    """A network for u(x) with a weight for each point of the equation and of the boundary."""

    def __init__(self, width: int, points: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        self.lambda_f = nn.Parameter(torch.ones(points, 1))
        self.lambda_b = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        x = x.requires_grad_()
        u = self.net(x)
        (u_x,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
        residual = u_xx + math.pi**2 / 2 * torch.sin(math.pi * x) + u_x - 1
        return (self.lambda_f * residual.square()).mean() + (self.lambda_b * self.net(ends).square()).mean()


def climbs(name: str) -> Claim:
    """A parameter is pushed up, against the loss, at every step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        before = setup.model.get_parameter(name).detach().mean().item()
        for step in training(setup, 20):
            grad = step.grads[name]
            if grad is None or float(grad.min()) < 0:
                return False, f"{name} has no gradient of one sign"
        after = setup.model.get_parameter(name).detach().mean().item()
        return after > before, f"mean of {name} goes from {before:.3g} to {after:.3g}"

    return claim


@healthy(
    "contact8a-pinn-adaptive",
    looks=climbs("lambda_f"),
    source="https://github.com/levimcclenny/SA-PINNs/issues/5",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def adaptive(width: int) -> Setup:
    """A self-adaptive PINN whose point weights are trained to make the loss larger while the network makes it
    smaller. The report is that the loss may rise; the author answers that this belongs to the min-max
    training, and to go on."""
    model = SelfAdaptivePINN(width, 48)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        grid = (torch.arange(48)[:, None] + uniform(g, 48, 1)) / 48
        return (2 * grid - 1, torch.tensor([[-1.0], [1.0]])), torch.zeros(())

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        nets = list(model.net.parameters())
        weights = [model.lambda_f, model.lambda_b]
        return torch.optim.Adam([{"params": nets}, {"params": weights, "maximize": True}], lr=5e-3)

    return setup(model, sample, lambda loss, _: loss, optimizer)
