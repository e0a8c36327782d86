"""Language models: routing of experts, preference tuning, a custom stop penalty; and an autoencoder."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from . import data
from .claims import Claim, not_finite, training, weak
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}
IGNORE = -100


class Attention(nn.Module):
    """Causal self-attention with separate projections."""

    def __init__(self, width: int, heads: int = 4, *, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        number, length, width = x.shape
        shape = (number, length, self.heads, width // self.heads)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self.o_proj(mixed.transpose(1, 2).reshape(number, length, width))


class FeedForward(nn.Module):
    """The gated feed-forward part of a decoder layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """A layer that normalises before attention and before the feed-forward part."""

    def __init__(self, width: int, mlp: nn.Module, *, bias: bool = False) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width)
        self.self_attn = Attention(width, bias=bias)
        self.post_attention_layernorm = nn.RMSNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """A small decoder-only language model; `mlps` are the feed-forward parts of its layers."""

    def __init__(self, words: int, width: int, mlps: list[nn.Module], *, bias: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList(DecoderLayer(width, mlp, bias=bias) for mlp in mlps)
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def small_lm(words: int, width: int, layers: int = 2, *, bias: bool = False) -> CausalLM:
    """Return a dense language model."""
    return CausalLM(words, width, [FeedForward(width, 2 * width) for _ in range(layers)], bias=bias)


# ------------------------------------------------------------------------------- mixtures of experts


class TopOneMoE(nn.Module):
    """A gate that sends every token to its best expert and weighs the answer by the gate's probability."""

    def __init__(self, width: int, experts: int, *, norm_topk_prob: bool) -> None:
        super().__init__()
        self.norm_topk_prob = norm_topk_prob
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = self.gate(tokens).softmax(-1).topk(1, dim=-1)
        if self.norm_topk_prob:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = (chosen[:, 0] == number).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, expert(tokens[mine]) * weight[mine])
        return out.view_as(x)


@sick(
    "contact7b-llm-topone",
    [("DEAD", "layers.1.mlp.gate")],
    weak("layers.1.mlp.gate", "layers.1.mlp.experts", 1e-5),
    allow=["VANISHING"],
    source="https://github.com/jingyaogong/minimind/issues/858",
    **ONE,
)
def topone(sick: bool, width: int) -> Setup:
    """With one expert per token, dividing the kept probability by its own sum always gives one, so nothing
    but rounding reaches the gate and experts never specialise. Not renormalising where one expert is kept
    lets the gate learn from the language loss."""
    moe = TopOneMoE(width, 4, norm_topk_prob=sick)
    model = CausalLM(16, width, [FeedForward(width, 2 * width), moe])
    return data.setup(model, data.grammar(), data.token_loss, 3e-3)


class SigmoidRouter(nn.Module):
    """Sigmoid scores; a bias that is moved by load, not by gradient, may help to choose the expert."""

    def __init__(self, width: int, experts: int, speed: float) -> None:
        super().__init__()
        self.speed = speed
        self.gate = nn.Linear(width, experts, bias=False)
        self.register_buffer("expert_bias", torch.zeros(experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(tokens).sigmoid()
        chosen = (scores + self.expert_bias).argmax(-1)
        if self.training and self.speed:
            load = torch.bincount(chosen, minlength=scores.shape[1]).float()
            step = torch.sign(load.mean() - load)
            self.expert_bias += self.speed * (step - step.mean())
        return scores.gather(1, chosen[:, None]), chosen


class RoutedMoE(nn.Module):
    """A shared expert and routed ones, one of which answers for each token."""

    def __init__(self, width: int, experts: int, speed: float) -> None:
        super().__init__()
        self.router = SigmoidRouter(width, experts, speed)
        self.experts = nn.ModuleList(FeedForward(width, width) for _ in range(experts))
        self.shared_expert = FeedForward(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(tokens)
        out = self.shared_expert(tokens)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, expert(tokens[mine]) * weight[mine])
        return out.view_as(x)


def idle_experts(prefix: str, number: int, *, steps: int = 20) -> Claim:
    """At least so many of the experts under a prefix get no gradient in any of some steps."""

    def claim(setup: Setup) -> tuple[bool, str]:
        names = [n for n, _ in setup.model.get_submodule(prefix).named_children()]
        busy: set[str] = set()
        for step in training(setup, steps):
            busy |= {n for n in names if step.norm(f"{prefix}.{n}") > 0}
        idle = len(names) - len(busy)
        return idle >= number, f"{idle} of {len(names)} experts get no gradient in {steps} steps"

    return claim


@sick(
    "contact7b-moe-collapse",
    [("DEAD", "layers.0.mlp.experts")],
    idle_experts("layers.0.mlp.experts", 2),
    allow=["BOTTLENECK"],
    source="https://github.com/pytorch/torchtitan/issues/1246",
    **ONE,
)
def collapse(sick: bool, width: int) -> Setup:
    """As training goes on the router sends all tokens of a layer to the same expert, and the others get
    nothing to learn from. A bias per expert, raised for those that get few tokens and lowered for those that
    get many, spreads the load."""
    moe = RoutedMoE(width, 4, 0.0 if sick else 0.005)
    model = CausalLM(16, width, [moe, FeedForward(width, 2 * width)])
    # the tokens share a large direction, as hidden states of trained models do, so one expert suits all
    nn.init.normal_(model.embed_tokens.weight, mean=1.0, std=0.3)
    ready = data.setup(model, data.grammar(certain=0.97, number=32), data.token_loss, 1e-3)
    return data.trained(ready, 60)


# ---------------------------------------------------------------------------------- preference tuning


class PreferencePair(nn.Module):
    """The policy that is tuned and the frozen reference it is compared with."""

    def __init__(self, policy: CausalLM) -> None:
        super().__init__()
        self.policy = policy
        self.reference = data.frozen(copy.deepcopy(policy))

    def forward(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        ids = torch.cat([chosen, rejected])
        with torch.no_grad():
            reference = self.reference(ids)
        return {"policy": self.policy(ids), "reference": reference}


def preference_pairs(words: int, number: int, prompt: int, answer: int, *, limit: int) -> data.Sample:
    """Prompts of random length with a good and a bad answer, cut at a limit; the target is the labels."""
    good = data.grammar(words, answer, number, certain=0.95)

    def sample(g: Generator) -> tuple[Any, Any]:
        length = torch.randint(2, prompt + 1, (number,), generator=g)
        length[data.uniform(g, number) < 0.05] = limit  # a prompt that leaves no room for the answer
        rows: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
        labels: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
        answers = {"chosen": good(g)[0], "rejected": data.choice(g, words, number, answer)}
        asked = data.choice(g, words, number, limit)
        for kind, given in answers.items():
            for row in range(number):
                ids = torch.cat([asked[row, : length[row]], given[row]])[:limit]
                wanted = ids.clone()
                wanted[: length[row]] = IGNORE
                rows[kind].append(F.pad(ids, (0, limit - len(ids))))
                labels[kind].append(F.pad(wanted, (0, limit - len(ids)), value=IGNORE))
        target = torch.stack(labels["chosen"] + labels["rejected"])
        return (torch.stack(rows["chosen"]), torch.stack(rows["rejected"])), target

    return sample


def mean_logps(logits: Tensor, labels: Tensor, least: int) -> Tensor:
    """Return the mean log-probability of each row's labels that count."""
    wanted, logits = labels[:, 1:], logits[:, :-1]
    counts = wanted != IGNORE
    logps = logits.log_softmax(-1).gather(2, wanted.masked_fill(~counts, 0)[..., None])[..., 0]
    return (logps * counts).sum(-1) / counts.sum(-1).clamp(min=least)


@sick(
    "contact7b-dpo-emptyanswer",
    [("NUMERICAL", "*")],
    not_finite(12, loss=True),
    source="https://github.com/allenai/open-instruct/pull/1685",
    **ONE,
)
def emptyanswer(sick: bool, width: int) -> Setup:
    """A prompt that fills the whole length leaves a row with every label ignored; its mean log-probability is
    zero over zero, which makes the preference loss and all gradients NaN. Counting at least one label gives
    such a row a plain zero."""
    ready = data.setup(small_lm(16, width), data.grammar(), data.token_loss, 3e-3)
    model = PreferencePair(data.trained(ready, 20).model)

    def dpo(output: dict[str, Tensor], labels: Tensor) -> Tensor:
        policy, reference = (mean_logps(output[k], labels, 0 if sick else 1) for k in ("policy", "reference"))
        chosen, rejected = (policy - reference).chunk(2)
        return -F.logsigmoid(2.0 * (chosen - rejected)).mean()

    return data.setup(model, preference_pairs(16, 12, 8, 8, limit=16), dpo, 1e-3)


# ------------------------------------------------------------------------------------ a custom penalty


@sick(
    "contact7b-llm-stoppenalty",
    [("NUMERICAL", "*")],
    not_finite(6),
    source="https://foreai.co/blog/nans-out-of-nowhere-the-trick-that-saved-my-training-run",
    **ONE,
)
def stoppenalty(sick: bool, width: int) -> Setup:
    """A fine-tuning loss adds the logarithm of one minus the probability of the stop token, taken from the
    softmax; where the model is sure of stopping this is the logarithm of zero. Writing it as a difference of
    two logsumexp keeps it finite."""
    words, length, stop = 16, 10, 0
    model = small_lm(words, width)
    plain = data.grammar(words, length, 16)

    def stopping(g: Generator) -> tuple[Tensor, Tensor]:
        ids, after = plain(g)
        return ids, torch.where((ids > 11) | (ids == stop), stop, after)

    first = data.setup(model, stopping, data.token_loss, 1e-2)
    data.trained(first, 150)
    with torch.no_grad():
        model.lm_head.weight *= 3.0  # as sure of its next tokens as a large pretrained model is

    def penalised(logits: Tensor, target: Tensor) -> Tensor:
        go_on = (target != stop).float()
        if sick:
            p_stop = logits.softmax(-1)[..., stop]
            log_go = torch.log(1 - p_stop)
        else:
            log_go = logits[..., stop + 1 :].logsumexp(-1) - logits.logsumexp(-1)
        return data.token_loss(logits, target) - 0.5 * (go_on * log_go).sum() / go_on.sum()

    return data.setup(model, data.grammar(words, length, 16), penalised, 3e-3)


# ---------------------------------------------------------------------------------------- autoencoder


class VAE(nn.Module):
    """A variational autoencoder of expression profiles."""

    def __init__(self, genes: int, width: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(genes, width), nn.ReLU())
        self.mu = nn.Linear(width, latent)
        self.logvar = nn.Linear(width, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, genes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        return self.decoder(z), mu, logvar


def uninformed(nats: float, explained: float) -> Claim:
    """The code tells less than some nats of a sample, and reconstructions explain little of what differs."""

    def claim(setup: Setup) -> tuple[bool, str]:
        x = setup.make_batch()
        again, mu, logvar = setup.model(x)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean().item()
        error, spread = (x - again).square().mean(), (x - x.mean(0)).square().mean()
        share = 1 - float(error / spread)
        return kl < nats and share < explained, f"the code tells {kl:.2g} nats, explains {share:.0%}"

    return claim


@sick(
    "contact7b-vae-klsum",
    [("BOTTLENECK", "*")],
    uninformed(0.05, 0.05),
    allow=["DEAD", "VANISHING"],
    source="https://github.com/zdebruine/MMVAE/pull/19",
    **ONE,
)
def klsum(sick: bool, width: int) -> Setup:
    """The squared error is averaged over genes and samples while the KL term is summed over all of them, so
    the KL term falls to zero, the code says nothing of the sample and every reconstruction is the mean. A sum
    over genes and a mean over samples for both terms repairs it."""
    genes = 40
    profiles = data.factors(genes, 4, 64)

    def cells(g: Generator) -> tuple[Tensor, Tensor]:
        x = 0.5 + profiles(g)[0]
        return x, x

    def elbo(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        again, mu, logvar = output
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
        if sick:
            return F.mse_loss(again, x) + kl
        return F.mse_loss(again, x, reduction="sum") / len(x) + kl / len(x)

    return data.trained(data.setup(VAE(genes, width, 6), cells, elbo, 3e-3), 60)
