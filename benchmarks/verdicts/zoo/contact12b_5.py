"""Healthy models that somebody worried about: frozen, sparse, sharp and zero-initialised parts."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, no_gradient, training, zero_at_first
from .contact12b_1 import GPT
from .data import adam, choice, frozen, grammar, normal, seeded, setup, token_loss, trained
from .registry import FLOAT32, Setup, healthy


def idle(prefix: str, number: int, steps: int = 10) -> Claim:
    """In every one of some steps at least one of numbered parts gets no gradient."""

    def claim(setup: Setup) -> tuple[bool, str]:
        counts = [
            sum(step.norm(f"{prefix}.{i}") == 0 for i in range(number)) for step in training(setup, steps)
        ]
        return min(counts) > 0, f"parts of {prefix} without gradient, by step: {counts}"

    return claim


class Experts(nn.Module):
    """A sparse feed-forward layer: every token goes to the two experts that its router likes best."""

    def __init__(self, dim: int, number: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, number, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim)) for _ in range(number)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted outputs of the chosen experts."""
        flat_x = x.reshape(-1, x.shape[-1])
        weight, index = self.gate(flat_x).softmax(-1).topk(2, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(flat_x)
        for number, expert in enumerate(self.experts):
            token, slot = (index == number).nonzero(as_tuple=True)
            if len(token):
                out = out.index_add(0, token, weight[token, slot, None] * expert(flat_x[token]))
        return out.view_as(x)


class SparseLM(nn.Module):
    """A language model with one mixture layer."""

    def __init__(self, vocab: int, dim: int, number: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab, dim), nn.LayerNorm(dim)
        self.moe, self.head = Experts(dim, number), nn.Linear(dim, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token."""
        x = self.embed(tokens)
        return self.head(x + self.moe(self.norm(x)))


@healthy(
    "contact12b-moe-unselected",
    idle("moe.experts", 16),
    source="https://github.com/huggingface/transformers/pull/40530",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def unselected(width: int) -> Setup:
    """In every step some experts have no gradient, since no token of so small a batch chose them; over the
    batches all have their turn, as is usual for mixtures."""
    return setup(SparseLM(16, width, 16), grammar(16, 8, 2), token_loss, adam(5e-3))


class Medusa(nn.Module):
    """Extra heads on a frozen language model, each a residual block that starts at zero and a projection."""

    def __init__(self, base: GPT, dim: int, vocab: int, heads: int) -> None:
        super().__init__()
        self.base = frozen(base)
        self.base.lm_head, head = nn.Identity(), base.lm_head
        self.medusa_linear = nn.ModuleList(nn.Linear(dim, dim) for _ in range(heads))
        self.medusa_head = nn.ModuleList(nn.Linear(dim, vocab, bias=False) for _ in range(heads))
        for linear, out in zip(self.medusa_linear, self.medusa_head, strict=True):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            out.weight.data.copy_(head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the tokens after the next, one head after the other."""
        x = self.base(tokens)
        pairs = zip(self.medusa_linear, self.medusa_head, strict=True)
        return torch.stack([head(x + F.silu(linear(x))) for linear, head in pairs], 2)


@healthy(
    "contact12b-medusa-frozen",
    no_gradient("base"),
    source="https://github.com/FasterDecoding/Medusa/issues/74",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def medusa(width: int) -> Setup:
    """The trained model gets no gradient, and the heads start as copies of its own with zero residual layers:
    the first stage trains the heads alone, and they learn to look further ahead."""
    base = GPT(16, width)
    trained(setup(base, grammar(16, 12, certain=1.0), token_loss, 5e-3, seed=9), 60)
    make = grammar(16, 14, certain=1.0)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, following = make(g)
        return tokens[:, :-2], torch.stack([following[:, 1:-1], following[:, 2:]], 2)

    return setup(Medusa(base, width, 16, 2), sample, token_loss, adam(3e-3))


class BiEncoder(nn.Module):
    """One text encoder for queries and passages, whose normed embeddings are compared."""

    def __init__(self, words: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.dense = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.temperature = temperature

    def encode(self, tokens: Tensor) -> Tensor:
        """Return the unit embedding of every text."""
        return F.normalize(self.dense(self.embed(tokens).mean(1)), dim=-1)

    def forward(self, query: Tensor, passage: Tensor) -> Tensor:
        """Return the scores of every query with every passage."""
        return self.encode(query) @ self.encode(passage).T / self.temperature


def above_chance(times: float, kinds: int) -> Claim:
    """The first loss is above a multiple of the loss of a uniform guess."""

    def claim(setup: Setup) -> tuple[bool, str]:
        ratio = next(training(setup, 1)).loss / math.log(kinds)
        return ratio > times, f"first loss / that of chance = {ratio:.2g}"

    return claim


@healthy(
    "contact12b-embedder-temperature",
    above_chance(3.0, 16),
    source="https://github.com/FlagOpen/FlagEmbedding/issues/1008",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def temperature(width: int) -> Setup:
    """Cosine similarities are divided by 0.02, so that scores reach 50, the softmax over passages is sharp
    and the first loss far worse than a guess: cosines between -1 and 1 need that to tell passages apart."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        topic = choice(g, 200, 16, 4)
        query, passage = topic[:, :3], topic[:, 1:]
        return (query, 200 + passage), torch.arange(16)

    return setup(BiEncoder(400, width, 0.02), sample, F.cross_entropy, adam(5e-3))


class AdaptiveNorm(nn.Module):
    """A residue-wise branch whose scale and gate follow the conditioning, both starting at constants."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.to_gamma, self.to_adaln_zero_gamma = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.branch = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
        for linear, bias in ((self.to_gamma, 0.0), (self.to_adaln_zero_gamma, -2.0)):
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, bias)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Return the stream with the gated branch."""
        scaled = self.norm(x) * torch.sigmoid(self.to_gamma(cond))
        return x + torch.sigmoid(self.to_adaln_zero_gamma(cond)) * self.branch(scaled)


class Denoiser(nn.Module):
    """Predicts residues' coordinates from noisy ones and the sequence."""

    def __init__(self, kinds: int, dim: int) -> None:
        super().__init__()
        self.single_cond = nn.Embedding(kinds, dim)
        self.atom_feats = nn.Linear(3, dim)
        self.layers = nn.ModuleList(AdaptiveNorm(dim) for _ in range(3))
        self.to_coords = nn.Linear(dim, 3)

    def forward(self, noisy: Tensor, sequence: Tensor) -> Tensor:
        """Return the coordinates without noise."""
        x, cond = self.atom_feats(noisy), self.single_cond(sequence)
        for layer in self.layers:
            x = layer(x, cond)
        return self.to_coords(x)


@healthy(
    "contact12b-adaln-zero",
    zero_at_first("single_cond"),
    source="https://github.com/lucidrains/alphafold3-pytorch/pull/303",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def adaln(width: int) -> Setup:
    """The layers that read the conditioning start with zero weights and a constant bias, and at first nothing
    flows to the sequence embedding; but zero weights have a gradient, and after one step all learns."""
    places = normal(seeded(51), 8, 3)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        sequence = choice(g, 8, 16, 10)
        place = places[sequence]
        return (place + 1.5 * normal(g, 16, 10, 3), sequence), place

    return setup(Denoiser(8, width), sample, F.mse_loss, adam(3e-3))


def sparse_rows(module: str, share: float) -> Claim:
    """In the first step more than a share of an embedding's rows has a gradient of zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        grad = next(training(setup, 1)).grads[f"{module}.weight"]
        seen = float((grad.abs().sum(1) == 0).float().mean()) if grad is not None else 1.0
        return seen > share, f"{seen:.0%} of the rows of {module} have no gradient"

    return claim


class TransE(nn.Module):
    """Entities as points and relations as shifts between them."""

    def __init__(self, entities: int, relations: int, dim: int) -> None:
        super().__init__()
        self.entity, self.relation = nn.Embedding(entities, dim), nn.Embedding(relations, dim)

    def forward(self, head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
        """Return how well triples fit, the true tail first."""
        aim = self.entity(head) + self.relation(relation)
        return 6.0 - (aim[:, None] - self.entity(tail)).norm(dim=-1)


@healthy(
    "contact12b-transe-rows",
    sparse_rows("entity", 0.6),
    source="https://github.com/pytorch/pytorch/issues/18404",
    steps=250,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def transe(width: int) -> Setup:
    """Most rows of the embedding have no gradient in a step, and Adam moves some of them all the same: a
    batch names few entities, and moments outlast the batch. Neither is a fault."""
    follow = torch.stack([torch.randperm(300, generator=seeded(s)) for s in (61, 62)])

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        head, relation = choice(g, 300, 32), choice(g, 2, 32)
        tail = torch.cat([follow[relation, head][:, None], choice(g, 300, 32, 2)], 1)
        return (head, relation, tail), torch.zeros(32, dtype=torch.long)

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores, target)

    return setup(TransE(300, 2, width), sample, loss, adam(2e-2))
