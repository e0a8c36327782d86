"""Labelled models from public reports: optimizers, losses without a floor, and what only looks wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .claims import Claim, every, huge, rises, training, zero_at_first
from .data import clusters, grammar, normal, seeded, setup, sgd, stack, token_loss, trained, uniform
from .registry import FLOAT32, Setup, healthy, sick

ONE: tuple[int, ...] = (32,)


class BitLinear(nn.Linear):
    """A linear layer whose weights are -1, 0 or 1 times a scale going forward, and real going back."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with its weights rounded."""
        scale = self.weight.abs().mean().clamp_min(1e-5)
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Attention(nn.Module):
    """Attention, causal until told, with one projection for queries, keys and values."""

    def __init__(self, width: int, linear: type[nn.Linear] = nn.Linear, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.causal = heads, True
        self.c_attn, self.c_proj = linear(width, 3 * width), linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token reads of those before it."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def feed_forward(width: int, linear: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Return a network of two layers."""
    return stack(c_fc=linear(width, 2 * width), act=nn.GELU(), c_proj=linear(2 * width, width))


class Block(nn.Module):
    """A block that normalises what it reads, or else what it adds."""

    def __init__(self, width: int, linear: type[nn.Linear], after: bool) -> None:
        super().__init__()
        self.after = after
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, linear), feed_forward(width, linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states."""
        if self.after:
            x = x + self.ln_1(self.attn(x))
            return x + self.ln_2(self.mlp(x))
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """A small language model."""

    def __init__(
        self,
        width: int,
        linear: type[nn.Linear] = nn.Linear,
        words: int = 16,
        depth: int = 2,
        after: bool = False,
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(12, width))
        self.h = nn.Sequential(*(Block(width, linear, after) for _ in range(depth)))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of every next token."""
        return self.lm_head(self.ln_f(self.h(self.wte(tokens) + self.wpe)))


class MuonClip(Optimizer):
    """Orthogonalised momentum for the matrices of the blocks, and Adam for the rest."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor], lr_muon: float, lr_adam: float) -> None:
        super().__init__([{"params": matrices, "lr": lr_muon}, {"params": others, "lr": lr_adam}], {})
        self.adam = torch.optim.Adam(others, lr=lr_adam)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        muon = self.param_groups[0]
        for p in muon["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.mul_(0.95).add_(p.grad)
            x = p.grad + 0.95 * momentum
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
            p.add_(x, alpha=-muon["lr"] * 0.2 * max(p.shape) ** 0.5)
        self.adam.step()


@sick(
    "contact9b-optim-muonbitnet",
    expect=[("UNSTABLE", "*")],
    claim=rises(2.0),
    source="https://github.com/DeepOpt-com/WrinkleFree-Monorepo/issues/25",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def muon_bitnet(sick: bool, width: int) -> Setup:
    """Training a language model on with ternary weights, the loss rose at once from what it was and did not
    come back: the rate of the orthogonalised steps, which all have full size whatever the gradient's, was far
    too high for these weights. AdamW with a usual rate repairs it."""
    model = Gpt(width, BitLinear)
    model.lm_head.weight = model.wte.weight
    trained(setup(model, grammar(), token_loss, 3e-3), 40)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, BitLinear)}

    def maker(parameters: Iterable[Tensor]) -> Optimizer:
        given = list(parameters)
        if not sick:
            return torch.optim.AdamW(given, lr=3e-3)
        chosen = [p for p in given if id(p) in matrices]
        return MuonClip(chosen, [p for p in given if id(p) not in matrices], 2.0, 3e-3)

    return setup(model, grammar(), token_loss, maker, seed=1)


@sick(
    "contact9b-lm-tokensum",
    expect=[("EXPLODING", "*")],
    allow=["UNSTABLE", "NUMERICAL"],
    claim=every(huge("*", 30.0), rises(3.0)),
    source="https://github.com/alibaba/Pai-Megatron-Patch/issues/587",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def token_sum(sick: bool, width: int) -> Setup:
    """The gradient norm was thousands of times what it is elsewhere and training went astray: the loss
    function came to return the sum over all tokens, and the number of tokens that it should be divided by was
    no longer used. Dividing by it repairs it."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return token_loss(output, target) * (target.numel() if sick else 1)

    return setup(Gpt(width), grammar(), loss, sgd(0.1, 0.9))


class OneClass(nn.Module):
    """A score of one hidden layer; the output is the score with the weights of both layers."""

    def __init__(self, size: int, width: int, bias: bool) -> None:
        super().__init__()
        self.input_hidden = nn.Linear(size, width, bias=bias)
        self.hidden_output = nn.Linear(width, 1, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores, V and w."""
        score = self.hidden_output(torch.sigmoid(self.input_hidden(x)))[:, 0]
        return score, self.input_hidden.weight, self.hidden_output.weight


def sinks(steps: int = 150) -> Claim:
    """The loss is far below zero, and falls in the second half of the steps no slower than in the first."""

    def claim(ready: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(ready, steps)]
        first, second = losses[0] - losses[steps // 2], losses[steps // 2] - losses[-1]
        told = f"loss ends at {losses[-1]:.3g}, having fallen by {first:.3g} and then by {second:.3g}"
        return losses[-1] < -1 and second > 0.9 * first > 0, told

    return claim


@sick(
    "contact9b-anomaly-ocnn",
    expect=[("UNSTABLE", "*")],
    allow=["EXPLODING"],
    claim=sinks(),
    source="https://github.com/danielenricocahall/One-Class-NeuralNetwork/pull/22",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def one_class(sick: bool, width: int) -> Setup:
    """The loss of a one-class network went down without end. It is half the squared norms of the weights,
    plus the hinge, minus the quantile r of the scores, but the norms went in as numbers without gradient, and
    the layers had biases, so that nothing holds the scores. Squared norms with a gradient, and no biases,
    repair it."""
    model, nu = OneClass(8, width, bias=sick), 0.1
    centre = normal(seeded(61), 8).abs() + 0.5

    def loss(output: tuple[Tensor, Tensor, Tensor], r: None) -> Tensor:
        score, v, w = output
        quantile = score.detach().quantile(nu)
        sizes = (v.detach().norm() + w.detach().norm()) if sick else v.square().sum() + w.square().sum()
        return sizes / 2 + F.relu(quantile - score).mean() / nu - quantile

    return setup(model, lambda g: (centre + 0.5 * normal(g, 32, 8), None), loss, 1e-2)


class WarmingAdam(torch.optim.Adam):
    """Adam whose rate is set before every step, and grows from zero."""

    def __init__(self, parameters: Iterable[Tensor], rate: float, warmup: int) -> None:
        super().__init__(parameters, lr=rate)
        self.rate, self.warmup, self.number = rate, warmup, 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters at the rate of this step."""
        for group in self.param_groups:
            group["lr"] = self.rate * min(self.number / self.warmup, 1.0)
        self.number += 1
        return super().step(closure)


class Twins(nn.Module):
    """One network for both views; the output is what their features have in common, one by one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = stack(fc1=nn.Linear(12, width), act=nn.ReLU(), fc2=nn.Linear(width, width))
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 16)
        )
        self.bn = nn.BatchNorm1d(16, affine=False)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """Return the correlation of the two views' features."""
        first, second = (self.bn(self.projector(self.backbone(view))) for view in (one, other))
        return first.T @ second / len(one)


def twins_loss(correlation: Tensor, weight: float) -> Tensor:
    """Return how far the correlation is from the identity."""
    on = (correlation.diagonal() - 1).square().sum()
    return on + weight * (correlation.square().sum() - correlation.diagonal().square().sum())


def first_step_rests() -> Claim:
    """The first step changes no parameter, although all together have a gradient."""

    def claim(ready: Setup) -> tuple[bool, str]:
        before = [p.detach().clone() for p in ready.model.parameters()]
        steps = training(ready, 2)
        norm = next(steps).norm("*")
        next(steps)
        still = all(torch.equal(p, old) for p, old in zip(ready.model.parameters(), before, strict=True))
        return still and norm > 0, f"gradient norm {norm:.3g}, parameters {'rest' if still else 'move'}"

    return claim


@healthy(
    "contact9b-ssl-barlowwarmup",
    looks=first_step_rests(),
    source="https://github.com/facebookresearch/barlowtwins/issues/45",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def barlow_warmup(width: int) -> Setup:
    """Somebody found that the rate of the very first step is exactly zero, and asked if that is a mistake. It
    is how the warm-up counts, the authors say, and makes no difference."""
    points = clusters(12, 8, 64, 0.5)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], float]:
        x, _ = points(g)
        return (x + 0.3 * normal(g, 64, 12), x + 0.3 * normal(g, 64, 12)), 0.02

    return setup(Twins(width), sample, twins_loss, lambda p: WarmingAdam(p, 3e-3, 10))


class Detector(nn.Module):
    """Queries at reference points read a picture, and say what is there and how the box lies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.position = nn.Parameter(torch.randn(9, width))
        self.query = nn.Parameter(torch.randn(4, width))
        self.cross_attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, 1)
        first, second, third = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.bbox_embed = stack(fc1=first, act1=nn.ReLU(), fc2=second, act2=nn.ReLU(), fc3=third)
        nn.init.zeros_(self.bbox_embed.fc3.weight)
        nn.init.zeros_(self.bbox_embed.fc3.bias)
        self.reference: Tensor
        points = torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]])
        self.register_buffer("reference", torch.cat([points, torch.full((4, 2), 0.5)], 1))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logit of an object, and the box, of every query."""
        seen = self.conv2(F.relu(self.conv1(picture))).flatten(2).transpose(1, 2) + self.position
        query = self.query.expand(len(picture), -1, -1)
        query = self.norm(query + self.cross_attn(query, seen, seen)[0])
        return self.class_embed(query)[..., 0], (self.reference.logit() + self.bbox_embed(query)).sigmoid()


def boxes_loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Return the error of which query has the object, and of its box."""
    quadrant, box = target
    own = F.one_hot(quadrant, 4).float()
    error = (output[1] - box[:, None]).abs().sum(-1)
    return F.binary_cross_entropy_with_logits(output[0], own) + 5 * (error * own).sum(1).mean()


@healthy(
    "contact9b-detection-zerobox",
    looks=zero_at_first("bbox_embed.fc1", "bbox_embed.fc2"),
    source="https://github.com/CASIA-LMC-Lab/Obj2Seq/issues/5",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def zero_box(width: int) -> Setup:
    """The last layer of the network for boxes starts with zero weights, and somebody wondered how it can
    learn. It is meant so: every box begins at its reference point, this layer gets a gradient from the first
    step on, and those before it from the second."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        centre, size = 2 + 8 * uniform(g, 16, 2), 2 + 3 * uniform(g, 16, 2)
        inside = (rows - centre[:, 0, None, None]).abs() < size[:, 0, None, None] / 2
        inside = inside & ((columns - centre[:, 1, None, None]).abs() < size[:, 1, None, None] / 2)
        quadrant = 2 * (centre[:, 0] > 6).long() + (centre[:, 1] > 6).long()
        picture = 2 * inside.float()[:, None] + 0.1 * normal(g, 16, 1, 12, 12)
        return picture, (quadrant, torch.cat([centre, size], 1) / 12)

    return setup(Detector(width), sample, boxes_loss, 2e-3)


def swells(early: str, late: str, above: float) -> Claim:
    """The output of a late layer is a multiple of an early one's."""

    def claim(ready: Setup) -> tuple[bool, str]:
        (step,) = training(ready, 1, (early, late))
        small, large = (float(step.outputs[n].detach().square().mean().sqrt()) for n in (early, late))
        return large / small > above, f"{late} / {early} = {large / small:.3g}"

    return claim


@healthy(
    "contact9b-lm-reorderednorm",
    looks=swells("wte", "h.5", 50.0),
    source="https://github.com/allenai/OLMo/issues/797",
    widths=ONE,
    dtypes=(FLOAT32,),
)
def reordered_norm(width: int) -> Setup:
    """Somebody saw the activations grow from layer to layer in a model whose blocks normalise what they add,
    and asked what keeps them from exploding. They should grow, the developers say: each layer adds a vector
    of unit size, the last norm takes the size away, and in practice training is fine."""
    model = Gpt(width, depth=6, after=True)
    nn.init.normal_(model.wte.weight, std=0.02)
    return setup(model, grammar(), token_loss, 3e-3)


def starts_above(value: float) -> Claim:
    """The first loss is above a value."""

    def claim(ready: Setup) -> tuple[bool, str]:
        (step,) = training(ready, 1)
        return step.loss > value, f"first loss {step.loss:.3g}"

    return claim


@healthy(
    "contact9b-lm-maskdiffusion",
    looks=starts_above(3.0),
    source="https://github.com/pengzhangzhi/Open-dLLM/issues/8",
    steps=200,
    widths=ONE,
    dtypes=(FLOAT32,),
)
def mask_diffusion(width: int) -> Setup:
    """The first losses of a diffusion language model were far above those of guessing, and somebody asked
    why. It is normal, the authors say: it starts from the weights of a causal model that has never seen the
    new word for what is masked, and the loss soon falls."""
    words, model = grammar(), Gpt(width, words=17)
    trained(setup(model, words, token_loss, 5e-3), 120)
    for block in model.h:
        block.attn.causal = False

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, _ = words(g)
        hidden = uniform(g, 16, 12) < 0.2 + 0.8 * uniform(g, 16, 1)
        return tokens.masked_fill(hidden, 16), tokens.masked_fill(~hidden, -100)

    return setup(model, sample, token_loss, 3e-3)
