"""Language models and their fine-tuning, as reported by strangers: adapters, rates, labels."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, every, flat, no_gradient, rises, training, under, weak
from .data import Sample, adam, grammar, normal, seeded, setup, stack, token_loss, trained, two_sides
from .registry import FLOAT32, Setup, sick

WORDS = 16


def still(prefix: str, share: float, *, steps: int = 12) -> Claim:
    """More than a share of the weights under a prefix that are pulled by a gradient have not moved at all."""

    def claim(ready: Setup) -> tuple[bool, str]:
        parameters = {n: p for n, p in ready.model.named_parameters() if under(n, prefix) and p.requires_grad}
        before = {n: p.detach().clone() for n, p in parameters.items()}
        pulled = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in parameters.items()}
        for step in training(ready, steps):
            for name, pull in pulled.items():
                grad = step.grads[name]
                if grad is not None:
                    pull |= grad != 0
        stays = sum(int((pull & (parameters[n] == before[n])).sum()) for n, pull in pulled.items())
        seen = stays / max(sum(int(pull.sum()) for pull in pulled.values()), 1)
        return seen > share, f"{seen:.0%} of the pulled weights of {prefix} never move in {steps} steps"

    return claim


class Attention(nn.Module):
    """Causal attention with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.o(scores.masked_fill(later, -math.inf).softmax(-1) @ self.v(x))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = stack(up=nn.Linear(width, 2 * width), act=nn.GELU(), down=nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """A language model of two blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def pretrained(width: int) -> Language:
    """Return a language model that knows the grammar."""
    model = Language(width)
    trained(setup(model, grammar(WORDS), token_loss, 3e-3), 60)
    return model


def dialect(changed: int = WORDS) -> Sample:
    """Return the grammar with other names for some of its words: what a model is fine-tuned to."""
    plain, names = grammar(WORDS), torch.arange(WORDS)
    names[:changed] = torch.randperm(changed, generator=seeded(31))

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, following = plain(g)
        return names[tokens], names[following]

    return sample


class Lora(nn.Module):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, base: nn.Linear, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.b(self.a(x))


def adapted(model: Language, rank: int = 8) -> Language:
    """Freeze a model and give adapters to its queries, values and mlps."""
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.q = Lora(block.attention.q, rank)
        block.attention.v = Lora(block.attention.v, rank)
        block.mlp.up, block.mlp.down = Lora(block.mlp.up, rank), Lora(block.mlp.down, rank)
    return model


@sick(
    "contact15a-lora-zeros",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://github.com/Lightning-AI/litgpt/issues/1229",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_zeros(sick: bool, width: int) -> Setup:
    """Both factors of every adapter are left at zero, since the routine that draws A never ran: each one's
    gradient is a multiple of the other. Drawing A at random, with only B at zero, repairs it."""
    model = adapted(pretrained(width))
    if sick:
        for module in model.modules():
            if isinstance(module, Lora):
                nn.init.zeros_(module.a.weight)
    return setup(model, dialect(), token_loss, 1e-2)


@sick(
    "contact15a-lora-rate",
    [("UNSTABLE", "*")],
    rises(1.5),
    allow=("EXPLODING", "SATURATION", "NUMERICAL"),
    source="https://github.com/tloen/alpaca-lora/issues/391",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_rate(sick: bool, width: int) -> Setup:
    """Adapters of a high rank and scale are trained at a rate a hundred times too high, and the pretrained
    model breaks within some fifteen steps. The usual rate repairs it."""
    return setup(adapted(pretrained(width), rank=width), dialect(6), token_loss, 0.3 if sick else 3e-3)


class Diagnosis(nn.Module):
    """Three sigmoid layers with adapters: how likely a student is to answer right."""

    def __init__(self, width: int, clipped: bool) -> None:
        super().__init__()
        sizes = (width, 8 * width, 4 * width, 1)
        for name, size, out in zip(("first", "second", "third"), sizes, sizes[1:], strict=False):
            full = nn.Linear(size, out)
            nn.init.xavier_normal_(full.weight, gain=2.0 if name == "second" else 1.0)
            if clipped:
                full.weight.data.abs_()
            setattr(self, name, stack(full=Lora(full.requires_grad_(False), 4, 1.0), act=nn.Sigmoid()))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


@sick(
    "contact15a-lora-sigmoids",
    [("SATURATION", "second")],
    every(flat("second.act", "sigmoid", 0.9), weak("first", "third", 1e-3)),
    allow=("VANISHING", "DEAD", "UNSTABLE"),
    source="https://github.com/microsoft/LoRA/issues/167",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_sigmoids(sick: bool, width: int) -> Setup:
    """The frozen weights of three sigmoid layers have been clipped to be positive: sums over hundreds of
    positive activations lie far out, and only the last adapter gets a gradient. Signed weights repair it."""
    return setup(Diagnosis(width, sick), two_sides(width), F.binary_cross_entropy, 2e-3)


@sick(
    "contact15a-lm-bfloat",
    [("NUMERICAL", "*")],
    still("*", 0.5),
    allow=("UNSTABLE", "DEAD"),
    source="https://github.com/meta-pytorch/torchtune/issues/2254",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def lm_bfloat(sick: bool, width: int) -> Setup:
    """All weights are held in bfloat16 while a fine-tuning at a small rate adds less to most of them than
    half a unit in their last place, so that they stay where they are. Weights in float32 repair it."""
    model = pretrained(width)
    if sick:
        model.bfloat16()
    return setup(model, dialect(), lambda output, target: token_loss(output.float(), target), adam(1e-4))


def answers(kept: int) -> Sample:
    """Prompts of 12 tokens, whose loss is masked, and answers of 12, cut off behind `kept` tokens."""
    plain = grammar(WORDS, 24)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, following = plain(g)
        following = following.clone()
        following[:, :12] = -100
        return tokens[:, :kept], following[:, :kept]

    return sample


def answer_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy over the tokens that count."""
    total = F.cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=-100, reduction="sum")
    return total / (target != -100).sum().clamp(min=1)


@sick(
    "contact15a-lm-truncated",
    [("DEAD", "*")],
    no_gradient("*"),
    source="https://github.com/huggingface/trl/pull/6025",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lm_truncated(sick: bool, width: int) -> Setup:
    """Sequences are cut to a length that the prompts alone fill, so that every label left is masked: loss
    and gradients are exactly zero, in silence. A length that keeps the answers repairs it."""
    return setup(Language(width), answers(12 if sick else 24), answer_loss, 3e-3)


class Encoder(nn.Module):
    """A deep encoder of sound, and a decoder that adds what it says to a template."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        layers = []
        for number in range(14):
            size = 8 if number == 0 else width
            norm = nn.LayerNorm(width) if normed else nn.Identity()
            layers.append(stack(full=nn.Linear(size, width), norm=norm, act=nn.LeakyReLU(0.2)))
        self.encoder = nn.ModuleList(layers)
        self.decoder = stack(mix=nn.Linear(width + 8, width), act=nn.LeakyReLU(0.2), out=nn.Linear(width, 8))

    def forward(self, sound: Tensor, template: Tensor) -> Tensor:
        x = sound
        for layer in self.encoder:
            x = layer(x)
        return template + self.decoder(torch.cat((x, template), -1))


def faces() -> Sample:
    """Return frames of sound with the template of a face, and the face that speaks them."""
    mix = normal(seeded(32), 8, 8) / math.sqrt(8)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        sound, template = normal(g, 16, 12, 8), normal(g, 16, 1, 8).expand(16, 12, 8)
        return (sound, template), template + torch.tanh(sound @ mix)

    return sample


@sick(
    "contact15a-series-encoder",
    [("VANISHING", "encoder")],
    weak("encoder.0", "decoder", 1e-3),
    allow=("BOTTLENECK",),
    source="https://github.com/facebookresearch/meshtalk/issues/35",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def series_encoder(sick: bool, width: int) -> Setup:
    """A deep encoder without any normalization at its default weights: signal and gradient shrink layer by
    layer to nearly nothing, and the face is the template. A normalization in each layer repairs it."""
    return setup(Encoder(width, not sick), faces(), F.mse_loss, 3e-3)
