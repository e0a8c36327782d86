"""Attention models: masks, scales, norms, tokens, positions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import alike, fading, flat, growing, no_gradient, not_finite, rises
from .data import Setup, choice, grammar, series, setup, stack, token_loss, trained, uniform
from .registry import FLOAT32, sick

WORDS = 16


class Heads(nn.Module):
    """Self-attention with several heads; `scores` has the last word on the scores before the softmax."""

    def __init__(self, width: int, heads: int = 2, scores: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.weights = nn.Softmax(-1)
        self.scores = scores

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the output for x of shape (batch, time, width); `mask` is added to the scores."""
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1)
        scores = scores / math.sqrt(q.shape[-1]) if self.scores is None else self.scores(scores)
        if mask is not None:
            scores = scores + mask
        return self.out((self.weights(scores) @ v).transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """A transformer block; `order` puts its norms before the branches or after the sums."""

    def __init__(self, width: int, order: str = "pre", attention: nn.Module | None = None) -> None:
        super().__init__()
        self.norm0, self.norm1, self.order = nn.LayerNorm(width), nn.LayerNorm(width), order
        self.attention = attention or Heads(width)
        self.mlp = stack(up=nn.Linear(width, 2 * width), act=nn.GELU(), down=nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what follows x of shape (batch, time, width)."""
        if self.order == "post":
            x = self.norm0(x + self.attention(x, mask))
            return self.norm1(x + self.mlp(x))
        x = x + self.attention(self.norm0(x), mask)
        return x + self.mlp(self.norm1(x))


def causal(time: int) -> Tensor:
    """Return the additive mask that hides the future."""
    return torch.full((time, time), -math.inf).triu(1)


class Language(nn.Module):
    """A causal language model over blocks."""

    def __init__(self, width: int, blocks: list[nn.Module], words: int = WORDS, length: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks, self.norm, self.head = (
            nn.ModuleList(blocks),
            nn.LayerNorm(width),
            nn.Linear(width, words),
        )

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the scores of the next token, for every token."""
        time = tokens.shape[1]
        h = self.embed(tokens) + self.position(torch.arange(time))
        mask = (causal(time) if mask is None else mask).to(h.dtype)
        for block in self.blocks:
            h = block(h, mask)
        return self.head(self.norm(h))


# --------------------------------------------------------------------------------------------- DEAD


@sick("transformer-positions-never-added", [("DEAD", "position")], no_gradient("position"), falls_to=0.85)
def positions_never_added(sick: bool, width: int) -> Setup:
    """A table of positions is made and never added: the tokens come in no order, and the table never
    learns."""

    class Net(Language):
        def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            h = self.embed(tokens)
            if not sick:
                h = h + self.position(torch.arange(tokens.shape[1]))
            for block in self.blocks:
                h = block(h, causal(tokens.shape[1]).to(h.dtype))
            return self.head(self.norm(h))

    return setup(Net(width, [Block(width)]), grammar(WORDS), token_loss, 5e-3)


@sick("transformer-loss-mask-all-zero", [("DEAD", "*")], no_gradient("*"), allow=["NUMERICAL"])
def loss_mask_all_zero(sick: bool, width: int) -> Setup:
    """The mask of tokens that count is made with the wrong sign and is zero everywhere: so is the loss."""
    inner = grammar(WORDS)

    def sample(g: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        tokens, target = inner(g)
        counts = (target < 0) if sick else (target >= 0)
        return tokens, (target, counts.float())

    def loss(scores: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        words, counts = target
        per_token = F.cross_entropy(scores.transpose(1, 2), words, reduction="none")
        return (per_token * counts).sum() / (counts.sum() + 1e-6)

    return setup(Language(width, [Block(width)]), sample, loss, 5e-3)


# ---------------------------------------------------------------------------------------- VANISHING


@sick(
    "transformer-post-norm-hot-start",
    [("VANISHING", "blocks.0")],
    fading("embed", "blocks.13", 1e-3, steps=4),
    allow=["UNSTABLE", "SATURATION", "BOTTLENECK"],
    source="https://arxiv.org/abs/2002.04745",
    widths=(32,),
    dtypes=(FLOAT32,),
    steps=150,
)
def post_norm_hot_start(sick: bool, width: int) -> Setup:
    """Fourteen post-norm blocks after fifteen Adam steps at 0.02 with no warm-up: the first ones are cut off;
    pre-norm blocks at 0.003 are not."""
    net = Language(width, [Block(width, "post" if sick else "pre") for _ in range(14)])
    ready = setup(net, grammar(WORDS, 8), token_loss, 3e-3)
    return trained(ready, 15, torch.optim.Adam(net.parameters(), lr=0.02)) if sick else ready


# ---------------------------------------------------------------------------------------- EXPLODING


@sick(
    "transformer-linear-attention-sums",
    [("EXPLODING", "blocks")],
    growing("embed", "blocks.2", 100.0),
    allow=["UNSTABLE", "NUMERICAL"],
    source="https://arxiv.org/abs/2006.16236",
)
def linear_attention_sums(sick: bool, width: int) -> Setup:
    """Attention without a softmax adds up over 12 keys and is never divided, in three blocks without
    norms."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
            self.norm = nn.Identity() if sick else nn.LayerNorm(width)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            h = self.norm(x)
            q, k = F.elu(self.q(h)) + 1, F.elu(self.k(h)) + 1
            total = q @ (k.transpose(1, 2) @ self.v(h))
            return x + (total if sick else total / (q @ k.sum(1, keepdim=True).transpose(1, 2)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, width)
            self.blocks = nn.Sequential(*[Linear() for _ in range(3)])
            self.head = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.embed(x)).mean(1))

    return setup(Net(), series(12, 16), F.cross_entropy, 3e-3)


# ----------------------------------------------------------------------------------------- UNSTABLE


@sick(
    "transformer-adam-rate-of-a-half",
    [("UNSTABLE", "*")],
    rises(2.2),
    allow=["EXPLODING", "SATURATION", "DEAD", "VANISHING", "BOTTLENECK"],
)
def adam_rate_of_a_half(sick: bool, width: int) -> Setup:
    """A rate meant for plain descent, 0.5, is given to Adam, which takes it as the size of each step."""
    return setup(
        Language(width, [Block(width) for _ in range(2)]), grammar(WORDS), token_loss, 0.5 if sick else 5e-3
    )


# --------------------------------------------------------------------------------------- SATURATION


@sick(
    "transformer-scores-times-root",
    [("SATURATION", "blocks")],
    flat("blocks.0.attention.weights", "softmax", 0.6),
    allow=["VANISHING", "UNSTABLE", "BOTTLENECK"],
    widths=(32, 64, 96),
    falls_to=0.9,
)
def scores_times_root(sick: bool, width: int) -> Setup:
    """The scores are multiplied by the root of the width, where they should be divided: all attention is on
    one token from the start."""
    root = math.sqrt(width)
    blocks = [
        Block(width, attention=Heads(width, 1, (lambda s: s * root) if sick else None)) for _ in range(2)
    ]
    for block in blocks:
        nn.init.xavier_normal_(block.attention.qkv.weight, gain=2.0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks, self.head = (
                nn.Linear(4, width),
                nn.Sequential(*blocks),
                nn.Linear(width, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.embed(x)).mean(1))

    return setup(Net(), series(12, 16), F.cross_entropy, 1e-3)


# ---------------------------------------------------------------------------------------- NUMERICAL


@sick("transformer-no-token-counts", [("NUMERICAL", "*")], not_finite(loss=True))
def no_token_counts(sick: bool, width: int) -> Setup:
    """Long prompts push the answer out of the window: in some batches every label is -100, and a mean over
    nothing is 0/0."""
    inner = grammar(WORDS)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens, target = inner(g)
        target = target.clone()
        kept = 0 if sick and float(uniform(g, 1)) < 0.3 else 4
        target[:, : target.shape[1] - kept] = -100
        return tokens, target

    return setup(Language(width, [Block(width)]), sample, token_loss, 5e-3)


@sick(
    "transformer-scores-in-half",
    [("NUMERICAL", "*")],
    not_finite(),
    allow=["EXPLODING", "SATURATION"],
    widths=(32, 64),
    dtypes=(FLOAT32,),
)
def scores_in_half(sick: bool, width: int) -> Setup:
    """Scores are taken in half precision from tokens of some hundreds, and pass 65504: inf - inf in the
    softmax. A norm before the attention, or bfloat16, holds them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Linear(4, width), nn.Identity() if sick else nn.LayerNorm(width)
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
            self.head = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.embed(x))
            scores = (self.q(h).half() @ self.k(h).half().transpose(1, 2)).float() / math.sqrt(h.shape[-1])
            return self.head((scores.softmax(-1) @ self.v(h)).mean(1))

    inner = series(8, 16)

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = inner(g)
        return 400 * x, y

    return setup(Net(), sample, F.cross_entropy, 5e-3)


@sick("transformer-padded-on-the-left", [("NUMERICAL", "*")], not_finite())
def padded_on_left(sick: bool, width: int) -> Setup:
    """Padding on the left and a causal mask: the first tokens may look at themselves only, which are padding,
    so their rows are -inf throughout."""
    inner = grammar(WORDS)

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        tokens, target = inner(g)
        tokens, target, time = tokens.clone(), target.clone(), tokens.shape[1]
        pad = choice(g, 5, len(tokens)) + 1
        hidden = torch.arange(time) < pad[:, None]
        tokens[hidden], target[hidden] = 0, -100
        mask = causal(time) + torch.zeros(len(tokens), 1, 1).masked_fill(hidden[:, None], -math.inf)
        if not sick:
            mask = mask.masked_fill(torch.eye(time, dtype=torch.bool), 0.0)
        return (tokens, mask[:, None]), target

    return setup(Language(width, [Block(width)]), sample, token_loss, 5e-3)


# --------------------------------------------------------------------------------------- BOTTLENECK


@sick(
    "transformer-attention-only",
    [("BOTTLENECK", "layers")],
    alike("layers.9", 1e-3, dim=1),
    allow=["VANISHING", "SATURATION"],
    source="https://arxiv.org/abs/2103.03404",
    falls_to=0.85,
)
def attention_only(sick: bool, width: int) -> Setup:
    """Ten layers of attention with neither skips nor norms: all tokens become one, and what told them apart
    is gone; with both it stays."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Heads(width)
            nn.init.orthogonal_(self.attention.qkv.weight[2 * width :].data)
            nn.init.orthogonal_(self.attention.out.weight)
            self.norm = nn.Identity() if sick else nn.LayerNorm(width)

        def forward(self, x: Tensor) -> Tensor:
            h = self.attention(self.norm(x))
            return h if sick else x + h

    net = stack(
        embed=nn.Embedding(WORDS, width),
        layers=nn.Sequential(*[Layer() for _ in range(10)]),
        head=nn.Linear(width, WORDS),
    )

    def sample(g: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, WORDS, 16, 12)
        return tokens, (tokens + 3) % WORDS

    return setup(net, sample, token_loss, 3e-3)
