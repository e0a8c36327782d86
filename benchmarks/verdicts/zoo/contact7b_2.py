"""A state-space model, a recommender and the networks of beginners' questions."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import data
from .claims import every, fading, flat, no_gradient, rises, silent, strong
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


# ------------------------------------------------------------------------------------ state spaces


class MambaBlock(nn.Module):
    """A selective state-space block, scanned step by step."""

    def __init__(self, width: int, states: int = 4, *, softplus: bool) -> None:
        super().__init__()
        inner, self.rank, self.states = 2 * width, 4, states
        self.softplus = softplus
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, padding=3, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        nn.init.kaiming_normal_(self.conv1d.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv1d(u.transpose(1, 2))[..., :length].transpose(1, 2))
        low, b, c = self.x_proj(u).split([self.rank, self.states, self.states], dim=-1)
        delta = self.dt_proj(low)
        if self.softplus:
            delta = F.softplus(delta)
        decay = torch.exp(delta[..., None] * -self.A_log.exp())
        push = (delta * u)[..., None] * b[:, :, None]
        state, outs = torch.zeros_like(push[:, 0]), []
        for t in range(length):
            state = decay[:, t] * state + push[:, t]
            outs.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(outs, 1) + self.D * u
        return self.out_proj(y * F.silu(z))


class MambaClassifier(nn.Module):
    """One residual block between an embedding of the series and the classes."""

    def __init__(self, features: int, width: int, kinds: int, *, softplus: bool) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, width)
        self.norm = nn.RMSNorm(width)
        self.mixer = MambaBlock(width, softplus=softplus)
        self.head = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.head((h + self.mixer(self.norm(h))).mean(1))


@sick(
    "contact7b-ssm-nosoftplus",
    [("EXPLODING", "mixer")],
    strong("mixer", 30.0),
    allow=["NUMERICAL", "UNSTABLE"],
    source="https://github.com/alxndrTL/mamba.py/issues/53",
    **ONE,
)
def nosoftplus(sick: bool, width: int) -> Setup:
    """The step sizes of a selective state space are used without softplus, so many are negative, and a
    negative step turns the decay of the state into growth at every time step: values and gradients blow up
    and the loss becomes NaN. Softplus after the projection keeps the steps positive."""
    model = MambaClassifier(4, width // 2, 3, softplus=not sick)
    return data.setup(model, data.series(16), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------------------- recommenders


class WideDeep(nn.Module):
    """Wide & Deep over a user, an item and one number, whose embedding is scaled by its value."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(users, width)
        self.item_embedding = nn.Embedding(items, width)
        self.float_embedding = nn.Embedding(1, width)
        self.first_order = nn.Embedding(users + items + 1, 1)
        self.users, self.items = users, items
        self.mlp_layers = nn.Sequential(
            nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.deep_predict_layer = nn.Linear(width, 1)
        self.sigmoid = nn.Sigmoid()
        for embedding in (self.user_embedding, self.item_embedding, self.float_embedding):
            nn.init.normal_(embedding.weight, std=0.5)
        nn.init.normal_(self.first_order.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor, timestamp: Tensor) -> Tensor:
        scaled = self.float_embedding.weight * timestamp[:, None]
        fields = [self.user_embedding(user), self.item_embedding(item), scaled]
        deep = self.deep_predict_layer(self.mlp_layers(torch.cat(fields, 1)))
        wide = self.first_order(user) + self.first_order(self.users + item)
        wide = wide + self.first_order.weight[-1:] * timestamp[:, None]
        return self.sigmoid(wide + deep)[:, 0]


@sick(
    "contact7b-rec-timestamp",
    [("SATURATION", "sigmoid")],
    every(flat("sigmoid", "sigmoid", 0.95), no_gradient("mlp_layers", "user_embedding", after=15)),
    allow=["DEAD", "VANISHING", "EXPLODING", "NUMERICAL"],
    source="https://github.com/RUCAIBox/RecBole/issues/1062",
    **ONE,
)
def timestamp(sick: bool, width: int) -> Setup:
    """A click time in seconds goes into Wide & Deep as a plain number: it drowns all other fields, the output
    sigmoid is exactly zero or one, and the training loss never changes. Scaling the numbers to between zero
    and one repairs it."""
    users, items = 40, 30
    fan, liked = data.normal(data.seeded(21), users), data.normal(data.seeded(22), items)
    begin, span = 1.4e9, 1.2e8

    def clicks(g: Generator) -> tuple[dict[str, Tensor], Tensor]:
        user, item = data.choice(g, users, 64), data.choice(g, items, 64)
        when = data.uniform(g, 64)
        label = (fan[user] + liked[item] + 2 * when - 1 > 0).float()
        seconds = begin + span * when
        return {"user": user, "item": item, "timestamp": seconds if sick else when}, label

    return data.setup(WideDeep(users, items, width), clicks, F.binary_cross_entropy, 1e-2)


# ------------------------------------------------------------------------------- beginners' questions


class Dense(nn.Module):
    """A linear layer and the activation that follows it."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.relu = relu
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x)) if self.relu else self.linear(x)


@sick(
    "contact7b-mlp-reluoutput",
    [("DEAD", "dense_3")],
    every(silent("dense_3", 0.99, steps=20), no_gradient("dense_1", "dense_2", "dense_3", after=15)),
    source="https://community.deeplearning.ai/t/loss-values-do-not-change/324182",
    **ONE,
)
def reluoutput(sick: bool, width: int) -> Setup:
    """A network for y = 2x - 1 has a ReLU on its output too, and in most runs the loss never changes: the
    output starts below zero for all inputs, so no gradient passes. A linear output repairs it."""
    x = torch.linspace(-1, 5, 60)[:, None]
    dense_1, dense_2 = Dense(1, width // 2), Dense(width // 2, 12)
    with torch.no_grad():  # every hidden unit fires for most inputs, so that only the output can be dead
        dense_2.linear.weight *= dense_2.linear(dense_1(x)).mean(0).sign()[:, None]
        hidden = dense_2(dense_1(x))
        dense_3 = Dense(12, 1, relu=sick)
        while not -6 < dense_3.linear(hidden).min() <= dense_3.linear(hidden).max() <= 0:
            dense_3 = Dense(12, 1, relu=sick)  # one of the runs of the report in which nothing moves

    def line(g: Generator) -> tuple[Tensor, Tensor]:
        given = -1 + 6 * data.uniform(g, 32, 1)
        return given, 2 * given - 1

    model = data.stack(dense_1=dense_1, dense_2=dense_2, dense_3=dense_3)
    return data.setup(model, line, F.mse_loss, 3e-3)


class EncoderCNN(nn.Module):
    """A small convolutional network over each frame of a clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(16 * 4, width, bias=False)
        self.bn1 = nn.BatchNorm1d(width)

    def forward(self, clips: Tensor) -> Tensor:
        x = F.relu(self.conv1(clips.flatten(0, 1)))
        x = F.relu(self.conv2(x))
        return self.bn1(self.fc1(x.flatten(1))).unflatten(0, clips.shape[:2])


class DecoderRNN(nn.Module):
    """An LSTM over clips of different lengths, read out at one time step."""

    def __init__(self, width: int, kinds: int, *, last_frame: bool) -> None:
        super().__init__()
        self.last_frame = last_frame
        self.LSTM = nn.LSTM(width, width, batch_first=True)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, kinds)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, ends = pad_packed_sequence(self.LSTM(packed)[0], batch_first=True, total_length=x.shape[1])
        out = out[:, -1] if self.last_frame else out[torch.arange(len(out)), ends - 1]
        return self.fc2(F.relu(self.fc1(out)))


class VideoClassifier(nn.Module):
    """The encoder of frames and the decoder of the clip."""

    def __init__(self, width: int, kinds: int, *, last_frame: bool) -> None:
        super().__init__()
        self.encoder = EncoderCNN(width)
        self.decoder = DecoderRNN(width, kinds, last_frame=last_frame)

    def forward(self, clips: Tensor, lengths: Tensor) -> Tensor:
        return self.decoder(self.encoder(clips), lengths)


def moving_dots(number: int, frames: int, size: int = 8) -> data.Sample:
    """Clips of a bright dot that moves in one of four directions, shorter than the padded length."""
    ways = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind, lengths = data.choice(g, 4, number), 5 + data.choice(g, frames - 7, number)
        start = 3 * (ways[kind] + 1) + data.choice(g, 3, number, 2)
        clips = 0.1 * data.normal(g, number, frames, 1, size, size)
        for t in range(frames):
            row, column = ((start + t * ways[kind]) % size).unbind(1)
            clips[torch.arange(number), t, 0, row, column] += 4.0
        clips *= (torch.arange(frames) < lengths[:, None])[:, :, None, None, None]
        return (clips, lengths), kind

    return sample


@sick(
    "contact7b-rnn-lastframe",
    [("DEAD", "decoder")],
    no_gradient("encoder", "decoder.LSTM", after=15),
    source="https://github.com/HHTseng/video-classification/issues/39",
    **ONE,
)
def lastframe(sick: bool, width: int) -> Setup:
    """Clips of different length are padded to a fixed number of frames, and the classifier reads the LSTM's
    output at the last padded frame, which unpacking has filled with zeros: it sees nothing of the clip.
    Reading the last real frame, from the lengths that unpacking returns, repairs it."""
    model = VideoClassifier(width, 4, last_frame=sick)
    return data.setup(model, moving_dots(24, 12), F.cross_entropy, 1e-2)


class ResidualConv(nn.Module):
    """A convolution on the normalised branch, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.conv(F.relu(self.norm(h)))


class DeepCNN(nn.Module):
    """Twenty convolutions, bare or as residual blocks, then a pool over the picture and the classes."""

    def __init__(self, channels: int, kinds: int, *, bare: bool, depth: int = 20) -> None:
        super().__init__()
        first = nn.Conv2d(3, channels, 3, padding=1)
        later: list[nn.Module] = []
        for _ in range(depth - 1):
            conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())
            later.append(conv if bare else ResidualConv(channels))
        self.blocks = nn.ModuleList([first, *later])
        self.fc = nn.Linear(channels, kinds)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


@sick(
    "contact7b-cnn-bare",
    [("VANISHING", "blocks")],
    fading("blocks.0", "blocks.19", 1e-4),
    allow=["BOTTLENECK"],
    source="https://github.com/jsboige/CoursIA/pull/14204",
    **ONE,
)
def bare(sick: bool, width: int) -> Setup:
    """Twenty convolutions stacked bare do not learn: the gradient falls by the same factor in each, and the
    first gets some 1e-8 of what the last gets. Residual blocks that normalise before the activation bring the
    ratio to about one."""
    model = DeepCNN(width // 4, 4, bare=sick)
    return data.setup(model, data.textures(), F.cross_entropy, 3e-3)


@sick(
    "contact7b-mlp-saleprice",
    [("UNSTABLE", "*")],
    rises(100.0),
    allow=["EXPLODING", "NUMERICAL"],
    source="https://github.com/rstudio-conf-2020/dl-keras-tf/issues/9",
    **ONE,
)
def saleprice(sick: bool, width: int) -> Setup:
    """House prices of up to 755,000 are fitted as they are, with the squared error and plain gradient descent
    at a rate of 0.1: the loss overflows within a few steps and is NaN from then on. Fitting the logarithm of
    the price, put on a unit scale, repairs it."""
    weights = data.normal(data.seeded(23), 12, 1) / math.sqrt(12)

    def houses(g: Generator) -> tuple[Tensor, Tensor]:
        x = data.normal(g, 32, 12)
        log_price = 12.0 + 0.4 * torch.tanh(x @ weights) + 0.05 * data.normal(g, 32, 1)
        return x, log_price.exp() if sick else (log_price - 12.0) / 0.4

    model = data.stack(
        dense_1=nn.Linear(12, width),
        relu_1=nn.ReLU(),
        dense_2=nn.Linear(width, width),
        relu_2=nn.ReLU(),
        dense_3=nn.Linear(width, width),
        relu_3=nn.ReLU(),
        price=nn.Linear(width, 1),
    )
    for layer in (model.dense_1, model.dense_2, model.dense_3):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return data.setup(model, houses, F.mse_loss, data.sgd(0.1))
