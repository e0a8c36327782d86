"""Reported failures of forecasters, weather models and tabular models, each with its repair."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, strong, training, weak
from .data import choice, normal, seeded, setup, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ----------------------------------------------------------------------- TiDE: a norm over one number


class ResidualBlock(nn.Module):
    """Two dense layers and a skip, with a norm at the end if told."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, layer_norm: bool = True) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, outputs)
        self.skip = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs) if layer_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(F.relu(self.hidden(x))) + self.skip(x))


class TiDE(nn.Module):
    """Dense encoder and decoder of the past, and a decoder per future step that sees the known covariates."""

    def __init__(self, lookback: int, horizon: int, covariates: int, width: int, *, final_norm: bool) -> None:
        super().__init__()
        self.horizon = horizon
        self.encoder = nn.Sequential(
            ResidualBlock(lookback + horizon * covariates, width, width), ResidualBlock(width, width, width)
        )
        self.decoder = ResidualBlock(width, width, horizon * 4)
        self.final_decoder = ResidualBlock(4 + covariates, width, 1, layer_norm=final_norm)
        self.lookback_skip = nn.Linear(lookback, horizon)

    def forward(self, past: Tensor, future: Tensor) -> Tensor:
        code = self.encoder(torch.cat([past, future.flatten(1)], 1))
        steps = self.decoder(code).view(len(past), self.horizon, 4)
        change = self.final_decoder(torch.cat([steps, future], 2)).squeeze(2)
        return change + self.lookback_skip(past)


@sick(
    "contact8a-forecast-tide",
    expect=[("DEAD", "final_decoder")],
    allow=["BOTTLENECK", "VANISHING"],
    claim=every(weak("decoder", "lookback_skip", 1e-3), weak("final_decoder.hidden", "lookback_skip", 1e-3)),
    source="https://github.com/google-research/google-research/issues/2133",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tide(sick: bool, width: int) -> Setup:
    """The report says that with layer norm on, the last decoder of TiDE gives out the same number whatever
    comes in, since it normalises a vector of length one; only the linear skip from the past learns.
    Without the norm on that last block the encoder and decoders learn."""
    lookback, horizon = 16, 6

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        phase = 6.3 * uniform(g, 32, 1)
        time = torch.arange(lookback + horizon)[None]
        load = torch.sin(0.5 * time + phase) + 0.1 * normal(g, 32, lookback + horizon)
        weather = normal(g, 32, horizon, 2)
        target = load[:, lookback:] + 1.5 * torch.tanh(2 * weather[..., 0]) * (weather[..., 1] > 0)
        return (load[:, :lookback], weather), target

    return setup(TiDE(lookback, horizon, 2, width, final_norm=sick), sample, F.mse_loss, 5e-3)


# ------------------------------------------------------------------- N-BEATS: the last backcast of all


class Block(nn.Module):
    """A stack of dense layers with one head for what it explains of the past and one for the forecast."""

    def __init__(self, lookback: int, horizon: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(lookback, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.backcast = nn.Linear(width, lookback)
        self.forecast = nn.Linear(width, horizon)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.fc(x)
        return self.backcast(code), self.forecast(code)


class NBeats(nn.Module):
    """Blocks that each take what the ones before have left of the series."""

    def __init__(self, lookback: int, horizon: int, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(lookback, horizon, width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for block in self.blocks:
            backcast, forecast = block(x)
            x, total = x - backcast, total + forecast
        return total


def idle(prefix: str) -> Claim:
    """There are parameters to train under the prefix, and after some steps none ever had a gradient."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, 5)
        found = {n: g for n, g in last.grads.items() if n.startswith(prefix)}
        without = sum(g is None for g in found.values())
        told = f"{without} of {len(found)} under {prefix} without gradient"
        return bool(found) and without == len(found), told

    return claim


@sick(
    "contact8a-forecast-nbeats",
    expect=[("DEAD", "blocks.3.backcast")],
    claim=idle("blocks.3.backcast"),
    source="https://github.com/unit8co/darts/pull/347",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def nbeats(sick: bool, width: int) -> Setup:
    """The report says that logging the gradients fails because the backcast layer of the last block has none:
    nothing comes after it that would take what is left, so it does not reach the loss. The repair stops
    it from being trained."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        phase, speed = 6.3 * uniform(g, 32, 1), 0.3 + 0.5 * uniform(g, 32, 1)
        series = torch.sin(speed * torch.arange(26)[None] + phase) + 0.05 * normal(g, 32, 26)
        return series[:, :20], series[:, 20:]

    model = NBeats(20, 6, width, 4)
    if not sick:
        model.blocks[3].backcast.requires_grad_(False)
    return setup(model, sample, F.mse_loss, 3e-3)


# --------------------------------------------------- weather: all observations through the grid's cells


class Encoder(nn.Module):
    """Reads each observation, and gathers those of a cell into the cell."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.node_mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, cells: int) -> tuple[Tensor, Tensor]:
        obs = self.node_mlp(x)
        return obs, obs.unflatten(1, (cells, -1)).mean(2)


class Processor(nn.Module):
    """One round of messages between neighbouring cells."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, cell: Tensor) -> Tensor:
        sides = (torch.cat([cell, cell.roll(shift, 1)], -1) for shift in (1, -1))
        return cell + sum(self.edge_mlp(side) for side in sides)


class Decoder(nn.Module):
    """Takes the cells back to the observations: the change of each."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.node_mlp = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, features))

    def forward(self, cell: Tensor, seed: Tensor) -> Tensor:
        message = self.edge_mlp(cell).repeat_interleave(seed.shape[1] // cell.shape[1], 1)
        return self.node_mlp(torch.cat([seed, message], -1))


class RegionalForecaster(nn.Module):
    """Observations to cells, cells among themselves, cells to the change of the observations."""

    def __init__(self, features: int, width: int, cells: int, *, seeded: bool) -> None:
        super().__init__()
        self.cells, self.seeded = cells, seeded
        self.encoder = Encoder(features, width)
        self.processor = nn.ModuleList(Processor(width) for _ in range(2))
        self.decoder = Decoder(features, width)

    def forward(self, x: Tensor) -> Tensor:
        obs, cell = self.encoder(x, self.cells)
        for block in self.processor:
            cell = block(cell)
        return x + self.decoder(cell, obs if self.seeded else torch.zeros_like(obs))


def same_within_cells(module: str, cells: int) -> Claim:
    """After training, what a module gives out is the same for all observations of a cell."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, 20, (module,))
        parts = last.outputs[module].detach().double().unflatten(1, (cells, -1))
        share = float((parts - parts.mean(2, keepdim=True)).square().mean() / parts.square().mean())
        return share < 1e-9, f"share of {module} that differs within a cell = {share:.2g}"

    return claim


@sick(
    "contact8a-weather-cells",
    expect=[("BOTTLENECK", "decoder")],
    allow=["DEAD"],
    claim=same_within_cells("decoder", 6),
    source="https://github.com/openclimatefix/graph_weather/issues/3",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def weather_cells(sick: bool, width: int) -> Setup:
    """The report says that the forecast collapses to persistence however deep the processor: the decoder's
    nodes start from zeros, so all observations of a cell get the cell's one change, and their own values
    reach the output by the fixed skip only. Starting the decoder from the encoder's nodes repairs it."""
    cells, per_cell, features = 6, 8, 4
    mix = normal(seeded(21), features, features) / math.sqrt(features)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        front = normal(g, 8, cells, 1, features)
        x = (0.5 * front + normal(g, 8, cells, per_cell, features)).flatten(1, 2)
        wind = (front.roll(1, 1) - front).expand(-1, -1, per_cell, -1).flatten(1, 2)
        return x, x + 0.3 * wind + torch.sin(2 * x @ mix)

    model = RegionalForecaster(features, width, cells, seeded=not sick)
    return setup(model, sample, F.mse_loss, 5e-3)


# ------------------------------------------------------------------------- DeepFM: raw counts as features


class NumericEmbedding(nn.Module):
    """A vector for each numeric field, times the field's value."""

    def __init__(self, fields: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(fields, size))

    def forward(self, values: Tensor) -> Tensor:
        return values[..., None] * self.weight


class DeepFM(nn.Module):
    """Embeddings of the fields, their products in pairs, and a dense part over them."""

    def __init__(self, fields: int, numbers: int, size: int, width: int) -> None:
        super().__init__()
        self.categorical = nn.ModuleList(nn.Embedding(12, size) for _ in range(fields))
        self.numeric = NumericEmbedding(numbers, size)
        self.first_order = nn.Linear(numbers, 1)
        self.mlp = nn.Sequential(
            nn.Linear((fields + numbers) * size, width), nn.ReLU(), nn.Linear(width, 1, bias=False)
        )
        for table in self.categorical:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, kinds: Tensor, values: Tensor) -> Tensor:
        named = torch.stack([table(kinds[:, i]) for i, table in enumerate(self.categorical)], 1)
        rows = torch.cat([named, self.numeric(values)], 1)
        pairs = 0.5 * (rows.sum(1).pow(2) - rows.pow(2).sum(1)).sum(1, keepdim=True)
        return self.first_order(values) + pairs + self.mlp(rows.flatten(1))


@sick(
    "contact8a-tabular-deepfm",
    expect=[("EXPLODING", "numeric")],
    allow=["UNSTABLE", "NUMERICAL"],
    claim=strong("numeric", 1e6),
    source="https://github.com/chenxijun1029/DeepFM_with_PyTorch/pull/5",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def deepfm(sick: bool, width: int) -> Setup:
    """The report says that the continuous fields go in as they are, and that their squares in the pairwise
    term of the factorisation machine run to infinity, so that nothing is learned. Normalising the
    continuous fields repairs it."""
    taste = normal(seeded(22), 12)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kinds, logs = choice(g, 12, 64, 4), normal(g, 64, 5)
        counts = torch.exp(6 + 1.5 * logs).floor()
        clicked = (taste[kinds[:, 0]] + logs[:, 0] - logs[:, 1] * logs[:, 2] > 0).float()[:, None]
        return (kinds, counts if sick else (torch.log1p(counts) - 6) / 1.5), clicked

    return setup(DeepFM(4, 5, 8, width), sample, F.binary_cross_entropy_with_logits, 5e-3)


# ------------------------------------------------------------ healthy: a hash grid that starts at nothing


class HashEncoding(nn.Module):
    """Grids over the unit square; the corners of the finer ones share the rows of a small table."""

    def __init__(self, levels: int, rows: int) -> None:
        super().__init__()
        sizes = (min(rows, (4 * 2**level + 1) ** 2) for level in range(levels))
        self.tables = nn.ModuleList(nn.Embedding(size, 2) for size in sizes)
        for table in self.tables:
            nn.init.uniform_(table.weight, -1e-4, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for level, table in enumerate(self.tables):
            side = 4 * 2**level
            place = x * side
            low = place.floor()
            part = 0.0
            for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
                at = low + torch.tensor(corner)
                near = (1 - (place - at).abs()).prod(1, keepdim=True)
                a, b = at.long().unbind(1)
                coarse = (side + 1) ** 2 == table.num_embeddings
                row = a * (side + 1) + b if coarse else (a ^ b * 2654435761) % table.num_embeddings
                part = part + near * table(row)
            found.append(part)
        return torch.cat(found, 1)


class Field(nn.Module):
    """A small dense network over the encoding of a place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoding = HashEncoding(4, 128)
        self.sigma_net = nn.Sequential(nn.Linear(8, width, bias=False), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.sigma_net(self.encoding(x))


def starts_at_nothing(module: str, below: float) -> Claim:
    """A module's output is tiny in the first step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        (first,) = training(setup, 1, (module,))
        size = float(first.outputs[module].detach().square().mean().sqrt())
        return size < below, f"size of {module} at first = {size:.2g}"

    return claim


@healthy(
    "contact8a-nerf-hashgrid",
    looks=starts_at_nothing("encoding", 1e-3),
    source="https://github.com/NVlabs/instant-ngp/issues/118",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def hashgrid(width: int) -> Setup:
    """A field over a multi-level hash encoding, whose tables start at a ten-thousandth and are trained by
    Adam with an epsilon of 1e-15. The maintainers answer that these settings match theirs: the tables grow
    quickly."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = uniform(g, 256, 2)
        return x, (torch.sin(9 * x[:, 0]) * torch.cos(7 * x[:, 1]) + 0.5 * torch.sin(20 * x.sum(1)))[:, None]

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(list(parameters), lr=1e-2, betas=(0.9, 0.99), eps=1e-15)

    return setup(Field(width), sample, F.mse_loss, optimizer)
