"""Cases after public reports: speech, weather, causal inference and proteins.

Each sick case keeps the structure and the mechanism of the report it names, at a size that trains in
milliseconds; its repair is the one that the report's thread found.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, fading, growing, not_finite, training, zero_at_first
from .data import choice, normal, seeded, setup, sgd, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ---------------------------------------------------------------------------------------------- speech


class Speaker(nn.Module):
    """Text to spectrogram: an encoder of phonemes, a predictor of durations and a decoder of frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.phonemes = nn.Embedding(20, width)
        self.encoder = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.duration = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8))

    def forward(self, text: Tensor, frames: Tensor) -> dict[str, Tensor]:
        """Return durations (batch, phonemes) and all frames in a row (frames, 8)."""
        x = self.phonemes(text).transpose(1, 2)
        for layer in self.encoder:
            x = x + torch.relu(layer(x))
        x = x.transpose(1, 2)
        spread = x.flatten(0, 1).repeat_interleave(frames.flatten(), 0)
        return {"duration": self.duration(x).squeeze(-1), "mel": self.decoder(spread)}


def outweighs(part: str, other: str, above: float) -> Claim:
    """The gradient of a part is a large multiple of another part's, in each of the first three steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        ratios = [step.norm(part) / max(step.norm(other), 1e-30) for step in training(ready, 3)]
        return min(ratios) > above, f"gradient norm of {part} / {other} >= {min(ratios):.2g}"

    return claim


@sick(
    "contact3a-speech-linear_durations",
    [("EXPLODING", "*")],
    outweighs("duration", "decoder", 200),
    allow=["UNSTABLE", "NUMERICAL", "DEAD"],
    source="https://github.com/janvainer/speedyspeech/issues/19",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def linear_durations(sick: bool, width: int) -> Setup:
    """Durations are compared in frames, so that their loss and its gradient are hundreds of times those of
    the spectrogram and throw the shared encoder about. Repair: compare their logarithms."""
    lengths = choice(seeded(31), 60, 20) + 20
    sounds = normal(seeded(32), 20, 8)

    def sample(g: Generator) -> tuple[Any, Any]:
        text = choice(g, 20, 8, 12)
        frames = (lengths[text] * (0.8 + 0.4 * uniform(g, 8, 12))).long()
        mel = sounds[text].flatten(0, 1).repeat_interleave(frames.flatten(), 0)
        return (text, frames), (frames.float(), mel + 0.1 * normal(g, *mel.shape))

    def loss(output: dict[str, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
        frames, mel = target
        wanted = frames if sick else torch.log(frames + 1)
        return F.l1_loss(output["mel"], mel) + F.mse_loss(output["duration"], wanted)

    return setup(Speaker(width), sample, loss, sgd(0.001, 0.9))


def scale_free(estimate: Tensor, source: Tensor) -> Tensor:
    """Return the scale-invariant ratio of signal to distortion in decibels, over the last axis."""
    estimate = estimate - estimate.mean(-1, keepdim=True)
    source = source - source.mean(-1, keepdim=True)
    on = (estimate * source).sum(-1, keepdim=True) / (source.square().sum(-1, keepdim=True) + 1e-8) * source
    return 10 * torch.log10((on.square().sum(-1) + 1e-8) / ((estimate - on).square().sum(-1) + 1e-8))


@healthy(
    "contact3a-separation-either_order",
    source="https://github.com/kaituoxu/Conv-TasNet/issues/1",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def either_order(width: int) -> Setup:
    """Two voices out of a mixture by masks between 0 and 1, with the better of both orders scored: the loss
    is a negative number of decibels, half of the comparisons get no gradient, and it trains."""

    class Separator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Conv1d(1, width, 8, stride=4, bias=False)
            self.masks = nn.Sequential(
                nn.Conv1d(width, width, 5, padding=2), nn.PReLU(), nn.Conv1d(width, 2 * width, 5, padding=2)
            )
            self.decode = nn.ConvTranspose1d(width, 1, 8, stride=4, bias=False)

        def forward(self, mixture: Tensor) -> Tensor:
            heard = torch.relu(self.encode(mixture[:, None]))
            masks = torch.sigmoid(self.masks(heard)).unflatten(1, (2, width)).unbind(1)
            return torch.cat([self.decode(mask * heard) for mask in masks], 1)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        time = torch.arange(128.0)
        pitch = torch.stack([0.15 + 0.1 * uniform(g, 8), 0.9 + 0.3 * uniform(g, 8)], 1)
        voices = torch.sin(pitch[..., None] * time + 6.3 * uniform(g, 8, 2, 1))
        return voices.sum(1), voices

    def loss(output: Tensor, voices: Tensor) -> Tensor:
        straight = scale_free(output, voices).mean(1)
        crossed = scale_free(output, voices.flip(1)).mean(1)
        return -torch.maximum(straight, crossed).mean()

    return setup(Separator(), sample, loss, 3e-3)


# --------------------------------------------------------------------------------------------- weather


def perceptron(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    """Return `layers` hidden layers, an output layer and a norm."""
    parts: list[nn.Module] = [nn.Linear(inputs, hidden), nn.ReLU()]
    for _ in range(layers - 1):
        parts += [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(hidden, outputs), nn.LayerNorm(outputs))


class Processor(nn.Module):
    """Steps of messages along the edges of a mesh, each added to what was there."""

    def __init__(self, width: int, edge_layers: int) -> None:
        super().__init__()
        self.edge_blocks = nn.ModuleList(perceptron(3 * width, width, edge_layers, width) for _ in range(2))
        self.node_blocks = nn.ModuleList(perceptron(2 * width, width, 2, width) for _ in range(2))

    def forward(self, nodes: Tensor, edges: Tensor, ends: Tensor) -> Tensor:
        """Return nodes (batch, nodes, width), given edges (batch, edges, width) and their two ends."""
        for edge_block, node_block in zip(self.edge_blocks, self.node_blocks, strict=True):
            edges = edges + edge_block(torch.cat([nodes[:, ends[0]], nodes[:, ends[1]], edges], -1))
            heard = torch.zeros_like(nodes).index_add(1, ends[1], edges)
            nodes = nodes + node_block(torch.cat([nodes, heard], -1))
        return nodes


class Forecaster(nn.Module):
    """Encodes the weather on a ring of stations, processes it on their mesh and decodes the change."""

    def __init__(self, width: int, edge_layers: int, stations: int = 24) -> None:
        super().__init__()
        here = torch.arange(stations)
        self.ends = torch.stack(
            [torch.cat([here] * 4), torch.cat([(here + s) % stations for s in (-2, -1, 1, 2)])]
        )
        self.encode, self.lengths = perceptron(3, width, 1, width), nn.Embedding(4, width)
        self.processor = Processor(width, edge_layers)
        self.decode = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, now: Tensor) -> Tensor:
        """Return the weather of the next hour, shape (batch, stations, 3)."""
        kinds = torch.arange(4).repeat_interleave(now.shape[1])
        edges = self.lengths(kinds).expand(len(now), -1, -1)
        return now + self.decode(self.processor(self.encode(now), edges, self.ends))


@sick(
    "contact3a-weather-edge_depth",
    [("VANISHING", "processor.edge_blocks")],
    fading("processor.edge_blocks.0.0", "processor.edge_blocks.0", 1e-6),
    allow=["BOTTLENECK", "DEAD"],
    source="https://github.com/openclimatefix/graph_weather/issues/56",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def edge_depth(sick: bool, width: int) -> Setup:
    """The width of the edge networks is handed over as their number of layers too: no gradient comes through
    them, and messages say nothing. Repair: two layers."""
    wind = torch.tensor([1, -1, 2])

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        now = normal(g, 8, 24, 3)
        moved = torch.stack([now[..., i].roll(int(wind[i]), 1) for i in range(3)], -1)
        return now, 0.3 * now + 0.7 * moved

    layers = width if sick else 2
    return setup(Forecaster(width, layers), sample, F.mse_loss, 3e-3)


# ------------------------------------------------------------------------------------ causal discovery


class CausalGraph(nn.Module):
    """Learns which variables cause which: every edge's chance, and what its causes make of a variable."""

    def __init__(self, variables: int, width: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(0.01 * torch.randn(variables, variables))
        self.names = nn.Parameter(torch.randn(variables, 4))
        self.say = nn.Sequential(nn.Linear(5, width), nn.LeakyReLU(), nn.Linear(width, 8))
        self.hear = nn.Sequential(nn.Linear(12, width), nn.LeakyReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return what each variable is expected to be (batch, variables), and the chances of the edges."""
        edges = torch.sigmoid(self.logits) * (1 - torch.eye(len(self.logits)))
        names = self.names.expand(len(x), -1, -1)
        said = self.say(torch.cat([x[..., None], names], -1))
        heard = torch.einsum("jv,bjw->bvw", edges, said)
        return {"mean": self.hear(torch.cat([heard, names], -1)).squeeze(-1), "edges": edges}


@sick(
    "contact3a-causal-acyclic_exponential",
    [("NUMERICAL", "*")],
    not_finite(3),
    allow=["EXPLODING", "UNSTABLE"],
    source="https://github.com/microsoft/causica/issues/67",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def acyclic_exponential(sick: bool, width: int) -> Setup:
    """The penalty on cycles is the trace of a matrix exponential, which is infinite for two hundred variables
    that may all be joined. Repair: a truncated series of the scaled matrix."""
    variables = 200

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = [normal(g, 16)]
        for _ in range(variables - 1):
            x.append(0.9 * x[-1] + math.sqrt(1 - 0.81) * normal(g, 16))
        return torch.stack(x, 1), torch.stack(x, 1)

    def cycles(edges: Tensor) -> Tensor:
        if sick:
            return torch.matrix_exp(edges).trace() - variables
        scaled = power = edges / variables
        total = power.trace()
        for _ in range(5):
            power = power @ scaled
            total = total + power.trace()
        return total

    def loss(output: dict[str, Tensor], x: Tensor) -> Tensor:
        edges = output["edges"]
        return F.mse_loss(output["mean"], x) + cycles(edges) + 1e-4 * edges.sum()

    return setup(CausalGraph(variables, width), sample, loss, 2e-2)


@healthy(
    "contact3a-uplift-rare_treatment",
    zero_at_first("treated"),
    steps=300,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def rare_treatment(width: int) -> Setup:
    """A shared representation and one head for each arm, where few are treated: in many batches the head of
    the treated has no gradient at all, and it trains."""

    class Arms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Sequential(nn.Linear(8, width), nn.ELU(), nn.Linear(width, width), nn.ELU())
            self.control, self.treated = nn.Linear(width, 1), nn.Linear(width, 1)

        def forward(self, x: Tensor, treated: Tensor) -> Tensor:
            shared = self.shared(x)
            answers = torch.cat([self.control(shared), self.treated(shared)], 1)
            return answers.gather(1, treated[:, None]).squeeze(1)

    effect = normal(seeded(41), 8) / 2

    def sample(g: Generator) -> tuple[Any, Tensor]:
        x = normal(g, 16, 8)
        treated = (uniform(g, 16) < 0.05).long()
        return (x, treated), torch.sin(x[:, 0]) + x[:, 1] + treated * (1 + x @ effect)

    return setup(Arms(), sample, F.mse_loss, 3e-3)


# -------------------------------------------------------------------------------------------- proteins


class Equivariant(nn.Module):
    """A layer on features and positions: messages by distance, and moves along the lines between residues."""

    def __init__(self, width: int, bounded: bool) -> None:
        super().__init__()
        self.bounded = bounded
        self.message = nn.Sequential(
            nn.Linear(2 * width + 1, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )
        self.move = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.update = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (batch, residues, width) and positions (batch, residues, 3)."""
        n = h.shape[1]
        lines = x[:, :, None] - x[:, None]
        far = lines.square().sum(-1, keepdim=True)
        pair = [h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1)]
        messages = F.silu(self.message(torch.cat([*pair, far], -1)))
        weights = self.move(messages)
        if self.bounded:
            weights, lines = torch.tanh(weights), lines / (far + 1).sqrt()
        x = x + (weights * lines).sum(2) / (n if self.bounded else 1)
        return h + self.update(torch.cat([h, messages.sum(2) / (n if self.bounded else 1)], -1)), x


class Folder(nn.Module):
    """Moves the residues of a chain from where they are guessed to where they belong."""

    def __init__(self, width: int, bounded: bool) -> None:
        super().__init__()
        self.residues = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Equivariant(width, bounded) for _ in range(4))

    def forward(self, chain: Tensor, x: Tensor) -> Tensor:
        """Return the distances between residues (batch, residues, residues)."""
        h = self.residues(chain)
        for layer in self.layers:
            h, x = layer(h, x)
        return ((x[:, :, None] - x[:, None]).square().sum(-1) + 1e-4).sqrt()


@sick(
    "contact3a-protein-equivariant_moves",
    [("EXPLODING", "*")],
    growing("layers.0.message.2", "layers.3.message.2", 100),
    allow=["NUMERICAL", "UNSTABLE"],
    source="https://github.com/lucidrains/egnn-pytorch/pull/33",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def equivariant_moves(sick: bool, width: int) -> Setup:
    """Residues move by the sum of all lines to others, times weights that grow with the distance: positions
    and gradients grow from layer to layer. Repair: bounded weights, lines of unit length, and a mean."""

    def sample(g: Generator) -> tuple[Any, Tensor]:
        turn = torch.arange(12.0)
        helix = torch.stack([torch.cos(turn * 1.7), torch.sin(turn * 1.7), 0.4 * turn], -1)
        guess = helix + 0.6 * normal(g, 8, 12, 3)
        return (choice(g, 20, 8, 12), guess), torch.cdist(helix, helix)

    def loss(output: Tensor, distances: Tensor) -> Tensor:
        return (output - distances).square().mean()

    return setup(Folder(width, bounded=not sick), sample, loss, 2e-3)
