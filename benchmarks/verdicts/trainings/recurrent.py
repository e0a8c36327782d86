"""Trainings of recurrent nets: classes, tags, letters, forecasts and what was said a while ago."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .data import (
    accuracy,
    choice,
    explained,
    mean_loss,
    normal,
    passages,
    pictures,
    rows,
    seeded,
    text,
    token_loss,
    training,
    uniform,
)
from .registry import Training, healthy


class Last(nn.Module):
    """A recurrent net whose last output is read by a linear head."""

    def __init__(self, body: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.hidden_size * (2 if body.bidirectional else 1), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output of sequences (batch, time, features)."""
        return self.head(self.body(x)[0][:, -1])


class Every(Last):
    """A recurrent net all of whose outputs are read."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's output at every step."""
        return self.head(self.body(x)[0])


@healthy("rnn-digits-by-rows-gru", 400, at_least=0.93)
def digits_gru() -> Training:
    """A GRU that reads a digit row by row."""
    x, y, xt, yt = pictures()
    model = Last(nn.GRU(8, 48, batch_first=True), 10)
    return training(model, rows(x[:, 0], y), F.cross_entropy, 5e-3, accuracy(xt[:, 0], yt))


class Letters(nn.Module):
    """Letters, embedded, read by a recurrent net, and the next one told."""

    def __init__(self, letters: int, body: nn.RNNBase) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(letters, body.input_size), body
        self.head = nn.Linear(body.hidden_size, letters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, time, letters)."""
        return self.head(self.body(self.embed(tokens))[0])


@healthy("rnn-letters-lstm", 300, at_most=2.3)
def letters_lstm() -> Training:
    """An LSTM that writes Python's help, letter by letter, gradients clipped."""
    model = Letters(text()[1], nn.LSTM(24, 96, batch_first=True))
    sample = passages(32, 16)
    return training(model, sample, token_loss, 5e-3, mean_loss(sample, token_loss), clip=1.0)


@healthy("rnn-letters-two-layer-gru-momentum", 350, at_most=2.6)
def letters_gru() -> Training:
    """Two layers of GRU with dropout between, by momentum with clipped gradients."""
    model = Letters(text()[1], nn.GRU(24, 64, 2, batch_first=True, dropout=0.1))
    sample = passages(24, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return training(model, sample, token_loss, optimizer, mean_loss(sample, token_loss), clip=0.5)


@healthy("rnn-wave-forecast-tanh", 400, at_least=0.8)
def forecast() -> Training:
    """A plain tanh net that forecasts a noisy wave."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        pitch, start = 0.3 + 0.3 * uniform(g, 16, 1), 6.3 * uniform(g, 16, 1)
        wave = torch.sin(pitch * torch.arange(25.0) + start) + 0.05 * normal(g, 16, 25)
        return wave[:, :-1, None], wave[:, 1:, None]

    model = Every(nn.RNN(1, 32, batch_first=True), 1)
    return training(model, sample, F.mse_loss, 3e-3, explained(*sample(seeded(98))), clip=1.0)


@healthy("rnn-identity-relu-sums", 900, at_least=0.8, source="https://arxiv.org/abs/1504.00941")
def identity() -> Training:
    """A rectified net that starts as the identity sums up the marked numbers of a sequence."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        value, marked = uniform(g, 32, 20), (uniform(g, 32, 20) < 0.2).float()
        return torch.stack([value, marked], -1), (value * marked).sum(1, keepdim=True)

    body = nn.RNN(2, 48, nonlinearity="relu", batch_first=True)
    for name, parameter in body.named_parameters():
        if name == "weight_hh_l0":
            nn.init.eye_(parameter)
        else:
            nn.init.normal_(parameter, std=0.05 if name == "weight_ih_l0" else 0.0)
    model = Last(body, 1)
    return training(model, sample, F.mse_loss, 2e-3, explained(*sample(seeded(98))), clip=1.0)


@healthy("rnn-tags-bidirectional-lstm", 350, at_least=0.9)
def tags() -> Training:
    """Each word's tag hangs on its neighbours on both sides."""
    words = 20
    kind = choice(seeded(31), 2, words)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, words, 16, 14)
        left, right = kind[tokens.roll(1, 1)], kind[tokens.roll(-1, 1)]
        left[:, 0], right[:, -1] = 0, 0
        return tokens, left + 2 * right

    class_of = nn.Sequential(
        nn.Embedding(words, 16), Every(nn.LSTM(16, 24, batch_first=True, bidirectional=True), 4)
    )
    return training(class_of, sample, token_loss, 5e-3, accuracy(*sample(seeded(98))))


class Translator(nn.Module):
    """An encoder, and a decoder that looks at all that was encoded."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words + 1, size)
        self.encoder, self.decoder = nn.GRU(size, size, batch_first=True), nn.GRUCell(2 * size, size)
        self.query, self.head = nn.Linear(size, size), nn.Linear(2 * size, words)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        """Return logits for each word, given the words before."""
        memory, state = self.encoder(self.embed(source))
        state, said = state[0], []
        for t in range(given.shape[1]):
            weight = torch.einsum("btd,bd->bt", memory, self.query(state)) / math.sqrt(state.shape[1])
            seen = torch.einsum("bt,btd->bd", weight.softmax(1), memory)
            state = self.decoder(torch.cat([self.embed(given[:, t]), seen], 1), state)
            said.append(self.head(torch.cat([state, seen], 1)))
        return torch.stack(said, 1)


@healthy("rnn-reverse-with-attention", 700, at_least=0.9)
def reverse() -> Training:
    """Say a sequence backwards, by additive-free attention over what was read."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = choice(g, 10, 32, 8)
        target = source.flip(1)
        start = torch.full((32, 1), 10)
        return (source, torch.cat([start, target[:, :-1]], 1)), target

    model = Translator(10, 32)
    return training(model, sample, token_loss, 5e-3, accuracy(*sample(seeded(98))), clip=1.0)


class Diagonal(nn.Module):
    """A linear recurrence with one decay for each unit, gated, as state space models have it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.enter, self.leave = (
            nn.LayerNorm(size),
            nn.Linear(size, 2 * size),
            nn.Linear(size, size),
        )
        self.decay = nn.Parameter(torch.linspace(-1.0, 4.0, size))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape (batch, time, features)."""
        value, gate = self.enter(self.norm(x)).chunk(2, -1)
        keep = self.decay.sigmoid()
        state, states = torch.zeros_like(value[:, 0]), []
        for t in range(x.shape[1]):
            state = keep * state + (1 - keep) * value[:, t]
            states.append(state)
        return x + self.leave(torch.stack(states, 1) * F.silu(gate))


@healthy("rnn-letters-state-space", 300, at_most=2.5)
def state_space() -> Training:
    """Two layers of a gated linear recurrence on letters, with AdamW."""
    letters = text()[1]
    model = nn.Sequential(
        nn.Embedding(letters, 48), Diagonal(48), Diagonal(48), nn.LayerNorm(48), nn.Linear(48, letters)
    )
    sample = passages(24, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    return training(model, sample, token_loss, optimizer, mean_loss(sample, token_loss), clip=1.0)


@healthy("rnn-spelling-ctc", 500, at_most=0.6)
def spelling() -> Training:
    """Letters drawn out over uneven times, told without their places by the CTC loss."""
    shapes = normal(seeded(32), 6, 8)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        target = 1 + choice(g, 5, 16, 4)
        lengths = 2 + choice(g, 2, 16, 4)
        x = torch.zeros(16, 20, 8)
        for b in range(16):
            at = 0
            for letter, length in zip(target[b].tolist(), lengths[b].tolist(), strict=True):
                x[b, at : at + length] = shapes[letter]
                at += length + 1
        return x + 0.3 * normal(g, 16, 20, 8), target

    def loss(output: Tensor, target: Tensor) -> Tensor:
        times, letters = torch.full((16,), 20), torch.full((16,), 4)
        return F.ctc_loss(output.log_softmax(-1).transpose(0, 1), target, times, letters)

    model = Every(nn.GRU(8, 32, batch_first=True, bidirectional=True), 6)
    return training(model, sample, loss, 5e-3, mean_loss(sample, loss), clip=5.0)


class Sentiment(nn.Module):
    """Packed sequences of their own lengths, read by an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(30, 12),
            nn.LSTM(12, 24, batch_first=True),
            nn.Linear(24, 2),
        )

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return logits."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.body(packed)[1][0][-1])


@healthy("rnn-packed-sequences", 400, at_least=0.9)
def packed() -> Training:
    """Sentences of different lengths, packed: do good words outnumber bad ones?"""
    worth = normal(seeded(33), 30).sign()

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        tokens, lengths = choice(g, 30, 32, 15), 5 + 2 * choice(g, 6, 32)
        present = torch.arange(15) < lengths[:, None]
        return (tokens, lengths), ((worth[tokens] * present).sum(1) > 0).long()

    return training(Sentiment(), sample, F.cross_entropy, 5e-3, accuracy(*sample(seeded(98))))
