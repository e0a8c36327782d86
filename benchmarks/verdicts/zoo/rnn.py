"""Recurrent networks: long sequences, gates, loops by hand, and what is handed from one part to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import fades_in_time, flat, growing, no_gradient, rises, stuck
from .data import Setup, choice, grammar, normal, series, setup, sgd, stack, token_loss
from .registry import healthy, sick

CELLS = (16, 24, 32)


class _Reader(nn.Module):
    """A recurrent layer, of which the last state (or what `pick` makes of all) is classified."""

    def __init__(self, rnn: nn.RNNBase, kinds: int = 3) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), kinds)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


# --------------------------------------------------------------------------------------------- DEAD


@sick("rnn-encoder-state-detached", [("DEAD", "encoder")], no_gradient("encoder"), widths=CELLS)
def encoder_state_detached(sick: bool, width: int) -> Setup:
    """The encoder's state is detached before the decoder, as one does between batches; not within one."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, width)
            self.encoder = nn.GRU(width, width, batch_first=True)
            self.decoder = nn.GRU(width, width, batch_first=True)
            self.head = nn.Linear(width, 8)

        def forward(self, source: Tensor, begun: Tensor) -> Tensor:
            state = self.encoder(self.embed(source))[1]
            return self.head(self.decoder(self.embed(begun), state.detach() if sick else state)[0])

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = choice(g, 8, 32, 4)
        target = source.flip(1)
        return (source, F.pad(target[:, :-1], (1, 0))), target

    return setup(Translator(), sample, token_loss, 2e-2)


@sick("rnn-hard-choice-between-parts", [("DEAD", "tagger")], no_gradient("tagger"), widths=CELLS)
def hard_choice(sick: bool, width: int) -> Setup:
    """A tagger's best tag, by `topk` indices, goes into the next part's embedding; mix the tags by their
    probabilities."""

    class Pipeline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tagger = nn.Linear(4, 6)
            self.tags = nn.Embedding(6, width)
            self.reader = nn.GRU(width, width, batch_first=True)
            self.head = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.tagger(x)
            if sick:
                h = self.tags(scores.topk(1, -1).indices.squeeze(-1))
            else:
                h = scores.softmax(-1) @ self.tags.weight
            return self.head(self.reader(h)[0].mean(1))

    return setup(Pipeline(), series(8, 32), F.cross_entropy, 2e-2)


# ---------------------------------------------------------------------------------------- VANISHING


@sick(
    "rnn-plain-over-long-sequence",
    [("VANISHING", "rnn")],
    fades_in_time("rnn", 1e-5, sound=10),
    allow=["BOTTLENECK"],
    source="https://arxiv.org/abs/1211.5063",
    widths=CELLS,
    steps=150,
)
def plain_over_long(sick: bool, width: int) -> Setup:
    """The class is told in the first ten of forty steps, and a plain tanh recurrence at the default
    initialisation has forgotten; a GRU that starts by keeping its state has not."""
    rnn = (nn.RNN if sick else nn.GRU)(4, width, batch_first=True)
    if not sick:
        with torch.no_grad():
            for bias in (rnn.bias_ih_l0, rnn.bias_hh_l0):
                bias[width : 2 * width] = 1.5
    return setup(_Reader(rnn), series(40, 16), F.cross_entropy, 1e-2)


@sick(
    "rnn-read-behind-the-padding",
    [("VANISHING", "rnn")],
    fades_in_time("rnn", 1e-6, sound=6),
    widths=CELLS,
    allow=["BOTTLENECK"],
)
def read_behind_padding(sick: bool, width: int) -> Setup:
    """Sequences of six steps are padded to sixty, and the last output, behind the padding, is classified;
    take the last real one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(4, width, batch_first=True), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1 if sick else 5])

    inner = series(6, 32)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = inner(g)
        return F.pad(x, (0, 0, 0, 54)), y

    return setup(Net(), sample, F.cross_entropy, 1e-2)


# ---------------------------------------------------------------------------------------- EXPLODING


@sick(
    "rnn-rectified-recurrence",
    [("EXPLODING", "rnn")],
    rises(1e3),
    allow=["UNSTABLE", "NUMERICAL"],
    source="https://arxiv.org/abs/1504.00941",
    widths=CELLS,
)
def rectified_recurrence(sick: bool, width: int) -> Setup:
    """A ReLU recurrence over thirty steps whose recurrent weights have gain 1.8; the identity keeps the
    size."""
    rnn = nn.RNN(4, width, batch_first=True, nonlinearity="relu")
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(1.8 * torch.eye(width) if sick else torch.eye(width))
        rnn.bias_ih_l0.zero_(), rnn.bias_hh_l0.zero_()
        rnn.weight_ih_l0.mul_(1.0 if sick else 0.3)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 16, 30, 4)
        return x, x[..., :1].mean(1)

    return setup(_Reader(rnn, 1), sample, F.mse_loss, sgd(1e-3) if sick else 3e-3)


@sick(
    "rnn-rollout-with-large-time-step",
    [("EXPLODING", "force")],
    growing("start", "read", 1e3),
    allow=["UNSTABLE", "NUMERICAL"],
    widths=CELLS,
)
def rollout(sick: bool, width: int) -> Setup:
    """A learned force is integrated over thirty steps of size one, each feeding the next; steps of 0.05
    integrate the same law."""

    class Rollout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(4, 4)
            self.force = stack(fc0=nn.Linear(4, width), act=nn.ReLU(), fc1=nn.Linear(width, 4))
            self.read = nn.Linear(4, 2)
            nn.init.kaiming_normal_(self.force.fc0.weight, nonlinearity="relu")
            nn.init.kaiming_normal_(self.force.fc1.weight)

        def forward(self, x: Tensor) -> Tensor:
            s = self.start(x)
            for _ in range(30):
                s = s + (1.0 if sick else 0.05) * self.force(s)
            return self.read(s)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, 4)
        return x, x[:, :2] + 0.5 * x[:, 2:]

    return setup(Rollout(), sample, F.mse_loss, 3e-3)


# ----------------------------------------------------------------------------------------- UNSTABLE


@sick(
    "rnn-rate-too-high",
    [("UNSTABLE", "*")],
    rises(3.0),
    allow=["EXPLODING", "SATURATION", "DEAD", "VANISHING"],
    widths=CELLS,
)
def rate_too_high(sick: bool, width: int) -> Setup:
    """A GRU on a sum of its inputs, with Adam at a rate of 0.5 for 0.005: each step throws it somewhere
    else."""

    class Tracker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(2, width, batch_first=True), nn.Linear(width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 32, 12, 2)
        return x, torch.tanh(x[..., :1].cumsum(1) / 2)

    return setup(Tracker(), sample, F.mse_loss, 0.5 if sick else 5e-3)


# --------------------------------------------------------------------------------------- SATURATION


class _Gated(nn.Module):
    """A recurrent cell of which every gate is a layer: h becomes (1 - z) h + z tanh(...)."""

    def __init__(self, size: int, width: int, keep: float) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(size + width, width), nn.Linear(size + width, width)
        nn.init.constant_(self.gate.bias, -keep)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        both = torch.cat([x, h], -1)
        z = torch.sigmoid(self.gate(both))
        return (1 - z) * h + z * torch.tanh(self.new(both))


@sick(
    "rnn-gate-stuck-shut",
    [("SATURATION", "cell")],
    flat("cell.gate", "sigmoid of", 0.95),
    allow=["VANISHING", "BOTTLENECK"],
    widths=CELLS,
)
def gate_stuck(sick: bool, width: int) -> Setup:
    """The update gate's bias is -12, meant as a long memory: it never opens, and its sigmoid cannot learn to;
    a bias of -1 remembers as well."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = _Gated(4, width, 12.0 if sick else 1.0)
            self.head = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(len(x), self.head.in_features)
            for step in x.unbind(1):
                h = self.cell(step, h)
            return self.head(h)

    return setup(Net(), series(12, 32), F.cross_entropy, 1e-2)


@sick(
    "rnn-prices-into-gates",
    [("SATURATION", "rnn")],
    stuck(0.6),
    allow=["VANISHING", "UNSTABLE", "BOTTLENECK", "DEAD"],
    widths=CELLS,
)
def prices_into_gates(sick: bool, width: int) -> Setup:
    """Share prices of some thousands go straight into an LSTM: every gate is at its end; standardise them."""
    inner = series(12, 32)
    rnn = nn.LSTM(4, width, batch_first=True)
    with torch.no_grad():
        rnn.bias_ih_l0[width : 2 * width] += 1.5

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = inner(g)
        return 4000 + 300 * x if sick else x, y

    return setup(_Reader(rnn), sample, F.cross_entropy, 1e-2)


# --------------------------------------------------------------------------------------- BOTTLENECK


@sick(
    "rnn-summary-of-one-number",
    [("BOTTLENECK", "summary")],
    stuck(0.8, steps=250),
    steps=250,
    falls_to=0.6,
    allow=["VANISHING"],
    widths=CELLS,
)
def summary_of_one_number(sick: bool, width: int) -> Setup:
    """Everything the decoder is to repeat, four symbols out of six, goes through one number."""

    class Repeater(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            k = 1 if sick else 2 * width
            self.embed = nn.Embedding(6, width)
            self.read = nn.Linear(4 * width, 2 * width)
            self.summary = nn.Linear(2 * width, k)
            self.spread = nn.Linear(k, width)
            self.write = nn.GRU(width, width, batch_first=True)
            self.head = nn.Linear(width, 6)
            self.clock = nn.Embedding(4, width)

        def forward(self, tokens: Tensor) -> Tensor:
            h = F.gelu(self.read(self.embed(tokens).flatten(1)))
            state = self.spread(self.summary(h))
            ticks = self.clock.weight + state[:, None]
            return self.head(self.write(ticks)[0])

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, 6, 48, 4)
        return tokens, tokens

    return setup(Repeater(), sample, token_loss, 1e-2)


# ------------------------------------------------------------------------------------------ healthy


@healthy("rnn-ok-lstm-many-to-one", fades_in_time("rnn", 0.3, sound=3), widths=CELLS)
def ok_many_to_one(width: int) -> Setup:
    """The gradient of an LSTM's early steps is smaller than that of the late ones, and the task is
    learned."""
    rnn = nn.LSTM(4, width, batch_first=True)
    with torch.no_grad():
        rnn.bias_ih_l0[width : 2 * width] += 1.5
    return setup(_Reader(rnn), series(24, 32), F.cross_entropy, 1e-2)


@healthy("rnn-ok-both-directions", widths=CELLS)
def ok_both_directions(width: int) -> Setup:
    """At the last step the backward direction has read one step only, so its recurrent weights get
    nothing."""
    return setup(
        _Reader(nn.LSTM(4, width, batch_first=True, bidirectional=True)),
        series(12, 32),
        F.cross_entropy,
        1e-2,
    )


@healthy("rnn-ok-state-carried-over", widths=CELLS)
def ok_state_carried_over(width: int) -> Setup:
    """Truncated backpropagation: the state goes from batch to batch, detached, and is kept on the model."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, width)
            self.rnn, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, 16)
            self.state: Tensor | None = None

        def forward(self, tokens: Tensor) -> Tensor:
            h, state = self.rnn(self.embed(tokens), self.state)
            self.state = state.detach()
            return self.head(h)

    return setup(Stateful(), grammar(16, 12, 16), token_loss, 1e-2)


@healthy("rnn-ok-summed-over-sequence", widths=CELLS)
def ok_summed(width: int) -> Setup:
    """Two stacked GRUs label every step of a long sequence, the loss summed over steps and averaged over
    sequences: gradients of tens, which grow with the length only."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(4, width, 2, batch_first=True), nn.Linear(width, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 16, 48, 4)
        return x, (x[..., :1] + x[..., 1:2].roll(1, 1)) / 2

    return setup(Tagger(), sample, lambda y, t: (y - t).square().sum((1, 2)).mean(), 5e-3)
