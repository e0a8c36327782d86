"""First contact, round 2a, part 1: cases from public reports on translation, text, distillation, precision.

Every sick case re-creates, in a small model, the structure and the mechanism of the report that it names; the
repair is the one of its thread, or what its field settled on. They were written without seeing any verdict.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from .claims import alike, every, fades_in_time, fading, flat, no_gradient, not_finite
from .data import choice, clusters, frozen, normal, seeded, setup, textures, token_loss, trained
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------------------------- translation


def _translation(words: int, length: int, number: int = 16):
    """Sentences to be rendered word by word in another vocabulary, in the opposite order.

    The inputs are (source, decoder's input), the target the sentence; word 0 starts a sentence.
    """
    lexicon = 1 + torch.randperm(words - 1, generator=seeded(31))

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        source = 1 + choice(g, words - 1, number, length)
        target = lexicon[source - 1].flip(1)
        return (source, F.pad(target[:, :-1], (1, 0))), target

    return sample


class _DotAttention(nn.Module):
    """Attention of a decoder's state over the encoder's; returns (weights, context)."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.bmm(memory, state[:, :, None]).squeeze(2) * self.scale
        weights = F.softmax(scores, dim=1)
        return weights, torch.bmm(weights[:, None], memory).squeeze(1)


class _Translator(nn.Module):
    """An LSTM that reads, and an LSTM cell that writes with attention to what was read."""

    def __init__(self, words: int, width: int, scale: float):
        super().__init__()
        self.embed_source, self.embed_target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.encoder = nn.LSTM(width, width, batch_first=True)
        self.memory_norm, self.state_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cell = nn.LSTMCell(2 * width, width)
        self.attention = _DotAttention(scale)
        self.out = nn.Linear(2 * width, words)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(self.embed_source(source))
        memory, h, c = self.memory_norm(memory), h[0], c[0]
        context = memory.new_zeros(h.shape)
        logits = []
        for word in self.embed_target(given).unbind(1):
            h, c = self.cell(torch.cat([word, context], 1), (h, c))
            _, context = self.attention(self.state_norm(h), memory)
            logits.append(self.out(torch.cat([h, context], 1)))
        return torch.stack(logits, 1)


@sick(
    "contact2a-mt-unscaled_dot_attention",
    [("SATURATION", "attention")],
    flat("attention", "softmax", 0.4),
    allow=("VANISHING", "DEAD", "BOTTLENECK", "UNSTABLE"),
    source="https://reddit.gpgaming.de/r/learnmachinelearning/comments/1qukt1i/"
    "my_attention_mechanism_collapsed_and_this_is_what",
    steps=200,
    widths=(128,),
    dtypes=(FLOAT32,),
)
def unscaled_dot_attention(sick: bool, width: int) -> Setup:
    """LSTM translation with dot-product attention whose scores spread as the root of the width: the softmax
    is at its flat ends, on one or two words. Repaired by dividing the scores by the root of the width."""
    model = _Translator(20, width, 1.0 if sick else 1 / math.sqrt(width))
    return setup(model, _translation(20, 8), token_loss, 3e-3)


class _Sampled(nn.Module):
    """A GRU translator that is fed, half of the time, with its own last word."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.energy = nn.Linear(width, 1, bias=False)
        self.cell = nn.GRUCell(2 * width, width)
        self.out = nn.Linear(2 * width, words)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        memory, h = self.encoder(self.embed(source))
        keys, h, own, logits = self.key(memory), h[0], given[:, 0], []
        for t in range(given.shape[1]):
            word = given[:, t] if t == 0 or torch.rand(()) < 0.5 else own
            energy = self.energy(torch.tanh(keys + self.query(h)[:, None]))
            context = (F.softmax(energy, 1) * memory).sum(1)
            h = self.cell(torch.cat([self.embed(word), context], 1), h)
            logits.append(self.out(torch.cat([h, context], 1)))
            own = logits[-1].argmax(1)
        return torch.stack(logits, 1)


@healthy("contact2a-mt-scheduled_sampling", steps=150, widths=(48,), dtypes=(FLOAT32,))
def scheduled_sampling(width: int) -> Setup:
    """Additive attention in a loop over GRU cells, fed back with the most likely word: no gradient passes the
    choice of the word, which is as it is meant to be, since every step has a loss and a state of its own."""
    return setup(_Sampled(14, width), _translation(14, 6), token_loss, 5e-3)


# -------------------------------------------------------------------------------------------- text


class _Block(nn.Module):
    """Self-attention and a feed-forward part, each with its norm ahead."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _CheckpointedClassifier(nn.Module):
    """Frozen embeddings, blocks that are computed again in the backward pass, and a new head."""

    def __init__(self, words: int, width: int, kinds: int, *, input_requires_grad: bool):
        super().__init__()
        self.tokens = nn.Embedding(words, width).requires_grad_(False)
        self.places = nn.Parameter(0.1 * torch.randn(16, width), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, kinds)
        self.input_requires_grad = input_requires_grad

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.tokens(tokens) + self.places[: tokens.shape[1]]
        if self.input_requires_grad:
            hidden.requires_grad_(True)
        for block in self.blocks:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
                hidden = checkpoint(block, hidden, use_reentrant=True)
        return {"logits": self.head(self.norm(hidden.mean(1)))}


def _pairs(words: int, kinds: int = 4, length: int = 10, number: int = 24):
    """Sentences whose class is told by the order of two marked words."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        tokens = kinds + 1 + choice(g, words - kinds - 1, number, length)
        rows = torch.arange(number)
        tokens[rows, choice(g, length // 2, number)] = 1 + kind
        tokens[rows, length // 2 + choice(g, length // 2, number)] = 1 + (kind + 1) % kinds
        return tokens, kind

    return sample


@sick(
    "contact2a-text-reentrant_checkpoint",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://github.com/huggingface/trl/issues/2671",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def reentrant_checkpoint(sick: bool, width: int) -> Setup:
    """A text classifier is fine-tuned with its embeddings frozen and reentrant checkpoints round its blocks:
    their input requires no gradient, so nothing in them gets any and only the head learns. Repaired by making
    the embeddings' output require one."""
    model = _CheckpointedClassifier(24, width, 4, input_requires_grad=not sick)
    return setup(model, _pairs(24), lambda out, kind: F.cross_entropy(out["logits"], kind))


class _NewsRNN(nn.Module):
    """A plain recurrent network over padded sentences, and a linear layer on a state of it."""

    def __init__(self, words: int, width: int, kinds: int, *, last_word: bool):
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.rnn = nn.RNN(width, width, batch_first=True)
        self.fc = nn.Linear(width, kinds)
        self.last_word = last_word

    def forward(self, tokens: Tensor) -> Tensor:
        states, last = self.rnn(self.embedding(tokens))
        if not self.last_word:
            return self.fc(last.squeeze(0))
        end = (tokens > 0).sum(1) - 1
        return self.fc(states[torch.arange(len(tokens)), end])


def _padded(words: int, kinds: int, padded: int, number: int = 32):
    """Sentences of 4 to 7 words, half of which tell the class, padded with zeros to one length."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        topic = 1 + kind[:, None] + kinds * choice(g, 3, number, padded)
        other = 1 + 3 * kinds + choice(g, words - 1 - 3 * kinds, number, padded)
        tokens = torch.where(torch.rand(number, padded, generator=g) < 0.5, topic, other)
        tokens[:, 0] = topic[:, 0]
        length = 4 + choice(g, 4, number, 1)
        return torch.where(torch.arange(padded) < length, tokens, 0), kind

    return sample


@sick(
    "contact2a-text-state_after_padding",
    [("VANISHING", "*")],
    fades_in_time("rnn", 1e-4, sound=7),
    allow=("BOTTLENECK", "DEAD"),
    source="https://whosebug.com/question/6549442/"
    "What-it-means-when-your-model-can-t-overfit-a-small-batch-of-data",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def state_after_padding(sick: bool, width: int) -> Setup:
    """A plain RNN classifies news by its state after dozens of padding words, through which the gradient
    fades before it meets a real one. Repaired by the state after the last real word."""
    return setup(_NewsRNN(40, width, 4, last_word=not sick), _padded(40, 4, 60), F.cross_entropy)


# --------------------------------------------------------------------------------------- precision


class _HalfDenoiser(nn.Module):
    """A denoiser conditioned on a text's embedding and a time, with all weights in half precision."""

    def __init__(self, size: int, text: int, width: int):
        super().__init__()
        self.read = nn.Linear(size, width)
        self.time, self.text = nn.Linear(1, width), nn.Linear(text, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.write = nn.Linear(width, size)
        self.half()

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.read(noisy.half()) + self.time(time.half()) + self.text(text.half())
        for layer in self.body:
            x = x + layer(F.silu(x))
        return self.write(F.silu(x)).float()


def _noised(size: int, text: int, number: int = 32):
    """Points that a text's embedding tells, with noise of a size that the time tells; target: the noise."""
    mix = normal(seeded(33), text, size) / math.sqrt(text)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        prompt, noise = normal(g, number, text), normal(g, number, size)
        time = torch.rand(number, 1, generator=g)
        noisy = (1 - time).sqrt() * (prompt @ mix) + time.sqrt() * noise
        return (noisy, time, prompt), noise

    return sample


@sick(
    "contact2a-amp-adam_eps_in_half",
    [("NUMERICAL", "*")],
    not_finite(6),
    allow=("UNSTABLE", "EXPLODING", "DEAD"),
    source="https://github.com/afiaka87/glide-finetune/issues/5",
    widths=(48,),
    dtypes=(FLOAT32,),
)
def adam_eps_in_half(sick: bool, width: int) -> Setup:
    """A text-conditioned denoiser with half-precision weights under Adam: squared gradients and the 1e-8 that
    guards their root both round to zero, so the first step divides by zero. Repaired by a guard of 1e-4."""
    eps = 1e-8 if sick else 1e-4
    model = _HalfDenoiser(12, 6, width)
    return setup(model, _noised(12, 6), F.mse_loss, lambda p: torch.optim.Adam(p, lr=1e-3, eps=eps))


# ------------------------------------------------------------------------------------ distillation


class _Neck(nn.Module):
    """Convolutions and the map of features that they end in."""

    def __init__(self, width: int, depth: int, stride: int):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride, 1)]
        for _ in range(depth):
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _FeatureDistiller(nn.Module):
    """Pools the maps of a student and of a frozen teacher and brings them to one space."""

    def __init__(self, width: int, *, maps_normalised: bool):
        super().__init__()
        self.student = _Neck(width, 1, 2)
        self.teacher = frozen(_Neck(2 * width, 3, 1)).eval()
        self.embed = nn.Linear(width, 2 * width)
        self.bn_s = nn.BatchNorm1d(2 * width, eps=1e-4, affine=False)
        self.bn_t = nn.BatchNorm1d(2 * width, eps=1e-4, affine=False)
        self.maps_normalised = maps_normalised

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pred = self.student(x)
        with torch.no_grad():
            target = self.teacher(x)
        if self.maps_normalised:
            mean, std = pred.mean((2, 3), keepdim=True), pred.std((2, 3), keepdim=True)
            pred = (pred - mean) / (std + 1e-6)
        z_s, z_t = pred.mean(-1).mean(-1), target.mean(-1).mean(-1)
        return self.bn_s(self.embed(z_s)), self.bn_t(z_t)


def _log_quartic(out: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    z_s, z_t = out
    return torch.log((z_s - z_t).abs().pow(4).sum(1).mean())


@sick(
    "contact2a-kd-pooled_normalised_map",
    [("BOTTLENECK", "*")],
    every(alike("embed", 1e-4), fading("student", "embed", 1e-3)),
    allow=("VANISHING", "DEAD", "UNSTABLE", "EXPLODING"),
    source="https://github.com/roymiles/Simple-Recipe-Distillation/issues/2",
    widths=(16,),
    dtypes=(FLOAT32,),
)
def pooled_normalised_map(sick: bool, width: int) -> Setup:
    """Feature distillation normalises the student's map over its pixels and then takes the mean over them,
    which is zero for every picture: nothing is left to match. Repaired by pooling the map as it is."""
    model = _FeatureDistiller(width, maps_normalised=sick)
    return setup(model, textures(kinds=6, number=24), _log_quartic)


class _Distilled(nn.Module):
    """A small student beside a trained, frozen teacher, in one module."""

    def __init__(self, size: int, width: int, kinds: int):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(size, 2 * width), nn.ReLU(), nn.Linear(2 * width, kinds))
        self.student = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, kinds))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            soft = F.softmax(self.teacher(x) / 4, 1)
        return {"logits": self.student(x), "soft": soft}


def _soft_and_hard(out: dict[str, Tensor], kind: Tensor) -> Tensor:
    soft = F.kl_div(F.log_softmax(out["logits"] / 4, 1), out["soft"], reduction="batchmean")
    return 16 * 0.7 * soft + 0.3 * F.cross_entropy(out["logits"], kind)


@healthy("contact2a-kd-frozen_teacher", no_gradient("teacher"), widths=(32,), dtypes=(FLOAT32,))
def frozen_teacher(width: int) -> Setup:
    """Distillation at temperature 4 from a frozen teacher in the same module: half of the weights get no
    gradient, and the soft part's is a sixteenth before it is scaled, as is meant."""
    model, task = _Distilled(16, width, 5), clusters(16, 5, 32, 1.0)
    trained(setup(model.teacher, task, F.cross_entropy, 1e-2), 60)
    frozen(model.teacher)
    return setup(model, task, _soft_and_hard)
