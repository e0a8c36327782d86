"""Labelled models from public reports: flow networks, recommenders, atoms, robots, tables."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, huge, no_gradient, not_finite, rises, stuck, weak
from .data import choice, normal, seeded, setup, sgd, uniform
from .registry import FLOAT32, Setup, sick


class TrajectoryBalance(nn.Module):
    """A generative flow network over bit strings that are written from left to right."""

    def __init__(self, length: int, width: int, *, attached: bool) -> None:
        super().__init__()
        self.attached = attached
        self.policy = nn.Sequential(
            nn.Linear(2 * length, width),
            nn.LeakyReLU(),
            nn.Linear(width, width),
            nn.LeakyReLU(),
            nn.Linear(width, 2),
        )
        self.z = nn.Parameter(torch.full((16,), 0.05))

    def get_logprobs(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Return the log-probability of each action taken."""
        logits = outputs.clone() if self.attached else outputs.clone().detach()
        return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the log-flow of each trajectory; the way back is known and has no term."""
        return self.z.sum() + self.get_logprobs(self.policy(states), actions).sum(-1)


@sick(
    "contact10a-gflownet-trajectory",
    expect=[("DEAD", "policy")],
    claim=no_gradient("policy"),
    source="https://github.com/alexhernandezgarcia/gflownet/pull/251",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gflownet_trajectory(sick: bool, width: int) -> Setup:
    """The base environment copied the policy's outputs with a detach before it turned them into
    log-probabilities, so that trajectory balance could only fit the partition function and the forward
    policy stayed as initialised. Repaired by a copy that stays in the graph."""
    length = 6
    taste = 1.2 * normal(seeded(31), length)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        bits = choice(g, 2, 32, length)
        hot = F.one_hot(bits, 2).float()
        seen = (torch.arange(length)[None, :] < torch.arange(length)[:, None]).float()
        states = (hot[:, None] * seen[None, :, :, None]).flatten(2)
        return (states, bits), ((2.0 * bits - 1) * taste).sum(-1)

    model = TrajectoryBalance(length, width, attached=not sick)
    return setup(model, sample, lambda flow, reward: (flow - reward).square().mean(), 5e-3)


class SoftThresholdEmbedding(nn.Module):
    """An embedding table whose small entries are cut off below learned thresholds."""

    def __init__(self, rows: int, size: int, start: float) -> None:
        super().__init__()
        self.v = nn.Parameter(0.3 * torch.randn(rows, size))
        self.s = nn.Parameter(torch.full((1, size), start))

    def forward(self, index: Tensor) -> Tensor:
        """Return the sparse embeddings of the features."""
        table = self.v.sign() * torch.relu(self.v.abs() - torch.sigmoid(self.s))
        return F.embedding(index, table)


class ClickModel(nn.Module):
    """Factorisation machine with a small deep part over sparse embeddings."""

    def __init__(self, fields: int, vocabulary: int, size: int, width: int, start: float) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.arange(fields) * vocabulary)
        self.feature_embed = SoftThresholdEmbedding(fields * vocabulary, size, start)
        self.linear = nn.Embedding(fields * vocabulary, 1)
        self.mlp = nn.Sequential(nn.Linear(fields * size, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, index: Tensor) -> Tensor:
        """Return the logit of a click."""
        rows = index + self.offsets
        e = self.feature_embed(rows)
        pairs = 0.5 * (e.sum(1).square() - e.square().sum(1)).sum(-1, keepdim=True)
        return self.linear(rows).sum(1) + pairs + self.mlp(e.flatten(1))


@sick(
    "contact10a-recsys-embedding-size",
    expect=[("VANISHING", "feature_embed")],
    allow=["SATURATION", "DEAD"],
    claim=weak("feature_embed.s", "feature_embed.v", 1e-4),
    source="https://github.com/ssui-liu/learnable-embed-sizes-for-RecSys/issues/4",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def recsys_embedding_size(sick: bool, width: int) -> Setup:
    """Thresholds that prune an embedding pass through a sigmoid and were started at -15 (or -150) as in
    the published configuration; the sigmoid's slope there is next to nothing and the thresholds were
    still at their start after training, as the asker computed and the author agreed (only decay had ever
    moved them). Repaired by a start where the sigmoid has a slope."""
    fields, vocabulary = 6, 20
    taste = normal(seeded(32), fields, vocabulary)
    rows = torch.arange(fields)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        index = choice(g, vocabulary, 64, fields)
        score = taste[rows, index].sum(-1) + 0.3 * normal(g, 64)
        return index, (score > 0).float()[:, None]

    model = ClickModel(fields, vocabulary, 8, width, -15.0 if sick else -3.0)
    return setup(model, sample, F.binary_cross_entropy_with_logits, 1e-2)


class EdgeAngle(torch.autograd.Function):
    """The angle of an edge about the y axis, with a gradient that is looked after where it has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, floor: float) -> Tensor:
        """Return the angle."""
        ctx.save_for_backward(x, z)
        ctx.floor = floor
        return torch.atan2(x, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients, of operations that can be differentiated again."""
        x, z = ctx.saved_tensors
        square = x.square() + z.square()
        if ctx.floor > 0:
            square = square.clamp_min(ctx.floor)
        else:
            square = torch.where(square == 0, torch.ones_like(square), square)
        return grad * z / square, -grad * x / square, None


class EdgeFramePotential(nn.Module):
    """Messages between atoms in frames along the edges; gives the energy and, by its gradient, the
    forces."""

    def __init__(self, width: int, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("centres", torch.linspace(0.5, 4.0, 8))
        self.edge_mlp = nn.Sequential(nn.Linear(11, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.energy = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def rotate(self, unit: Tensor, vector: Tensor) -> Tensor:
        """Return the vectors in the frames of their edges."""
        x, y, z = unit.unbind(-1)
        a = EdgeAngle.apply(x, z, self.floor)
        s = (1 - y.square()).clamp_min(1e-6).sqrt()
        vx, vy, vz = vector.unbind(-1)
        across, along = a.cos() * vx - a.sin() * vz, a.sin() * vx + a.cos() * vz
        return torch.stack((across, y * vy + s * along, y * along - s * vy), -1)

    def forward(self, pos: Tensor, dipole: Tensor) -> tuple[Tensor, Tensor]:
        """Return the energies and the forces."""
        with torch.enable_grad():
            pos = pos.detach().requires_grad_()
            n = pos.shape[1]
            i, j = torch.triu_indices(n, n, 1)
            i, j = torch.cat((i, j)), torch.cat((j, i))
            edge = pos[:, j] - pos[:, i]
            far = edge.square().sum(-1, keepdim=True).sqrt()
            basis = torch.exp(-4 * (far - self.centres).square())
            turned = self.rotate(edge / far, dipole[:, j])
            message = self.edge_mlp(torch.cat((basis, turned), -1))
            node = torch.zeros(*pos.shape[:2], message.shape[-1]).index_add(1, i, message)
            energy = self.energy(node).sum((1, 2))
            (slope,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
        return energy, -slope


def pair_energy(pos: Tensor, dipole: Tensor) -> Tensor:
    """Return the energy of springs between all atoms, and of dipoles along them."""
    total = torch.zeros(len(pos))
    for i in range(pos.shape[1]):
        for j in range(pos.shape[1]):
            if i != j:
                edge = pos[:, j] - pos[:, i]
                far = edge.square().sum(-1).sqrt()
                total = total + 0.3 * (far - 1.5).square() + 0.3 * (edge * dipole[:, j]).sum(-1) / far
    return total


@sick(
    "contact10a-potential-edge-frame",
    expect=[("NUMERICAL", "*")],
    allow=["EXPLODING", "UNSTABLE"],
    claim=not_finite(),
    source="https://github.com/facebookresearch/fairchem/pull/1574",
    widths=(32,),
    dtypes=(FLOAT32,),
    steps=160,
)
def potential_edge_frame(sick: bool, width: int) -> Setup:
    """Fine-tuning a potential broke on edges that lie nearly, but not exactly, along y: the backward of
    the frame's angle divides by the square of two tiny components, which it only guarded where the square
    is exactly zero, and forces and gradients became infinite. Repaired by a floor under the square."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        grid = torch.tensor([[0.0, 0, 0], [0, 1.4, 0], [1.2, 0, 0.4], [0.3, 0.4, 1.3]])
        pos = grid + 0.15 * normal(g, 8, 4, 3)
        pos[:2, 0, ::2] = 0.0
        pos[:2, 1, ::2] = 1e-21  # two molecules stand upright
        dipole = F.normalize(normal(g, 8, 4, 3), dim=-1)
        with torch.enable_grad():
            at = pos.clone().requires_grad_()
            energy = pair_energy(at, dipole)
            (slope,) = torch.autograd.grad(energy.sum(), at)
        return (pos, dipole), (energy.detach(), -slope)

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(output[0] / 4, target[0] / 4) + F.mse_loss(output[1], target[1])

    return setup(EdgeFramePotential(width, 0.0 if sick else 1e-7), sample, loss, 2e-3)


class FlowPolicy(nn.Module):
    """An action expert that learns, by flow matching, chunks of actions in normalised units."""

    def __init__(self, joints: int, width: int, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("q01", low)
        self.register_buffer("q99", high)
        self.state_proj = nn.Linear(joints, width)
        self.action_in_proj = nn.Linear(joints, width)
        self.time_mlp = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.expert = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.action_out_proj = nn.Linear(width, joints)

    def forward(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted and the true velocities of the flow."""
        goal = (actions - self.q01) / (self.q99 - self.q01 + 1e-6) * 2 - 1
        noise, t = torch.randn_like(goal), torch.rand(len(goal), 1, 1)
        mixed = t * noise + (1 - t) * goal
        h = self.action_in_proj(mixed) + self.state_proj(state)[:, None] + self.time_mlp(t)
        return self.action_out_proj(self.expert(h)), noise - goal


@sick(
    "contact10a-robot-action-units",
    expect=[("EXPLODING", "*")],
    allow=["NUMERICAL", "UNSTABLE"],
    claim=every(huge("*", 1e4), stuck(1e3)),
    source="https://github.com/Physical-Intelligence/openpi/issues/814",
    widths=(32,),
    dtypes=(FLOAT32,),
    falls_to=0.9,
)
def robot_action_units(sick: bool, width: int) -> Setup:
    """Quantiles were taken from absolute joint angles, of which one hardly moves, but the policy is
    trained on changes of angle: around zero these land, in that joint, thousands of units away from what
    the network gives out, and loss and gradients explode. Repaired by quantiles of the actions as they
    are trained on."""
    joints, steps = 7, 4
    rest = torch.tensor([-0.97, -1.87, -1.85, -1.03, 1.569, -1.48, 0.49])
    span = torch.tensor([0.18, 0.37, 0.4, 0.12, 5e-4, 0.18, 0.45])
    mix = normal(seeded(33), joints, joints) / math.sqrt(joints)

    def draw(g: Generator, number: int) -> tuple[Tensor, Tensor, Tensor]:
        state = normal(g, number, joints)
        way = torch.tanh(state @ mix)[:, None] * torch.linspace(0.25, 1.0, steps)[:, None]
        delta = span * (way + 0.05 * normal(g, number, steps, joints))
        return state, delta, rest + 0.3 * span * state[:, None] + delta

    _, delta, absolute = draw(seeded(34), 512)
    stats = (absolute if sick else delta).flatten(0, 1)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        state, actions, _ = draw(g, 64)
        return (state, actions), state

    model = FlowPolicy(joints, width, stats.quantile(0.01, 0), stats.quantile(0.99, 0))
    return setup(model, sample, lambda output, _: F.mse_loss(*output), 3e-3)


class TableNet(nn.Module):
    """A dense classifier of the raw columns of a table, with probabilities at its end."""

    def __init__(self, columns: int, kinds: int, width: int, *, joined: bool) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(columns, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Sequential()
        self.head.add_module("dense", nn.Linear(width, kinds))
        self.head.add_module("probability", nn.LogSoftmax(-1) if joined else nn.Softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the probabilities of the classes, or their logarithms."""
        return self.head(self.hidden(x))


@sick(
    "contact10a-table-probability-layer",
    expect=[("SATURATION", "head")],
    allow=["NUMERICAL", "VANISHING", "DEAD"],
    claim=every(flat("head.dense", "softmax of", 0.8), stuck(3.0)),
    source="https://github.com/AITIAL/OpenWhiz/pull/50",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def table_probability_layer(sick: bool, width: int) -> Setup:
    """A probability layer that is confidently wrong falls below the floor inside the cross entropy, where
    the two gradients no longer cancel to a bounded one but to nothing: the example stalled at half of the
    samples right. Repaired there by holding the layer at the loss's floor so that they cancel again; here
    by taking both in one step, which has the same gradient."""
    scale = torch.tensor([120.0, 40.0, 300.0, 15.0, 80.0, 200.0])
    centres = normal(seeded(35), 3, 6)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, 3, 64)
        return scale * (centres[kind] + 0.4 * normal(g, 64, 6)), kind

    def loss(output: Tensor, kind: Tensor) -> Tensor:
        return F.nll_loss(output.clamp_min(1e-7).log() if sick else output, kind)

    return setup(TableNet(6, 3, width, joined=not sick), sample, loss, 3e-3)


class TagNet(nn.Module):
    """A small convolutional network that gives a logit to each of many tags."""

    def __init__(self, tags: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for i, (a, b) in enumerate(((3, 8), (8, width))):
            self.body.add_module(f"conv{i}", nn.Conv2d(a, b, 3, 2, 1))
            self.body.add_module(f"bn{i}", nn.BatchNorm2d(b))
            self.body.add_module(f"act{i}", nn.LeakyReLU(0.001))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4 * width, tags)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the tags."""
        return self.fc(self.pool(self.body(x)).flatten(1))


def asymmetric(x: Tensor, y: Tensor) -> Tensor:
    """Return the asymmetric loss of every tag, which is soft on easy negatives."""
    p, q = torch.sigmoid(x), (1 - torch.sigmoid(x) + 0.05).clamp_max(1)
    value = y * F.logsigmoid(x) + (1 - y) * q.clamp_min(1e-8).log()
    hard = (1 - p * y - q * (1 - y)).clamp_min(0)
    return -value * (hard.detach() ** (y + 4 * (1 - y)))


@sick(
    "contact10a-tags-asymmetric-loss",
    expect=[("UNSTABLE", "*")],
    allow=["EXPLODING", "NUMERICAL", "SATURATION", "DEAD"],
    claim=rises(3.0),
    source="https://github.com/Alibaba-MIIL/ASL/issues/56",
    widths=(32,),
    dtypes=(FLOAT32,),
    steps=200,
    falls_to=0.9,
)
def tags_asymmetric_loss(sick: bool, width: int) -> Setup:
    """The loss of a multi-label model adds up all tags and pictures, which Adam does not mind; with
    gradient descent at a common rate the steps are thousands of times too long and the loss jumps about
    or becomes NaN. Repaired, as users of the thread found, by the mean."""
    tags = 40
    look = normal(seeded(36), tags, 3, 4, 4)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        y = (uniform(g, 32, tags) < 0.1).float()
        picture = torch.einsum("nt,tcij->ncij", y, look)
        picture = F.interpolate(picture, scale_factor=3.0)
        return picture + 0.2 * normal(g, 32, 3, 12, 12), y

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return asymmetric(output, y).sum() if sick else asymmetric(output, y).mean() * tags

    return setup(TagNet(tags, width), sample, loss, sgd(0.2, 0.9))
