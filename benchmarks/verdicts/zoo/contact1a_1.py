"""Sick models of public reports: language models, a latent action model, click prediction."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, no_gradient
from .data import choice, grammar, normal, seeded, setup, token_loss, trained, uniform
from .registry import FLOAT32, Setup, call, sick

ONLY = (FLOAT32,)


# ------------------------------------------------------------------------ experts, one for each token


class NoisyMoE(nn.Module):
    """Experts of which a noisy gate takes one per token; `over_all`: its softmax is over all experts."""

    def __init__(self, width: int, experts: int, over_all: bool) -> None:
        super().__init__()
        self.over_all = over_all
        self.w_gate = nn.Parameter(0.1 * torch.randn(width, experts))
        self.w_noise = nn.Parameter(torch.zeros(width, experts))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        clean = tokens @ self.w_gate
        logits = clean + torch.randn_like(clean) * (F.softplus(tokens @ self.w_noise) + 1e-2)
        if self.over_all:
            gates, chosen = logits.softmax(-1).topk(1, dim=-1)
        else:
            top, chosen = logits.topk(1, dim=-1)
            gates = top.softmax(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = (chosen[:, 0] == number).nonzero()[:, 0]
            out = out.index_add(0, rows, gates[rows] * expert(tokens[rows]))
        return out.view_as(x)


class MoEBlock(nn.Module):
    """Causal attention and the experts, each added to the stream after a norm."""

    def __init__(self, width: int, over_all: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.moe = NoisyMoE(width, 4, over_all)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.moe(self.ln2(x))


class MoELM(nn.Module):
    """A small language model with experts in every block."""

    def __init__(self, width: int, over_all: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(16, width), nn.Embedding(12, width)
        self.blocks = nn.ModuleList(MoEBlock(width, over_all) for _ in range(2))
        self.head = nn.Linear(width, 16)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@sick(
    "contact1a-lm-top1gate",
    [("DEAD", "blocks.0.moe")],
    no_gradient("blocks.0.moe.w_gate", "blocks.1.moe.w_gate"),
    source="https://github.com/davidmrau/mixture-of-experts/issues/27",
    widths=(32,),
    dtypes=ONLY,
)
def top1_gate(sick: bool, width: int) -> Setup:
    """The gate's softmax is over the logits of the chosen experts; with one expert per token that is
    always 1, so the gate learns nothing. Over all experts, the chosen one's share carries a gradient."""
    return setup(MoELM(width, over_all=not sick), grammar(), token_loss)


# ------------------------------------------------------------- attention logits of normed queries


class RMSNorm(nn.Module):
    """Rows divided by their root mean square, times a learned scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class NormedAttention(nn.Module):
    """Causal attention with norms on queries and keys of a wide head; returns its weights as well."""

    def __init__(self, width: int, head: int, scaling: float) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, head, False), nn.Linear(width, head, False)
        self.v_proj, self.o_proj = nn.Linear(width, width, False), nn.Linear(width, width, False)
        self.q_norm, self.k_norm = RMSNorm(head), RMSNorm(head)
        self.scaling = scaling

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        scores = self.scaling * q @ k.transpose(1, 2)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -1e9).softmax(-1)
        return self.o_proj(weights @ self.v_proj(x)), weights


class NormedBlock(nn.Module):
    """Attention and a gated feed-forward part, each after a norm."""

    def __init__(self, width: int, head: int, scaling: float) -> None:
        super().__init__()
        self.input_layernorm, self.post_layernorm = RMSNorm(width), RMSNorm(width)
        self.self_attn = NormedAttention(width, head, scaling)
        self.gate_proj, self.up_proj = nn.Linear(width, 2 * width, False), nn.Linear(width, 2 * width, False)
        self.down_proj = nn.Linear(2 * width, width, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = self.self_attn(self.input_layernorm(x))
        x = x + mixed
        y = self.post_layernorm(x)
        return x + self.down_proj(F.gelu(self.gate_proj(y)) * self.up_proj(y)), weights


class NormedLM(nn.Module):
    """A language model with tied embeddings; returns logits and all attention weights."""

    def __init__(self, width: int, scaling: float) -> None:
        super().__init__()
        self.embed_tokens, self.positions = nn.Embedding(16, width), nn.Embedding(24, width)
        nn.init.normal_(self.embed_tokens.weight, std=width**-0.5)
        nn.init.normal_(self.positions.weight, std=width**-0.5)
        self.layers = nn.ModuleList(NormedBlock(width, 256, scaling) for _ in range(3))
        self.norm = RMSNorm(width)

    def forward(self, input_ids: Tensor) -> dict[str, object]:
        x = self.embed_tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        attentions = []
        for layer in self.layers:
            x, weights = layer(x)
            attentions.append(weights)
        return {"logits": F.linear(self.norm(x), self.embed_tokens.weight), "attentions": attentions}


def attends_to_one(share: float, begin: int = 4) -> Claim:
    """Claim: more than a share of the attention rows put over 0.9 on one token, leaving out the first rows,
    which have few to choose from."""

    def claim(ready: Setup) -> tuple[bool, str]:
        with torch.no_grad():
            rows = torch.stack(call(ready.model, ready.make_batch())["attentions"])[:, :, begin:]
        seen = float((rows.amax(-1) > 0.9).float().mean())
        return seen > share, f"{seen:.0%} of the attention rows are on one token"

    return claim


@sick(
    "contact1a-lm-qkscale",
    [("SATURATION", "layers")],
    attends_to_one(0.5),
    allow=["EXPLODING", "VANISHING", "UNSTABLE", "BOTTLENECK"],
    source="https://github.com/huggingface/transformers/issues/45676",
    widths=(64,),
    dtypes=ONLY,
)
def qk_scale(sick: bool, width: int) -> Setup:
    """Queries and keys are normed to length sqrt(head size), and their products are not divided by that:
    the logits are wide and every row of the softmax is on one token. The usual scaling cures it."""
    scaling = 1.0 if sick else 1 / math.sqrt(256)
    return setup(NormedLM(width, scaling), grammar(length=24), lambda o, y: token_loss(o["logits"], y), 1e-3)


# ------------------------------------------------------------- a codebook out of reach of its loss


class Quantizer(nn.Module):
    """The nearest of some vectors for each row: straight through, as looked up, and the rows themselves."""

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codes, size)
        nn.init.uniform_(self.codebook.weight, -1 / codes, 1 / codes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nearest = torch.cdist(x.detach(), self.codebook.weight.detach()).argmin(-1)
        z = self.codebook(nearest)
        return x + (z - x).detach(), z, x


class LatentActions(nn.Module):
    """From two frames to a code of the action between them, and from frame and code to the next frame."""

    def __init__(self, width: int, sick: bool) -> None:
        super().__init__()
        self.sick = sick
        self.encoder = nn.Sequential(nn.Linear(24, width), nn.GELU(), nn.Linear(width, 8))
        self.vq = Quantizer(16, 8)
        self.decoder = nn.Sequential(nn.Linear(20, width), nn.GELU(), nn.Linear(width, 12))

    def forward(self, frame: Tensor, following: Tensor) -> dict[str, Tensor]:
        z_q, z, z_e = self.vq(self.encoder(torch.cat([frame, following], -1)))
        recon = frame + self.decoder(torch.cat([frame, z_q], -1))
        return {
            "recon": recon,
            "codebook": F.mse_loss(z_q if self.sick else z, z_e.detach()),
            "commit": F.mse_loss(z_e, z_q.detach()),
        }


def frames(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two frames of 12 numbers between which one of six actions happened; the target is the second."""
    actions = 1.5 * normal(seeded(3), 6, 12)
    frame = normal(g, 64, 12)
    following = frame + actions[choice(g, 6, 64)] + 0.05 * normal(g, 64, 12)
    return (frame, following), following


@sick(
    "contact1a-latent-codebook",
    [("DEAD", "vq.codebook")],
    no_gradient("vq.codebook"),
    allow=["BOTTLENECK"],
    source="https://github.com/showlab/Olaf-World/issues/8",
    steps=400,
    widths=(32,),
    dtypes=ONLY,
)
def codebook(sick: bool, width: int) -> Setup:
    """The codebook's loss is taken on the straight-through output, in which the looked-up vector is
    detached: no gradient reaches the codebook. The loss belongs on the looked-up vector."""

    def loss(out: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(out["recon"], target) + out["codebook"] + 0.25 * out["commit"]

    return setup(LatentActions(width, sick), frames, loss)


# -------------------------------------------------------------------- clicks from unscaled features


class DeepFM(nn.Module):
    """Factorization machine and a deep part on embedded fields; a number scales its field's embedding."""

    def __init__(self, width: int, size: int = 16) -> None:
        super().__init__()
        self.tokens = nn.ModuleDict({"user": nn.Embedding(40, size), "item": nn.Embedding(30, size)})
        self.floats = nn.ModuleDict({"amount": nn.Embedding(1, size), "days": nn.Embedding(1, size)})
        self.mlp = nn.Sequential(nn.Linear(4 * size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.deep_predict = nn.Linear(width, 1)
        self.sigmoid = nn.Sigmoid()
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, **fields: Tensor) -> Tensor:
        parts = [table(fields[name]) for name, table in self.tokens.items()]
        first = torch.zeros(1, dtype=torch.long)
        parts += [table(first) * fields[name][:, None] for name, table in self.floats.items()]
        embedded = torch.stack(parts, 1)
        fm = 0.5 * (embedded.sum(1) ** 2 - (embedded**2).sum(1)).sum(1, keepdim=True)
        return self.sigmoid(fm + self.deep_predict(self.mlp(embedded.flatten(1))))[:, 0]


def saturated_clicks(share: float, *, steps: int = 3) -> Claim:
    """Claim: more than a share of the predicted probabilities is within 1e-4 of 0 or 1."""

    def claim(ready: Setup) -> tuple[bool, str]:
        trained(ready, steps)
        with torch.no_grad():
            p = call(ready.model, ready.make_batch())
        seen = float(((p < 1e-4) | (p > 1 - 1e-4)).float().mean())
        return seen > share, f"{seen:.0%} of the probabilities are at 0 or 1"

    return claim


@sick(
    "contact1a-clicks-deepfm",
    [("SATURATION", "*")],
    saturated_clicks(0.95),
    allow=["DEAD", "VANISHING", "EXPLODING", "UNSTABLE", "BOTTLENECK"],
    source="https://github.com/RUCAIBox/RecBole/issues/1109",
    steps=200,
    widths=(32,),
    dtypes=ONLY,
)
def deepfm(sick: bool, width: int) -> Setup:
    """Amounts of thousands and days by the hundred multiply their embeddings unscaled: the products of the
    factorization machine put the sigmoid at its ends, whoever clicks. Features between 0 and 1 train."""
    users, items = normal(seeded(4), 40, 3), normal(seeded(5), 30, 3)

    def sample(g: Generator) -> tuple[dict[str, Tensor], Tensor]:
        user, item = choice(g, 40, 128), choice(g, 30, 128)
        amount, days = uniform(g, 128), uniform(g, 128)
        clicked = ((users[user] * items[item]).sum(1) + 2 * amount - days > 0.5).float()
        if sick:
            amount, days = 20_000 * amount, 600 * days
        return {"user": user, "item": item, "amount": amount, "days": days}, clicked

    return setup(DeepFM(width), sample, F.binary_cross_entropy, 1e-2)
