"""Models of public reports: fine-tuning with adapters, policy losses, recommenders."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .claims import no_gradient, not_finite, training, zero_at_first
from .data import choice, factors, frozen, grammar, seeded, setup, token_loss, uniform
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------------------- adapters in a language model


class LoraLinear(nn.Module):
    """A frozen linear map with a low-rank update beside it."""

    def __init__(self, size: int, rank: int = 4) -> None:
        super().__init__()
        self.base = frozen(nn.Linear(size, size))
        self.lora_a = nn.Linear(size, rank, bias=False)
        self.lora_b = nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.lora_b(self.lora_a(x))


class DecoderBlock(nn.Module):
    """Causal attention and a feed-forward part, each with adapters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = frozen(nn.LayerNorm(size)), frozen(nn.LayerNorm(size))
        self.q_proj, self.v_proj = LoraLinear(size), LoraLinear(size)
        self.k_proj = frozen(nn.Linear(size, size))
        self.up, self.down = LoraLinear(size), LoraLinear(size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        x = x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class AdaptedDecoder(nn.Module):
    """A pretrained decoder whose blocks have adapters; the head is trained too."""

    def __init__(self, words: int, size: int, recompute: bool) -> None:
        super().__init__()
        self.embed = frozen(nn.Embedding(words, size))
        self.blocks = nn.ModuleList(DecoderBlock(size) for _ in range(3))
        self.lm_head = nn.Linear(size, words)
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.recompute else block(x)
        return self.lm_head(x)


@sick(
    "contact5a-lora-checkpoint",
    [("DEAD", "blocks")],
    no_gradient("blocks"),
    source="https://github.com/locuslab/open-unlearning/issues/178",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_checkpoint(sick: bool, width: int) -> Setup:
    """Blocks with adapters are recomputed in the backward pass, and their input is a frozen embedding that
    requires no gradient, so the recomputed part gets none. Repair: the embedding's output requires one."""
    model = AdaptedDecoder(16, width, recompute=True)
    if not sick:
        model.embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return setup(model, grammar(16, 12, 8), token_loss, 1e-2)


@healthy(
    "contact5a-lora-zero",
    zero_at_first("blocks.0.q_proj.lora_a", "blocks.2.down.lora_a"),
    widths=(32,),
    dtypes=(FLOAT32,),
)
def lora_zero(width: int) -> Setup:
    """Every second factor of the adapters starts at zero, so the first factors get no gradient in the first
    step; most parameters are frozen."""
    return setup(AdaptedDecoder(16, width, recompute=False), grammar(16, 12, 8), token_loss, 1e-2)


# ---------------------------------------------------------------------------------- policies and preferences


class TokenPolicy(nn.Module):
    """A small recurrent language model that scores given tokens."""

    def __init__(self, words: int, size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(words, size)
        self.rnn = nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(size, words)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.wte(tokens[:, :-1]))
        logps = self.head(hidden).log_softmax(-1)
        return logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)


class WithReference(nn.Module):
    """A policy and the frozen model that it may not leave."""

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        super().__init__()
        self.policy, self.reference = policy, frozen(reference)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            reference = self.reference(tokens)
        return {"logps": self.policy(tokens), "ref_logps": reference}


def rollouts(number: int, length: int):
    """Completions with their rewards."""
    tokens = grammar(16, length + 1, number)

    def sample(g):
        head, last = tokens(g)
        whole = torch.cat([head, last[:, -1:]], 1)
        return whole, 0.5 + torch.rand(number, generator=g)

    return sample


@sick(
    "contact5a-grpo-kl",
    [("NUMERICAL", "*")],
    not_finite(3, loss=False),
    allow=["EXPLODING", "UNSTABLE"],
    source="https://github.com/OpenRLHF/OpenRLHF/pull/1335",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def grpo_kl(sick: bool, width: int) -> Setup:
    """The penalty exp(r) - r - 1 of a whole sequence's log-ratio r is clipped after the exponential, which
    has overflowed for a policy that has drifted: the loss is finite, its gradient zero times infinity.
    Repair: bound the ratio before the exponential, where the clipped penalty is flat anyway."""
    reference = TokenPolicy(16, width)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.head.weight.mul_(12.0)

    def loss(out: dict[str, Tensor], reward: Tensor) -> Tensor:
        log_ratio = (out["ref_logps"] - out["logps"]).sum(-1)
        bounded = log_ratio if sick else log_ratio.clamp(max=20.0)
        kl = (bounded.exp() - log_ratio - 1).clamp(min=-10.0, max=10.0)
        return -(reward * out["logps"].mean(-1)).mean() + 0.01 * kl.mean()

    return setup(WithReference(policy, reference), rollouts(8, 64), loss, 1e-2)


@healthy("contact5a-dpo-log2", widths=(32,), dtypes=(FLOAT32,))
def dpo_log2(width: int) -> Setup:
    """Preferences between pairs, with a policy equal to its frozen reference: the margin is exactly zero and
    the loss log 2 at first, and half of the parameters never get a gradient."""
    reference = TokenPolicy(16, width)
    good = grammar(16, 12, 8)

    def sample(g):
        head, last = good(g)
        chosen = torch.cat([head, last[:, -1:]], 1)
        return torch.cat([chosen, choice(g, 16, *chosen.shape)]), None

    def loss(out: dict[str, Tensor], target: None) -> Tensor:
        margin = (out["logps"] - out["ref_logps"]).sum(-1)
        won, lost = margin.chunk(2)
        return -F.logsigmoid(0.1 * (won - lost)).mean()

    return setup(WithReference(copy.deepcopy(reference), reference), sample, loss, 3e-3)


# -------------------------------------------------------------------------------------------- recommenders


class Quantize(nn.Module):
    """The nearest code of a codebook, passed straight through."""

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codes, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        emb = self.codebook(torch.cdist(x, self.codebook.weight).argmin(-1))
        return x + (emb - x).detach(), emb


def squares(a: Tensor, b: Tensor) -> Tensor:
    """The mean over the items of the summed squares."""
    return (a - b).square().sum(-1).mean()


class RqVae(nn.Module):
    """Item features to a sum of codes, one per level, and back."""

    def __init__(self, features: int, size: int, straight: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, size), nn.SiLU(), nn.Linear(size, 8))
        self.levels = nn.ModuleList(Quantize(16, 8) for _ in range(3))
        self.decoder = nn.Sequential(nn.Linear(8, size), nn.SiLU(), nn.Linear(size, features))
        self.straight = straight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        res = self.encoder(x)
        total, loss = torch.zeros_like(res), res.new_zeros(())
        for level in self.levels:
            out, emb = level(res)
            emb = out if self.straight else emb
            loss = loss + squares(emb, res.detach()) + squares(res, emb.detach())
            total, res = total + out, res - out
        return {"x_hat": self.decoder(total), "rqvae_loss": loss}

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Take the codes of each level from what some items leave for it."""
        res = self.encoder(x)
        for level in self.levels:
            assert isinstance(level, Quantize)
            codes = level.codebook.weight
            codes.copy_(res[torch.randperm(len(res))[: len(codes)]])
            res = res - level(res)[1]


@sick(
    "contact5a-recsys-semanticid",
    [("DEAD", "levels")],
    no_gradient("levels"),
    allow=["BOTTLENECK", "UNSTABLE", "EXPLODING"],
    source="https://github.com/EdoardoBotta/RQ-VAE-Recommender/issues/24",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def recsys_semanticid(sick: bool, width: int) -> Setup:
    """The loss that should move the codes is taken on the straight-through output, in which they are
    detached: no codebook gets a gradient. Repair: take it on the looked-up code itself."""

    def loss(out: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.mse_loss(out["x_hat"], x) + out["rqvae_loss"]

    model, items = RqVae(24, width, straight=sick), factors(24, 4)
    model.start(items(seeded(1))[0])
    return setup(model, items, loss, 3e-3)


class TwoTowers(nn.Module):
    """The mean of a user's past items against a candidate, from one large padded table."""

    def __init__(self, items: int, size: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, size, padding_idx=0)
        self.users = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        self.bias = nn.Embedding(items, 1, padding_idx=0)

    def forward(self, past: Tensor, candidates: Tensor) -> Tensor:
        seen = (past > 0).float()[..., None]
        user = self.users((self.items(past) * seen).sum(1) / seen.sum(1).clamp_min(1.0))
        return (user[:, None] * self.items(candidates)).sum(-1) + self.bias(candidates)[..., 0]


def rows_at_rest(above: float):
    """More than a share of the table's rows gets no gradient in a step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        step = next(training(setup, 1))
        grad = step.grads["items.weight"]
        share = 0.0 if grad is None else float((grad == 0).all(-1).float().mean())
        return share > above, f"{share:.0%} of the rows get no gradient"

    return claim


@healthy("contact5a-recsys-sparse", rows_at_rest(0.5), widths=(32,), dtypes=(FLOAT32,))
def recsys_sparse(width: int) -> Setup:
    """A batch touches few rows of a large table, the padding row never learns, and some users have no past
    at all; popular items are learned all the same."""
    kinds = choice(seeded(55), 4, 600)

    def sample(g):
        draw = (600 * uniform(g, 64, 9).pow(3)).long().clamp(1, 599)
        taste = choice(g, 4, 64, 1)
        past = torch.where(kinds[draw[:, :6]] == taste, draw[:, :6], 0)
        return (past, draw[:, 6:]), (kinds[draw[:, 6:]] == taste).float()

    return setup(TwoTowers(600, width), sample, F.binary_cross_entropy_with_logits, 1e-2)
