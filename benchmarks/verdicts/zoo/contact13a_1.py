"""Failed trainings from public reports: fine-tuning, preferences, short dtypes, optimizers, quantisation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .claims import Claim, growing, no_gradient, not_finite, rises, training, under, weak
from .data import choice, factors, grammar, normal, setup, stack, surface, token_loss, trained
from .registry import FLOAT32, Setup, sick

ONE = {"widths": (32,), "dtypes": (FLOAT32,)}


def unmoved(*prefixes: str, steps: int = 8) -> Claim:
    """Under each prefix the parameters get a gradient, and are what they were after some steps."""

    def claim(ready: Setup) -> tuple[bool, str]:
        named = dict(ready.model.named_parameters())
        before = {n: p.detach().clone() for n, p in named.items()}
        last = [step.norm("*") for step in training(ready, steps)][-1]
        moved = {
            prefix: max(float((named[n] - before[n]).detach().abs().max()) for n in named if under(n, prefix))
            for prefix in prefixes
        }
        told = ", ".join(f"{n} {x:.2g}" for n, x in moved.items())
        return last > 0 and not any(moved.values()), f"largest change in {steps} steps: {told}"

    return claim


def slows(prefix: str, below: float, *, steps: int = 20) -> Claim:
    """A part's steps, which Adam makes of one size, are far shorter at the end than at the beginning."""

    def claim(ready: Setup) -> tuple[bool, str]:
        named = {n: p for n, p in ready.model.named_parameters() if under(n, prefix)}
        moves, last = [], {n: p.detach().clone() for n, p in named.items()}
        for _ in training(ready, steps):
            moves.append(sum(float((p.detach() - last[n]).norm()) for n, p in named.items()))
            last = {n: p.detach().clone() for n, p in named.items()}
        ratio = sum(moves[-4:]) / sum(moves[1:5])
        return ratio < below, f"length of the steps of {prefix}, late / early = {ratio:.2g}"

    return claim


class WordModel(nn.Module):
    """Words to states of a GRU to scores of the next word, by the same matrix as the words."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.rnn = nn.GRU(width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(tokens))
        return F.linear(states, self.embed.weight)


@sick(
    "contact13a-finetune-resize",
    [("DEAD", "embed")],
    unmoved("embed"),
    allow=("UNSTABLE",),
    source="https://github.com/huggingface/transformers/pull/3532",
    **ONE,
)
def finetune_resize(sick: bool, width: int) -> Setup:
    """New words were added after the optimizer had got its parameters: it holds the word matrix from before,
    and the new one, which has a gradient, never moves. Repair: make the optimizer afterwards."""
    model = WordModel(16, width)
    trained(setup(model, grammar(16), token_loss), 30)
    early = list(model.parameters())
    larger = nn.Embedding(20, width)
    with torch.no_grad():
        larger.weight.mul_(0.3)
        larger.weight[:16] = model.embed.weight
    model.embed = larger
    return setup(
        model,
        grammar(20),
        token_loss,
        trains=(lambda: early) if sick else model.parameters,
    )


class Scorer(nn.Module):
    """The sum of the log probabilities of the words of padded sequences, each word from the one before."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, words)

    def sums(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.hidden(self.embed(tokens[:, :-1]))))
        picked = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return (picked * mask[:, 1:]).sum(1)

    def forward(self, chosen: Tensor, kept: Tensor, rejected: Tensor, short: Tensor) -> Tensor:
        return self.sums(chosen, kept) - self.sums(rejected, short)


@sick(
    "contact13a-preference-exponential",
    [("NUMERICAL", "*")],
    not_finite(3, loss=True),
    source="https://github.com/unslothai/unsloth-zoo/pull/1241",
    **ONE,
)
def preference_exponential(sick: bool, width: int) -> Setup:
    """A preference loss mixes exp(-margin) with the weight sigmoid(margin / 0.05). Wanted answers are longer,
    so margins of summed log probabilities are below -90: the exponential is infinite, its weight zero, and
    their product NaN. Repair: take the product as one exponential of a sum of logarithms."""
    words, most, number = 20, 48, 16

    def sequences(g: Generator, shortest: int, longest: int, step: int) -> tuple[Tensor, Tensor]:
        length = shortest + choice(g, longest - shortest, number)
        begin = choice(g, words, number, 1)
        tokens = (begin + step * torch.arange(most)) % words
        noise = choice(g, words, number, most)
        tokens = torch.where(torch.rand(number, most, generator=g) < 0.1, noise, tokens)
        return tokens, (torch.arange(most) < length[:, None]).float()

    def sample(g: Generator) -> tuple[Any, Any]:
        return (*sequences(g, 36, 48, 1), *sequences(g, 4, 10, 3)), None

    def loss(margin: Tensor, _: Any) -> Tensor:
        share = torch.sigmoid(margin / 0.05)
        logistic = -F.logsigmoid(margin) * (1 - share)
        if sick:
            return (logistic + torch.exp(-margin) * share).mean()
        return (logistic + torch.exp(-margin + F.logsigmoid(margin / 0.05))).mean()

    return setup(Scorer(words, width), sample, loss)


@sick(
    "contact13a-halfprecision-mean",
    [("NUMERICAL", "*")],
    no_gradient("*"),
    allow=("DEAD", "VANISHING"),
    source="https://github.com/chelsea0x3b/dfdx/issues/748",
    **ONE,
)
def halfprecision_mean(sick: bool, width: int) -> Setup:
    """The loss is the sum of squared errors over 73728 numbers, divided by their count in half precision,
    where 73728 is infinity: the loss and all gradients are exactly zero. Repair: take the mean in float32."""
    size, number = 288, 256
    source = factors(size, 6, number)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, _ = source(g)
        return 0.5 * x, 0.5 * x

    def loss(output: Tensor, target: Tensor) -> Tensor:
        errors = (output - target).square()
        if sick:
            errors = errors.half()
            return errors.sum() / torch.tensor(float(errors.numel()), dtype=torch.half)
        return errors.mean()

    model = stack(encode=nn.Linear(size, width), act=nn.ReLU(), decode=nn.Linear(width, size))
    return setup(model, sample, loss)


class Merged(nn.Module):
    """A frozen linear layer to whose weight a scaled A A' is added, in bfloat16."""

    def __init__(self, width: int, rank: int, ramp: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a = nn.Parameter(0.15 * torch.randn(width, rank))
        self.ramp = ramp
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        factor = min(self.step / self.ramp, 1.0) if self.ramp else 1.0
        self.step += self.training
        weight = self.base.weight.bfloat16() + (2 * factor * self.a @ self.a.T).bfloat16()
        return F.linear(x.bfloat16(), weight, self.base.bias.bfloat16()).float()


@sick(
    "contact13a-adapter-ramp",
    [("VANISHING", "blocks")],
    weak("blocks", "head", 0.02, steps=8),
    allow=("NUMERICAL", "DEAD"),
    source="https://github.com/kyegomez/SingLoRA/issues/6",
    **ONE,
)
def adapter_ramp(sick: bool, width: int) -> Setup:
    """Adapters A A' on a frozen net in bfloat16 are multiplied by a factor that climbs from 0 to 1 over 1000
    steps: what they add is lost to rounding, and their gradients are zero at first and a hundredth of what
    they should be for long. Repair: no ramp."""
    blocks = nn.Sequential(*(layer for _ in range(3) for layer in (Merged(width, 4, 1000 * sick), nn.Tanh())))
    model = stack(inp=nn.Linear(12, width).requires_grad_(False), blocks=blocks, head=nn.Linear(width, 1))
    return setup(model, surface(12, 64), F.mse_loss)


class Bounded(torch.optim.Optimizer):
    """AdaBound: Adam whose rate for each weight is kept between two bounds that close in."""

    def __init__(self, params: Iterable[Tensor], rate: float, wrong: bool) -> None:
        super().__init__(params, {"lr": rate})
        self.wrong, self.t = wrong, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.t += 1
        first, second = 1 - 0.9**self.t, 1 - 0.999**self.t
        low, high = 0.1 * (1 - 1 / (1e-3 * self.t + 1)), 0.1 * (1 + 1 / (1e-3 * self.t))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = self.state[p]
                m = kept.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                v = kept.setdefault("v", torch.zeros_like(p)).lerp_(p.grad.square(), 0.001)
                size = group["lr"] * math.sqrt(1 - second if self.wrong else second) / first
                p.sub_((size / (v.sqrt() + 1e-8)).clamp(low, high) * m)


@sick(
    "contact13a-optimizer-correction",
    [("UNSTABLE", "*")],
    rises(1.5),
    allow=("EXPLODING", "SATURATION"),
    source="https://github.com/kozistr/AdaBound-tensorflow/issues/3",
    **ONE,
)
def optimizer_correction(sick: bool, width: int) -> Setup:
    """AdaBound's step takes the root of 1 - (1 - b2^t) for that of 1 - b2^t, so the first steps are thirty
    times too long, and fine-tuning begins by undoing what was learned. Repair: take the root of the
    bias correction itself."""
    model = stack(
        a=nn.Linear(16, width), r1=nn.ReLU(), b=nn.Linear(width, width), r2=nn.ReLU(), c=nn.Linear(width, 1)
    )
    trained(setup(model, surface(16, 64), F.mse_loss), 150)
    return setup(model, surface(16, 64, shift=0.3), F.mse_loss, lambda p: Bounded(p, 2e-3, sick))


class Layerwise(torch.optim.AdamW):
    """AdamW with a smaller rate for earlier layers, set once or, wrongly, again at each step."""

    def __init__(self, groups: list[dict[str, Any]], rate: float, again: bool) -> None:
        super().__init__(groups, lr=rate, weight_decay=0.01)
        self.again = again
        if not again:
            self._scale()

    def _scale(self) -> None:
        for group in self.param_groups:
            group["lr"] *= group["scale"]

    def step(self, closure: Any = None) -> Any:
        if self.again:
            self._scale()
        return super().step(closure)


@sick(
    "contact13a-optimizer-layerdecay",
    [("UNSTABLE", "*")],
    slows("blocks", 0.03),
    allow=("DEAD", "VANISHING"),
    source="https://github.com/jaehyunnn/ViTPose_pytorch/issues/20",
    **ONE,
)
def optimizer_layerdecay(sick: bool, width: int) -> Setup:
    """The layer-wise factors of the rate, 0.75 to a power, are applied at every step, not once: the rates of
    all layers but the head are zero after some steps. Repair: apply them when the optimizer is made."""
    blocks = nn.Sequential(
        *(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
    )
    model = stack(embed=nn.Linear(6, width), blocks=blocks, head=nn.Linear(width, 1))
    mix = normal(torch.Generator().manual_seed(3), 6)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 16, 8, 6)
        weights = (x @ mix).softmax(1)[..., None]
        return x, 4 * weights * (x[..., :1] - (weights * x[..., :1]).sum(1, keepdim=True))

    def make(_: Iterable[Tensor]) -> torch.optim.Optimizer:
        parts = [model.embed, *blocks, model.head]
        groups = [
            {"params": list(part.parameters()), "scale": 0.75 ** (len(parts) - 1 - i)}
            for i, part in enumerate(parts)
        ]
        return Layerwise(groups, 5e-3, sick)

    return setup(model, sample, F.mse_loss, make)


class FewBits(nn.Linear):
    """A linear layer whose weights are rounded to sixteen levels from -1 to 1, by tanh and the largest."""

    def __init__(self, inputs: int, outputs: int, scaled: bool) -> None:
        super().__init__(inputs, outputs)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        bent = torch.tanh(self.weight)
        largest = bent.detach().abs().max()
        unit = bent / (2 * largest) + 0.5
        few = 2 * (unit + ((unit * 15).round() / 15 - unit).detach()) - 1
        return F.linear(x, few * largest if self.scaled else few, self.bias)


@sick(
    "contact13a-quantisation-unscaled",
    [("EXPLODING", "body")],
    growing("body.0", "body.10", 30.0),
    allow=("UNSTABLE", "SATURATION", "NUMERICAL"),
    source="https://github.com/zzzxxxttt/pytorch_DoReFaNet/issues/9",
    **ONE,
)
def quantisation_unscaled(sick: bool, width: int) -> Setup:
    """Weights of four bits are stretched to reach from -1 to 1 and not scaled back: each layer multiplies
    activations and gradients some times over. Repair: multiply by the largest weight after rounding."""
    layers: list[nn.Module] = []
    for i in range(6):
        layers += [FewBits(16 if i == 0 else width, width, not sick), nn.ReLU()]
    model = stack(body=nn.Sequential(*layers), head=nn.Linear(width, 1))
    return setup(model, surface(16, 64), F.mse_loss, 3e-3)
