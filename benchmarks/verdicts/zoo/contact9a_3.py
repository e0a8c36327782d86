"""Labelled models from public reports: graphs and poses, and healthy models of several fields."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, alike, flat, no_gradient, rises, training, zero_at_first
from .data import Sample, choice, clusters, frozen, normal, seeded, series, setup, stack, uniform
from .registry import FLOAT32, Setup, healthy, sick


def untouched(parameter: str, share: float) -> Claim:
    """In the first step the gradient of more than a share of a parameter's entries is exactly zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        grad = next(training(setup, 1)).grads[parameter]
        seen = 1.0 if grad is None else float((grad == 0).float().mean())
        return seen > share, f"{seen:.0%} of {parameter} gets no gradient in the first step"

    return claim


def below_zero(steps: int) -> Claim:
    """The loss is negative after some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        loss = [step.loss for step in training(setup, steps)][-1]
        return loss < 0, f"loss after {steps} steps = {loss:.3g}"

    return claim


class GatConv(nn.Module):
    """Attention of every node to all nodes of its graph."""

    def __init__(self, inputs: int, outputs: int, heads: int, own: bool) -> None:
        super().__init__()
        self.heads = heads
        self.lin = nn.Linear(inputs, outputs, bias=False)
        self.att_src = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, outputs // heads)))
        self.att_dst = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, outputs // heads)))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.res = nn.Linear(inputs, outputs, bias=False) if own else None
        nn.init.xavier_uniform_(self.lin.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the nodes of complete graphs after one round."""
        h = self.lin(x).unflatten(-1, (self.heads, -1))
        source, target = (h * self.att_src).sum(-1), (h * self.att_dst).sum(-1)
        weights = F.leaky_relu(target[:, :, None] + source[:, None], 0.2).softmax(2)
        y = torch.einsum("bijh,bjhd->bihd", weights, h).flatten(2) + self.bias
        return y if self.res is None else y + self.res(x)


class PointNetwork(nn.Module):
    """Three rounds over a complete graph of points, and a reading of every node."""

    def __init__(self, width: int, own: bool) -> None:
        super().__init__()
        sizes = (2, width, width, width)
        self.convs = nn.ModuleList(GatConv(a, b, 2, own) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a number for every node."""
        for conv in self.convs:
            x = F.elu(conv(x))
        return self.out(x)


def points(number: int = 8, nodes: int = 20) -> Sample:
    """Points in a square; the target of each depends on where it lies, and on the middle of all."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = 2 * uniform(g, number, nodes, 2) - 1
        away = x - x.mean(1, keepdim=True)
        return x, 1.5 * away[..., :1] + torch.sin(2.5 * x[..., 1:])

    return sample


@sick(
    "contact9a-graph-complete",
    expect=[("BOTTLENECK", "convs")],
    allow=["DEAD", "VANISHING"],
    claim=alike("convs.2", 0.05, dim=1),
    source="https://github.com/FluxML/GeometricFlux.jl/issues/154",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def graph_complete(sick: bool, width: int) -> Setup:
    """A graph attention network on the complete graph of a set of points gives the same embedding for every
    node: all have the same neighbours, and the attention ranks these nearly alike whoever asks, so each node
    becomes the same mean, and what is its own is lost. Repair: every node keeps a path of its own past the
    attention."""
    return setup(PointNetwork(width, own=not sick), points(), F.mse_loss, 5e-3)


class Bottle(nn.Module):
    """A residual unit; the normalisations of a pretrained trunk are frozen, and left out here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's output."""
        return F.relu(x + 0.5 * self.conv2(F.relu(self.conv1(x))))


class PoseNet(nn.Module):
    """A trunk of residual units, and heads for score maps and for the offsets within their cells."""

    def __init__(self, joints: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        with torch.no_grad():
            self.conv1.weight.div_(64)  # as in a trunk that was trained on pixels of 8 bits
        self.blocks = nn.Sequential(*[Bottle(width) for _ in range(6)])
        self.part_pred = nn.Conv2d(width, joints, 3, padding=1)
        self.locref_pred = nn.Conv2d(width, 2 * joints, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score maps and the offsets."""
        x = self.blocks(F.relu(self.conv1(x)))
        return self.part_pred(x), self.locref_pred(x)


def animals(joints: int = 3, number: int = 8, size: int = 16) -> Sample:
    """Pictures with a spot of its own colour for every joint; targets are score maps and offsets."""
    colours = 2 * torch.eye(3)[:joints]
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    cells = torch.stack(torch.meshgrid(torch.arange(size // 2), torch.arange(size // 2), indexing="ij"))

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        place = 2 + (size - 4) * uniform(g, number, joints, 2)
        spread = (rows - place[..., 0, None, None]) ** 2 + (columns - place[..., 1, None, None]) ** 2
        x = torch.einsum("njhw,jc->nchw", torch.exp(-spread / 3), colours)
        offset = place[..., None, None] / 2 - cells
        near = (offset.square().sum(2) < 2.5).float()
        return 64 * x + 6 * normal(g, number, 3, size, size), (near, offset)

    return sample


def pose_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of the score maps, and that of the offsets near the joints."""
    near, offset = target
    misses = F.huber_loss(output[1].view_as(offset), offset, reduction="none").sum(2)
    return F.binary_cross_entropy_with_logits(output[0], near) + 0.05 * (near * misses).sum() / near.sum()


@sick(
    "contact9a-pose-schedule",
    expect=[("UNSTABLE", "*")],
    allow=["EXPLODING", "DEAD"],
    claim=rises(5),
    source="https://github.com/DeepLabCut/DeepLabCut/pull/2393",
    steps=150,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def pose_schedule(sick: bool, width: int) -> Setup:
    """DeepLabCut changes to Adam on computers where its usual gradient descent does not run, but kept the
    learning rates that were made for gradient descent; nearly all models diverged within a few steps. The
    rates are taken in proportion to these narrower layers. Repair: the rates that are in use with Adam."""
    return setup(PoseNet(3, width // 2), animals(), pose_loss, 0.05 if sick else 5e-4)


PITCHES = torch.tensor([0.3, 0.7, 1.2, 1.8, 2.5])[:, None]


class SpeakerAttack(nn.Module):
    """A generator of one disturbance for all recordings, and the frozen filters that it is to mislead."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = nn.Conv1d(4, width, 5, padding=2), nn.Conv1d(width, width, 5, padding=2)
        self.generator = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.last = nn.Conv1d(width, 1, 5, padding=2)
        nn.init.zeros_(self.last.weight)
        angles = PITCHES * torch.arange(16)
        self.speaker = nn.Conv1d(1, 10, 16, bias=False)
        self.speaker.weight = nn.Parameter(torch.cat([angles.sin(), angles.cos()])[:, None] / 4)
        frozen(self.speaker)

    def forward(self, noise: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the speakers of the disturbed recordings, and the disturbance."""
        change = self.last(self.generator(noise)).tanh()
        power = self.speaker(sound + change).square().mean(-1)
        return (power[:, :5] + power[:, 5:] + 0.1).log(), change


@healthy(
    "contact9a-healthy-perturbation",
    looks=zero_at_first("generator"),
    source="https://github.com/smallflyingpig/universal_adversarial_perturbation_generative_network"
    "_for_speaker_recognition/issues/4",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_perturbation(width: int) -> Setup:
    """A generator of disturbances against speaker recognition begins with a last convolution of zeros.
    Somebody feared that all gradients would be zero and nothing could be trained: only those below the last
    layer are, in the first step; once it has moved, the others follow."""

    tones = torch.sin(PITCHES * torch.arange(64))

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        sound = tones[choice(g, 5, 16)][:, None] + 0.5 * normal(g, 16, 1, 64)
        return (normal(g, 16, 4, 64), sound), torch.full((16,), 2)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + 0.05 * output[1].square().mean()

    return setup(SpeakerAttack(width), sample, loss, 1e-2)


def outlines(number: int = 8, size: int = 12) -> Sample:
    """Noisy pictures of a disc; the target is the distance to its outline, negative inside, of each pixel."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        centre = 3 + (size - 6) * uniform(g, number, 2, 1, 1)
        distance = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2).sqrt()[:, None] - 3
        return (distance < 0).float() + 0.5 * normal(g, number, 1, size, size), distance

    return sample


@healthy(
    "contact9a-healthy-boundary",
    looks=below_zero(100),
    source="https://github.com/LIVIAETS/boundary-loss/issues/35",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_boundary(width: int) -> Setup:
    """The boundary loss of medical segmentation weighs every pixel's probability with its signed distance to
    the organ's outline, so that a good segmentation has a negative loss. Asked whether it would go to minus
    infinity, the authors answered that it is bounded by the sum of the negative distances."""
    half = width // 2
    model = stack(
        enc1=nn.Sequential(nn.Conv2d(1, half, 3, padding=1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        enc2=nn.Sequential(nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        final=nn.Conv2d(half, 1, 1),
    )

    def loss(output: Tensor, target: Tensor) -> Tensor:
        chance, mask = output.sigmoid(), (target < 0).float()
        overlap = 2 * (chance * mask).sum((2, 3)) / (chance.sum((2, 3)) + mask.sum((2, 3)))
        return 0.2 * (1 - overlap.mean()) + (chance * target).mean()

    return setup(model, outlines(), loss, 1e-2)


class RgLru(nn.Module):
    """A gated linear recurrence whose decays lie close to one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a_param, self.decay = nn.Parameter(torch.empty(width)), nn.Sigmoid()
        self.a_param.data = torch.logit((0.9 + 0.099 * torch.rand(width)) ** (1 / 8))
        self.a_gate, self.input_gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states."""
        log_a = 8 * self.a_gate(x).sigmoid() * self.decay(self.a_param).log()
        a, taken = log_a.exp(), self.input_gate(x).sigmoid() * x
        taken = taken * (1 - (2 * log_a).exp()).clamp_min(1e-6).sqrt()
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = a[:, t] * state + taken[:, t]
            states.append(state)
        return torch.stack(states, 1)


class GriffinClassifier(nn.Module):
    """A recurrent block with a gated branch, and a classifier of the last step."""

    def __init__(self, features: int, kinds: int, width: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(features, width), nn.LayerNorm(width)
        self.linear_y, self.linear_x = nn.Linear(width, width), nn.Linear(width, width)
        self.conv1d = nn.Conv1d(width, width, 4, groups=width)
        self.rg_lru = RgLru(width)
        self.linear_out, self.head = nn.Linear(width, width), nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes."""
        x = self.embed(x)
        h = self.norm(x)
        mixed = self.conv1d(F.pad(self.linear_x(h).transpose(1, 2), (3, 0))).transpose(1, 2)
        return self.head((x + self.linear_out(F.gelu(self.linear_y(h)) * self.rg_lru(mixed)))[:, -1])


@healthy(
    "contact9a-healthy-griffin",
    looks=flat("rg_lru.decay", "sigmoid", 0.6),
    source="https://arxiv.org/abs/2402.19427",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_griffin(width: int) -> Setup:
    """Griffin's recurrence takes its decays from sigmoids that begin, by design, in their flat end: the
    eighth power lies between 0.9 and 0.999, which is what lets the state last."""
    return setup(GriffinClassifier(4, 3, width), series(), F.cross_entropy, 5e-3)


class FedClient(nn.Module):
    """A client's features and projection, before a fixed classifier that is the same for all clients."""

    def __init__(self, features: int, kinds: int, width: int) -> None:
        super().__init__()
        first, second = nn.Linear(features, width), nn.Linear(width, width)
        self.backbone = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
        self.projection = nn.Linear(width, 16)
        self.etf = nn.Linear(16, kinds, bias=False)
        frozen(self.etf)
        basis = torch.linalg.qr(torch.randn(16, kinds))[0]
        centred = torch.eye(kinds) - 1 / kinds
        self.etf.weight.copy_(math.sqrt(kinds / (kinds - 1)) * (basis @ centred).T)
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes."""
        return self.log_scale.exp() * self.etf(F.normalize(self.projection(self.backbone(x)), dim=-1))


@healthy(
    "contact9a-healthy-fedetf",
    looks=no_gradient("etf"),
    source="https://arxiv.org/abs/2303.10058",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_fedetf(width: int) -> Setup:
    """Federated learning with a classifier that is never trained: it is a simplex with all classes equally
    far apart, so that clients with different data do not pull it apart. Only the features are learnt."""
    with torch.no_grad():
        model = FedClient(8, 6, width)
    return setup(model, clusters(8, 6), F.cross_entropy, 3e-3)


class HashField(nn.Module):
    """A small network over features from tables, one for each of several grids over the square."""

    def __init__(self, width: int, levels: int = 4, size: int = 1024) -> None:
        super().__init__()
        self.levels, self.size = levels, size
        self.embeddings = nn.Parameter(1e-4 * (2 * torch.rand(levels, size, 2) - 1))
        self.mlp = nn.Sequential(nn.Linear(2 * levels, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the colours at the places."""
        parts = []
        for level in range(self.levels):
            scaled = x * 4 * 2**level
            corner = scaled.floor().long()
            rest = scaled - corner
            found = torch.zeros(x.shape[0], 2)
            for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
                index = ((corner[:, 0] + dx) ^ ((corner[:, 1] + dy) * 2654435761)) % self.size
                weight = (rest[:, 0] if dx else 1 - rest[:, 0]) * (rest[:, 1] if dy else 1 - rest[:, 1])
                found = found + weight[:, None] * self.embeddings[level, index]
            parts.append(found)
        return self.mlp(torch.cat(parts, -1))


@healthy(
    "contact9a-healthy-hashgrid",
    looks=untouched("embeddings", 0.7),
    source="https://github.com/NVlabs/tiny-cuda-nn/issues/194",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def healthy_hashgrid(width: int) -> Setup:
    """The tables of a hash encoding begin with very small numbers, and a batch reaches few of their entries.
    Somebody saw no derivative and was told that the encoding begins like that and must be trained first."""
    waves = 6 * normal(seeded(921), 2, 3)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = uniform(g, 96, 2)
        return x, torch.sin(x @ waves) + 0.5 * torch.sin(2 * x @ waves.flip(1))

    return setup(HashField(width), sample, F.mse_loss, 1e-2)
