"""Cases after public reports: vision transformers, sparse retrieval and preference losses.

Each sick case keeps the structure and the mechanism of the report it names, at a size that trains in
milliseconds; its repair is the one that the report's thread found.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, flat, no_gradient, not_finite, training, weak
from .data import choice, grammar, normal, setup, textures, trained
from .registry import FLOAT32, Setup, healthy, sick


def patches(pictures: Tensor, size: int = 2) -> Tensor:
    """Cut pictures (batch, channels, height, width) into tokens (batch, patches, channels * size * size)."""
    return F.unfold(pictures, size, stride=size).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block, with a scale on each branch if one is given."""

    def __init__(self, width: int, heads: int = 2, scale: float | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gammas = None
        if scale is not None:
            self.gammas = nn.Parameter(torch.full((2, width), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape (batch, tokens, width)."""
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        x = x + (a if self.gammas is None else self.gammas[0] * a)
        m = self.mlp(self.norm2(x))
        return x + (m if self.gammas is None else self.gammas[1] * m)


# --------------------------------------------------------------------------- joint-embedding prediction


class Encoder(nn.Module):
    """A small vision transformer over 16 patches, some of which may be hidden."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return features (batch, 16, width); `mask` (16) is true at the hidden patches."""
        x = self.embed(tokens)
        if mask is not None:
            x = torch.where(mask[:, None], self.hidden, x)
        x = x + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Jepa(nn.Module):
    """Predicts the features of hidden patches, a slow copy's or the encoder's own."""

    def __init__(self, width: int, slow: bool) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.predictor = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.target = copy.deepcopy(self.encoder).requires_grad_(False) if slow else None

    def forward(self, pictures: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the predicted and the wanted features at the hidden patches."""
        tokens = patches(pictures)
        predicted = self.predictor(self.encoder(tokens, mask))[:, mask]
        if self.target is None:
            return {"predicted": predicted, "wanted": self.encoder(tokens)[:, mask]}
        with torch.no_grad():
            for mine, other in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
                mine.lerp_(other, 0.004)
            return {"predicted": predicted, "wanted": self.target(tokens)[:, mask]}


def samples_alike(module: str, below: float, steps: int) -> Claim:
    """After some steps, what differs between samples is a small part of a module's output."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        output = last.outputs[module].detach().double()
        share = float((output - output.mean(0)).norm() / output.norm().clamp_min(1e-300))
        return share < below, f"what differs between samples in {module} = {share:.2g}"

    return claim


@sick(
    "contact3a-vit-jepa_no_target",
    [("BOTTLENECK", "*")],
    samples_alike("encoder.norm", 0.05, 10),
    allow=["VANISHING", "UNSTABLE"],
    source="https://github.com/galilai-group/lejepa/issues/31",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def jepa_no_target(sick: bool, width: int) -> Setup:
    """Joint-embedding prediction whose wanted features come from the trained encoder with their gradient,
    some steps into training: all pictures get the same features. Repair: a slow copy without gradient."""
    draw = textures()

    def sample(g: Generator) -> tuple[Any, Tensor]:
        pictures, kind = draw(g)
        mask = torch.zeros(16, dtype=torch.bool)
        mask[torch.randperm(16, generator=g)[:8]] = True
        return (pictures, mask), kind

    def loss(output: dict[str, Tensor], _: Tensor) -> Tensor:
        return F.smooth_l1_loss(output["predicted"], output["wanted"])

    ready = setup(Jepa(width, slow=not sick), sample, loss, 3e-3)
    return trained(ready, 120) if sick else ready


# ------------------------------------------------------------------- attention after a large modulation


class PixelAttention(nn.Module):
    """Attention over tokens, with or without a norm on queries and keys."""

    def __init__(self, width: int, heads: int, norms: bool) -> None:
        super().__init__()
        self.heads, self.norms = heads, norms
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape (batch, tokens, width)."""
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.norms:
            q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        weights = self.drop((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, d))


class PixelDenoiser(nn.Module):
    """A denoiser of patches where every token has a scale and a shift of its own before the attention."""

    def __init__(self, width: int, norms: bool) -> None:
        super().__init__()
        self.embed, self.context = nn.Linear(12, width), nn.Linear(13, width)
        self.modulate = nn.Linear(width, 2 * width)
        self.attention = PixelAttention(width, 2, norms)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.out = nn.Linear(width, 12)
        with torch.no_grad():
            self.modulate.weight.mul_(100)  # as large as it grows to in a long training

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        """Return the clean patches (batch, 16, 12) for noisy ones and their noise levels (batch)."""
        x = self.embed(noisy)
        hint = torch.cat([noisy, level[:, None, None].expand(-1, 16, 1)], -1)
        scale, shift = self.modulate(F.silu(self.context(hint))).chunk(2, -1)
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        x = x + self.mlp(F.layer_norm(x, x.shape[-1:]))
        return self.out(F.layer_norm(x, x.shape[-1:]))


@sick(
    "contact3a-vit-pixel_adaln",
    [("SATURATION", "*")],
    flat("attention.drop", "softmax", 0.8),
    allow=["UNSTABLE", "EXPLODING", "VANISHING"],
    source="https://github.com/NVlabs/PixelDiT/issues/14",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def pixel_adaln(sick: bool, width: int) -> Setup:
    """The scale and shift that each token gets have grown large, so that queries and keys have too and every
    row of attention looks at one token. Repair: a norm without scale on queries and keys."""
    draw = textures()

    def sample(g: Generator) -> tuple[Any, Tensor]:
        clean = patches(draw(g)[0])
        level = torch.rand(len(clean), generator=g)
        return (clean + level[:, None, None] * normal(g, *clean.shape), level), clean

    return setup(PixelDenoiser(width, norms=not sick), sample, F.mse_loss, 2e-3)


@healthy(
    "contact3a-vit-masked_layerscale",
    weak("blocks.0.mlp", "decode", 0.02),
    widths=(32,),
    dtypes=(FLOAT32,),
)
def masked_layerscale(width: int) -> Setup:
    """Masked pictures, three patches in four hidden, and branches scaled by 1e-3: their gradients are small
    at first against the decoder's, and the model trains."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decode = nn.Linear(12, width), nn.Linear(width, 12)
            self.hidden = nn.Parameter(0.02 * torch.randn(width))
            self.places = nn.Parameter(0.02 * torch.randn(16, width))
            self.blocks = nn.ModuleList(Block(width, scale=1e-3) for _ in range(3))

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            x = torch.where(mask[..., None], self.hidden, self.embed(tokens)) + self.places
            for block in self.blocks:
                x = block(x)
            return self.decode(x)

    draw = textures(kinds=2)

    def sample(g: Generator) -> tuple[Any, Any]:
        tokens = patches(draw(g)[0])
        mask = torch.rand(tokens.shape[:2], generator=g) < 0.75
        return (tokens, mask), (tokens, mask)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        tokens, mask = target
        each = (output - tokens).square().mean(-1)
        return (each * mask).sum() / mask.sum()

    return setup(Masked(), sample, loss, 5e-3)


# -------------------------------------------------------------------------------------- sparse retrieval


class Splade(nn.Module):
    """A sparse retriever: word weights over the vocabulary, the largest that any token of the text gives."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.mix = Block(width)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.vocabulary = nn.Linear(width, words)

    def encode(self, text: Tensor) -> Tensor:
        """Return weights (batch, words) for texts (batch, tokens)."""
        logits = self.vocabulary(self.transform(self.mix(self.words(text))))
        return torch.log1p(F.relu(logits)).amax(1)

    def forward(self, queries: Tensor, passages: Tensor) -> dict[str, Tensor]:
        """Return both weights."""
        return {"queries": self.encode(queries), "passages": self.encode(passages)}


@sick(
    "contact3a-retrieval-splade_regularizer",
    [("DEAD", "*")],
    no_gradient("words", "transform", "vocabulary"),
    allow=["BOTTLENECK", "VANISHING"],
    source="https://github.com/huggingface/sentence-transformers/issues/3431",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def splade_regularizer(sick: bool, width: int) -> Setup:
    """The penalty on active words outweighs the ranking loss: some steps into training no word of any text is
    active, and nothing has a gradient. Repair: a small weight of the penalty."""
    weight = 10.0 if sick else 1e-3

    def sample(g: Generator) -> tuple[Any, Tensor]:
        topic = 8 * torch.randperm(8, generator=g)
        passages = topic[:, None] + choice(g, 8, 8, 10)
        return (topic[:, None] + choice(g, 8, 8, 4), passages), torch.arange(8)

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        queries, passages = output["queries"], output["passages"]
        rank = F.cross_entropy(queries @ passages.T, target)
        flops = passages.mean(0).square().sum() + queries.abs().sum(-1).mean()
        return rank + weight * flops

    ready = setup(Splade(64, width), sample, loss, 3e-3)
    return trained(ready, 100) if sick else ready


# ----------------------------------------------------------------------------------- preference learning


class Writer(nn.Module):
    """A recurrent language model that tells how likely texts are."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words, self.state = nn.Embedding(words, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, text: Tensor) -> Tensor:
        """Return the log-probability (batch) of texts (batch, tokens)."""
        logits = self.head(self.state(self.words(text[:, :-1]))[0])
        return logits.log_softmax(-1).gather(-1, text[:, 1:, None]).sum((1, 2))


class Preference(nn.Module):
    """A policy and the frozen reference that it is held to."""

    def __init__(self, policy: Writer, reference: Writer) -> None:
        super().__init__()
        self.policy, self.reference = policy, reference.requires_grad_(False)

    def forward(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """Return how much likelier than to the reference the texts are to the policy."""
        with torch.no_grad():
            base = self.reference(chosen), self.reference(rejected)
        return {"chosen": self.policy(chosen) - base[0], "rejected": self.policy(rejected) - base[1]}


def pairs(length: int, number: int = 16) -> Any:
    """Texts of the grammar against texts of random words."""
    draw = grammar(length=length - 1, number=number)

    def sample(g: Generator) -> tuple[Any, None]:
        before, after = draw(g)
        return (torch.cat([before, after[:, -1:]], 1), choice(g, 16, number, length)), None

    return sample


@sick(
    "contact3a-rlhf-dpo_log_sigmoid",
    [("NUMERICAL", "*")],
    not_finite(5, loss=True),
    allow=["EXPLODING", "UNSTABLE", "SATURATION"],
    source="https://github.com/thinking-machines-lab/tinker-cookbook/pull/188",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dpo_log_sigmoid(sick: bool, width: int) -> Setup:
    """A preference loss as the logarithm of a sigmoid: for long texts that a sure reference ranks far the
    other way, the sigmoid is zero and its logarithm infinite. Repair: the two in one function."""
    model = Preference(Writer(16, width), Writer(16, width))
    with torch.no_grad():
        model.reference.head.weight.mul_(40)

    def loss(output: dict[str, Tensor], _: None) -> Tensor:
        margin = 0.9 * (output["chosen"] - output["rejected"])
        return -(torch.log(torch.sigmoid(margin)) if sick else F.logsigmoid(margin)).mean()

    return setup(model, pairs(64), loss, 3e-3)


@healthy(
    "contact3a-rlhf-dpo_start",
    no_gradient("reference"),
    source="https://github.com/huggingface/trl/issues/2553",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dpo_start(width: int) -> Setup:
    """A policy that starts as its reference: the loss starts at log 2 for every pair, all margins are zero,
    half of the model is frozen, and it trains."""
    policy = Writer(16, width)

    def loss(output: dict[str, Tensor], _: None) -> Tensor:
        return F.softplus(-0.1 * (output["chosen"] - output["rejected"])).mean()

    return setup(Preference(policy, copy.deepcopy(policy)), pairs(16), loss, 3e-3)
