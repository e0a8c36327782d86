"""Cases from public reports: recurrent, translating and captioning networks, language models."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import every, huge, no_gradient, not_finite, rises, silent, stuck, zero_at_first
from .data import choice, grammar, normal, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy, sick

W = 16
ONE = {"widths": (W,), "dtypes": (FLOAT32,)}


# ------------------------------------------------------------------------------------- recurrent


class _PeptideNet(nn.Module):
    """The retention time of a peptide from its letters; the head's first draw lies below zero."""

    def __init__(self, width: int, rectified: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.lstm = nn.LSTM(width, 2 * width, num_layers=2, batch_first=True)
        last = nn.Linear(2 * width, 1)
        nn.init.constant_(last.bias, -1 / math.sqrt(2 * width))
        self.head = nn.Sequential(last, nn.ReLU()) if rectified else nn.Sequential(last)

    def forward(self, letters: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(letters))[0][:, -1])


def digits(g: torch.Generator, number: int = 64) -> tuple[Tensor, Tensor]:
    """Return pictures of digits, of values from 0 to 1, and which they are."""
    pictures, kinds = _digits()
    rows = choice(g, len(kinds), number)
    return pictures[rows], kinds[rows]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    loaded = load_digits()
    return torch.tensor(loaded.images).float()[:, None] / 16, torch.tensor(loaded.target)


def _peptides(g: torch.Generator) -> tuple[Tensor, Tensor]:
    oily = uniform(seeded(61), 20)
    letters = choice(g, 20, 32, 12)
    return letters, oily[letters].mean(1, keepdim=True) + 0.2


@sick(
    "contact6b-peptides-rectified-output",
    [("DEAD", "head")],
    every(no_gradient("head", "lstm", "embed"), silent("head", 0.99)),
    source="https://github.com/ProteomicsML/ProteomicsML/pull/203",
    **ONE,
)
def peptides_rectified_output(sick: bool, width: int) -> Setup:
    """A recurrent regressor ends in a ReLU since its targets are positive: where the first draw of the last
    layer lies below zero, the prediction is zero for every peptide and nothing has a gradient. Repaired by
    leaving the ReLU out."""
    return setup(_PeptideNet(width, rectified=sick), _peptides, F.mse_loss)


class _Forecaster(nn.Module):
    """A forecast of the next values of a series, which each window is normalized for and undone after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, 4)
        for name, bias in self.lstm.named_parameters():
            if "bias_ih" in name:
                nn.init.zeros_(bias)
                nn.init.constant_(bias[2 * width : 4 * width], 3.0)

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = window.mean(1, keepdim=True), window.std(1, keepdim=True) + 1e-3
        state = self.lstm((window - mean) / scale)[0][:, -1]
        return self.head(state) * scale[..., 0] + mean[..., 0], scale[..., 0]


def _sales(g: torch.Generator) -> tuple[Tensor, Tensor]:
    t = torch.arange(28.0)
    level, phase = 50_000 * (1 + uniform(g, 32, 1)), 7 * uniform(g, 32, 1)
    series = level * (1 + 0.3 * torch.sin(2 * math.pi * (t + phase) / 7)) + 500 * normal(g, 32, 28)
    return series[:, :24, None], series[:, 24:]


def _large_values(ready: Setup) -> tuple[bool, str]:
    window = ready.make_batch()
    output = ready.model(window)[0]
    least = min(float(window.min()), float(output.detach().min()))
    return least > 1e4, f"values in and out are above {least:.3g}"


@healthy("contact6b-forecast-window-scaled", _large_values, **ONE)
def forecast_window_scaled(width: int) -> Setup:
    """Sales of tens of thousands go in and come out as they are, and the forget gates start nearly open: each
    window is scaled by its own mean and spread and the loss by the same spread, so all is of unit size."""
    return setup(
        _Forecaster(width),
        _sales,
        lambda output, target: (((output[0] - target) / output[1]) ** 2).mean(),
        1e-2,
    )


# ---------------------------------------------------------------------------------- transformers


class _Block(nn.Module):
    """A block of a transformer, normalized before or after its parts; its mask is True where none look."""

    def __init__(self, width: int, *, before: bool = True, heads: int = 4) -> None:
        super().__init__()
        self.before, self.heads = before, heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor, hidden: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(hidden, -math.inf)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, w))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        if self.before:
            x = x + self.attend(self.norm1(x), hidden)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attend(x, hidden))
        return self.norm2(x + self.mlp(x))


def _later(length: int) -> Tensor:
    return torch.ones(length, length).triu(1).bool()


class _TiedModel(nn.Module):
    """A language model that multiplies its embeddings by the root of the width and uses them as its head."""

    def __init__(self, width: int, std: float, words: int = 32) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.embed = nn.Embedding(words, width)
        nn.init.normal_(self.embed.weight, std=std)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        for block in self.blocks:
            x = block(x, _later(tokens.shape[1]))
        return self.head(x)


@sick(
    "contact6b-words-raw-embedding",
    [("EXPLODING", "*")],
    every(huge("embed", 10.0), stuck(8.0, steps=60)),
    allow=("SATURATION", "UNSTABLE"),
    source="https://github.com/syncdoth/RetNet/issues/31",
    steps=150,
    **ONE,
)
def words_raw_embedding(sick: bool, width: int) -> Setup:
    """The embeddings keep their default draw of unit size and are the head's weights too: the untrained
    model's logits are in the hundreds, its loss is many times that of guessing, and so are its gradients.
    Repaired by an initialization of the embeddings that is fit for the width."""
    width *= 4
    return setup(_TiedModel(width, std=1.0 if sick else 1 / width), grammar(words=32), token_loss, 1e-3)


class _PaddedDecoder(nn.Module):
    """Predicts each next token of sentences that end in padding."""

    def __init__(self, width: int, rows: bool, words: int = 16) -> None:
        super().__init__()
        self.rows = rows
        self.embed = nn.Embedding(words + 1, 2 * width, padding_idx=words)
        self.place = nn.Parameter(0.1 * torch.randn(12, 2 * width))
        self.blocks = nn.ModuleList(_Block(2 * width) for _ in range(2))
        self.head = nn.Linear(2 * width, words)
        self.pad = words

    def forward(self, tokens: Tensor) -> Tensor:
        padded = tokens == self.pad
        padded = padded[:, None, :, None] if self.rows else padded[:, None, None, :]
        hidden = padded | _later(tokens.shape[1])
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x, hidden)
        return self.head(x)


def _sentences(g: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens, target = grammar()(g)
    tokens, target = tokens.clone(), target.clone()
    padded = torch.arange(12) >= 6 + choice(g, 7, len(tokens), 1)
    tokens[padded], target[padded] = 16, -100
    return tokens, target


@sick(
    "contact6b-decoder-pad-rows",
    [("NUMERICAL", "blocks")],
    not_finite(),
    source="https://github.com/hyunwoongko/transformer/pull/40",
    **ONE,
)
def decoder_pad_rows(sick: bool, width: int) -> Setup:
    """The padding mask of a decoder has its new axis in the wrong place: it masks whole rows of the attention
    instead of columns, and with minus infinity as its value the rows of padding are NaN after the softmax.
    Repaired by masking the keys."""
    return setup(_PaddedDecoder(width, rows=sick), _sentences, token_loss)


class _Warm(torch.optim.Adam):
    """Adam whose rate rises over the first steps and then falls as an inverse root."""

    def __init__(self, parameters: Any, lr: float, warmup: int) -> None:
        super().__init__(parameters, lr=lr, betas=(0.9, 0.98))
        self.peak, self.warmup, self.number = lr, warmup, 0

    def step(self, closure: Any = None) -> Any:
        self.number += 1
        for group in self.param_groups:
            group["lr"] = self.peak * min(self.number / self.warmup, (self.warmup / self.number) ** 0.5)
        return super().step(closure)


class _PostNorm(nn.Module):
    def __init__(self, width: int, words: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Parameter(0.1 * torch.randn(12, width))
        self.blocks = nn.ModuleList(_Block(width, before=False) for _ in range(6))
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x, _later(tokens.shape[1]))
        return self.head(x)


@sick(
    "contact6b-translator-no-warmup",
    [("UNSTABLE", "*")],
    every(rises(1.2), stuck(2.5, steps=200)),
    allow=("VANISHING", "EXPLODING", "BOTTLENECK"),
    source="https://github.com/facebookresearch/fairseq/issues/1239",
    steps=200,
    **ONE,
)
def translator_no_warmup(sick: bool, width: int) -> Setup:
    """A transformer normalized after its parts is trained at its full rate from the first step on: the first
    updates throw it where it only tells how frequent the words are, and there it stays. Repaired by a rate
    that rises over the first steps."""

    def optimizer(parameters: Any) -> Optimizer:
        return torch.optim.Adam(parameters, 0.1, (0.9, 0.98)) if sick else _Warm(parameters, 0.1, 1000)

    return setup(_PostNorm(2 * width), grammar(), token_loss, optimizer)


# -------------------------------------------------------------------------------------- captions


class _Captioner(nn.Module):
    """Tells a digit in words: a decoder is given the features of the picture that a hook has kept."""

    def __init__(self, width: int, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4, 2),
        )
        self.embed, self.seen = nn.Embedding(8, 2 * width), nn.Linear(4, 2 * width)
        self.cross = nn.MultiheadAttention(2 * width, 2, batch_first=True)
        self.gru = nn.GRU(4 * width, 2 * width, batch_first=True)
        self.head = nn.Linear(2 * width, 8)
        self.encoder.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.kept = output.detach().clone() if self.detached else output.clone()

    def forward(self, picture: Tensor, tokens: Tensor) -> Tensor:
        self.encoder(picture)
        seen = self.seen(self.kept.flatten(2).transpose(1, 2))
        x = self.embed(tokens)
        x = torch.cat([x, self.cross(x, seen, seen, need_weights=False)[0]], -1)
        return self.head(self.gru(x)[0])


def _captions(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    picture, kind = digits(g)
    caption = (choice(seeded(62), 7, 10, 4) + 1)[kind]
    return (picture, torch.cat([torch.zeros(len(kind), 1).long(), caption[:, :-1]], 1)), caption


@sick(
    "contact6b-captions-detached-features",
    [("DEAD", "encoder")],
    no_gradient("encoder"),
    source="https://github.com/lucidrains/CoCa-pytorch/issues/6",
    **ONE,
)
def captions_detached_features(sick: bool, width: int) -> Setup:
    """The features that the captions are to be told from are kept by a hook that detaches them, so that no
    gradient reaches the picture's encoder. Repaired by a copy that stays in the graph."""
    return setup(_Captioner(width, detached=sick), _captions, token_loss, 1e-2)


# ------------------------------------------------------------------------------------- fine-tuning


class _Adapted(nn.Module):
    """A frozen layer with an update of low rank whose second part starts at zero."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.up(self.down(x))


class _Tagger(nn.Module):
    """Tags sentences: everything but the low-rank updates, a small head and two new words is frozen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 2 * width).requires_grad_(False)
        self.mix, self.mlp = _Adapted(4 * width, 4 * width), _Adapted(4 * width, 2 * width)
        self.norm = nn.LayerNorm(2 * width).requires_grad_(False)
        self.head = nn.Linear(2 * width, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = torch.cat([x, x.roll(1, 1)], -1)
        return self.head(self.norm(self.mlp(F.gelu(self.mix(x)))))


@healthy(
    "contact6b-tagger-low-rank", every(zero_at_first("mix.down", "mlp.down"), no_gradient("embed")), **ONE
)
def tagger_low_rank(width: int) -> Setup:
    """Nearly everything is frozen, and the first part of each low-rank update has no gradient in the first
    step since the second one is zero: both do from the second step on, and it learns."""
    return setup(_Tagger(width), grammar(), token_loss, 1e-2)
