"""Language models and their optimizers, after public reports of training trouble."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import Claim, fades_in_time, no_gradient, not_finite, rises, training
from .data import Sample, adam, choice, frozen, grammar, normal, seeded, setup, token_loss, trained
from .registry import FLOAT32, Setup, sick


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with a gain."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed input."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Causal self-attention, whose queries and keys may be normed per head."""

    def __init__(self, dim: int, heads: int = 2, *, qk_norm: bool = False, use: bool = True) -> None:
        super().__init__()
        self.heads, self.use = heads, use and qk_norm
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return what every position gathers from those before it."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.use:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, *, qk_norm: bool = False, use: bool = True) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, qk_norm=qk_norm, use=use)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after attention and feed-forward."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A small decoder-only language model."""

    def __init__(
        self, vocab: int, dim: int, context: int = 12, *, qk_norm: bool = False, use: bool = True
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.h = nn.ModuleList(Block(dim, qk_norm=qk_norm, use=use) for _ in range(2))
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at every position."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


# ------------------------------------------------------------------- odds-ratio preference optimisation


def _questions(g: Generator) -> tuple[Tensor, Tensor]:
    prompt = 3 + choice(g, 12, 32, 6)
    return prompt, 1 + (prompt[:, 0] % 2)


@sick(
    "contact12b-orpo-odds",
    [("NUMERICAL", "*")],
    not_finite(20),
    source="https://github.com/huggingface/trl/pull/5339",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def orpo(sick: bool, width: int) -> Setup:
    """Odds-ratio tuning of a yes/no model that is sure already: its half-precision log-probability of the
    answer rounds to 0, and log(1 - exp(0)) is minus infinity. Repair: float32, kept below -1e-6."""
    model = GPT(16, width, 6)

    def sft(logits: Tensor, answer: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, -1], answer)

    trained(setup(model, _questions, sft, 1e-2, seed=3), 42)

    def log1mexp(x: Tensor) -> Tensor:
        return torch.log1p(-torch.exp(x)) if sick else torch.log(-torch.expm1(x))

    def loss(logits: Tensor, answer: Tensor) -> Tensor:
        logps = logits[:, -1].to(torch.bfloat16).log_softmax(-1)
        chosen = logps.gather(1, answer[:, None])[:, 0]
        rejected = logps.gather(1, 3 - answer[:, None])[:, 0]
        if not sick:
            chosen, rejected = chosen.float().clamp(max=-1e-6), rejected.float().clamp(max=-1e-6)
        odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        return sft(logits, answer) - 0.1 * F.logsigmoid(odds.float()).mean()

    return setup(model, _questions, loss, 2e-3)


# --------------------------------------------------------------------------------------- norms left out


def _echo(g: Generator) -> tuple[Tensor, Tensor]:
    tokens = choice(g, 16, 16, 15)
    return tokens[:, 3:], tokens[:, 1:-2]


@sick(
    "contact12b-attn-qknorm",
    [("DEAD", "h.0.attn.q_norm"), ("DEAD", "h.1.attn.k_norm")],
    no_gradient("h.0.attn.q_norm", "h.0.attn.k_norm", "h.1.attn.q_norm", "h.1.attn.k_norm"),
    allow=["SATURATION"],
    source="https://github.com/Cerebras/modelzoo/pull/85",
    steps=250,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def qk_norm(sick: bool, width: int) -> Setup:
    """The query and key norms are made, but the forward pass never calls them, so that their gains get no
    gradient, and large projections make the attention one-hot. Repair: apply them before the scores."""
    model = GPT(16, width, qk_norm=True, use=not sick)
    with torch.no_grad():
        for block in model.h:
            block.attn.qkv.weight[: 2 * width].mul_(40)
    return setup(model, _echo, token_loss, 5e-3)


# ----------------------------------------------------------------------------- weights stored in bfloat16


def unmoved(share: float, steps: int = 20) -> Claim:
    """More than a share of the parameters that get a gradient is bit for bit the same after some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        before = {n: p.detach().clone() for n, p in setup.model.named_parameters()}
        *_, last = training(setup, steps)
        same, total = 0, 0
        for name, parameter in setup.model.named_parameters():
            grad = last.grads.get(name)
            if grad is not None:
                live = grad != 0
                same += int(((parameter == before[name]) & live).sum())
                total += int(live.sum())
        return same > share * total, f"{same / max(total, 1):.0%} of the parameters never move"

    return claim


class HalfGPT(nn.Module):
    """A language model that computes in bfloat16, with a head tied to the embedding."""

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, dim)
        self.ln = nn.LayerNorm(dim)
        self.rnn = nn.Linear(2 * dim, dim)
        nn.init.normal_(self.rnn.weight, std=0.5)
        self.out = nn.Embedding(vocab, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token from the last two."""
        with torch.autocast("cpu", torch.bfloat16):
            x = self.wte(tokens).to(torch.bfloat16)
            x = torch.cat([x, F.pad(x, (0, 0, 1, 0))[:, :-1]], -1)
            x = torch.tanh(self.rnn(self.ln(x.view(*x.shape[:-1], 2, -1)).flatten(-2)))
            return F.linear(x, self.out.weight).float() / math.sqrt(x.shape[-1])


@sick(
    "contact12b-lm-master",
    [("NUMERICAL", "*")],
    unmoved(0.6),
    source="https://github.com/workofart/ml-by-hand/pull/85",
    steps=500,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def master(sick: bool, width: int) -> Setup:
    """The weights are stored in bfloat16 alone: a step of Adam at 6e-4 is less than half of the spacing of
    numbers near one, and rounding undoes it. Repair: a float32 master copy, cast for the computation."""
    model = HalfGPT(16, width)
    if sick:
        model.to(torch.bfloat16)
    return setup(model, grammar(), token_loss, 6e-4)


# ------------------------------------------------------------------------------- a soft prompt in float16


class Prompted(nn.Module):
    """A frozen half-precision sentence encoder with trigger vectors in front of the text."""

    def __init__(self, dim: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 2, 2 * dim, dropout=0.0, batch_first=True)
        self.embed = frozen(nn.Embedding(24, dim).half())
        self.encoder = frozen(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).half())
        self.trigger = nn.Parameter(torch.randn(1, 4, dim).to(dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embedding of the text behind the trigger."""
        x = torch.cat([self.trigger.half().expand(len(tokens), -1, -1), self.embed(tokens)], 1)
        return self.encoder(x).float().mean(1)


@sick(
    "contact12b-prompt-half",
    [("NUMERICAL", "*")],
    not_finite(8),
    source="https://github.com/matanbt/TROPT/pull/8",
    steps=150,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def soft_prompt(sick: bool, width: int) -> Setup:
    """The prompt has the encoder's float16, and so has Adam's state: squares of small gradients and the
    epsilon of 1e-8 are zero in it, and the step divides by zero. Repair: a float32 prompt, cast to half."""
    model = Prompted(width, dtype=torch.float16 if sick else FLOAT32)
    aim = normal(seeded(5), width)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return choice(g, 24, 16, 8), aim

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 0.02 * (1 - F.cosine_similarity(output, target, dim=-1)).mean()

    return setup(model, sample, loss, 2e-2)


# ------------------------------------------------------------------------------------------ Muon's rate


class Plain(nn.Module):
    """A language model all of whose parameters are matrices."""

    def __init__(self, vocab: int, dim: int, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.attn = nn.ModuleList(Attention(dim) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(dim, 2 * dim, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * dim, dim, bias=False) for _ in range(layers))
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at every position."""
        x = self.embed(tokens)
        for attn, up, down in zip(self.attn, self.up, self.down, strict=True):
            x = x + attn(F.rms_norm(x, x.shape[-1:]))
            x = x + down(F.relu(up(F.rms_norm(x, x.shape[-1:]))).square())
        return self.head(F.rms_norm(x, x.shape[-1:]))


@sick(
    "contact12b-muon-rate",
    [("UNSTABLE", "*")],
    rises(1.5),
    allow=["EXPLODING"],
    source="https://github.com/KellerJordan/Muon/issues/49",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def muon(sick: bool, width: int) -> Setup:
    """Muon at a rate copied from elsewhere that is far too high here: its steps do not shrink with the
    gradient, each turns whole matrices, and the loss climbs. Repair: a rate as one would give AdamW."""

    def make(parameters: Iterable[Tensor]) -> Optimizer:
        return torch.optim.Muon(parameters, lr=1.0 if sick else 5e-3, weight_decay=0.0)

    return setup(Plain(16, width), grammar(), token_loss, make)


# ------------------------------------------------------------------------------- a memory of one symbol


class Unit(nn.Module):
    """A recurrent trace unit: a running sum with a learned decay per channel, and a gated read-out."""

    def __init__(self, dim: int, start: Tensor) -> None:
        super().__init__()
        self.decay = nn.Parameter(start)
        self.inp, self.gate, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated trace of the sequence."""
        keep = torch.sigmoid(self.decay)
        state, seen = torch.zeros_like(x[:, 0]), []
        drive = self.inp(x) * torch.sqrt(1 - keep**2)
        for t in range(x.shape[1]):
            state = keep * state + drive[:, t]
            seen.append(state)
        return x + self.out(torch.stack(seen, 1) * torch.sigmoid(self.gate(x)))


class Traces(nn.Module):
    """Two trace units over symbols; the class is read at the end."""

    def __init__(self, dim: int, *, spread: bool) -> None:
        super().__init__()
        start = torch.logspace(0, 2.3, dim).log() if spread else torch.zeros(dim)
        self.embed = nn.Embedding(12, dim)
        self.layers = nn.Sequential(*(Unit(dim, start.clone()) for _ in range(2)))
        self.head = nn.Linear(dim, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the class from the last position."""
        return self.head(self.layers(self.embed(tokens))[:, -1])


def _brackets(length: int) -> Sample:
    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, kind = 4 + choice(g, 8, 32, length), choice(g, 4, 32)
        tokens[:, 0] = kind
        return tokens, kind

    return sample


@sick(
    "contact12b-rtu-halflife",
    [("VANISHING", "*")],
    fades_in_time("layers", 1e-3),
    source="https://github.com/jrz97619761/test-model-thing/issues/3",
    steps=200,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def half_life(sick: bool, width: int) -> Setup:
    """All decays start at sigmoid(0): a memory of one symbol, so that what must be kept for forty symbols
    gets no gradient in time. Repair: decays spread up to 0.995, half-lives from one symbol to hundreds."""
    return setup(Traces(width, spread=not sick), _brackets(40), nn.functional.cross_entropy, adam(5e-3))
