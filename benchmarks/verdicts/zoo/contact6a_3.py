"""Models of public reports: spiking networks, an optimizer of one's own on text, flows."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from .claims import every, rises, silent, stuck, training, zero_at_first
from .contact6a_1 import some_digits
from .data import Sample, choice, normal, setup, stack, token_loss
from .registry import FLOAT32, Setup, healthy, sick

# ---------------------------------------------------------------------------------------- spiking networks


class Spike(torch.autograd.Function):
    """A step at zero, whose slope is taken for that of an arc tangent."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + (math.pi * x).square())


class Neurons(nn.Module):
    """Leaky neurons that fire above a threshold and start again from zero; input is (time, batch, units)."""

    def __init__(self, threshold: float = 1.0, keep: float = 0.5) -> None:
        super().__init__()
        self.threshold, self.keep = threshold, keep

    def forward(self, current: Tensor) -> Tensor:
        voltage, spikes = torch.zeros_like(current[0]), []
        for now in current:
            voltage = self.keep * voltage + now
            spikes.append(Spike.apply(voltage - self.threshold))
            voltage = voltage * (1 - spikes[-1].detach())
        return torch.stack(spikes)


class SpikingLayer(nn.Module):
    """Weights, a norm or none, and neurons."""

    def __init__(self, inputs: int, outputs: int, norm: bool, threshold: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs) if norm else nn.Identity()
        self.neurons = Neurons(threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons(self.norm(self.linear(x).flatten(0, 1)).unflatten(0, x.shape[:2]))


class SpikingNet(nn.Module):
    """A picture shown for some time steps, layers of spikes, and their mean rate to a class."""

    def __init__(self, size: int, depth: int, norm: bool, threshold: float = 1.0) -> None:
        super().__init__()
        sizes = [64] + [size] * depth
        self.layers = nn.ModuleList(SpikingLayer(a, b, norm, threshold) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(size, 10)

    def forward(self, picture: Tensor) -> Tensor:
        x = 2 * picture.flatten(1).expand(6, -1, -1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0))


@sick(
    "contact6a-spiking-silent",
    [("DEAD", "layers")],
    every(silent("layers.4", 0.95), stuck(2.2)),
    allow=["VANISHING", "BOTTLENECK"],
    source="https://github.com/fangwei123456/spikingjelly/issues/285",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def spiking_silent(sick: bool, width: int) -> Setup:
    """In a deep spiking network without normalisation fewer neurons fire layer by layer, until none reaches
    its threshold and the head reads zeros. Repair: a batch norm in front of each layer's neurons."""
    return setup(SpikingNet(width, 8, norm=not sick), some_digits(64), F.cross_entropy, 3e-3)


def mostly_quiet(module: str, above: float):
    """More than a share of what a module sends is zero."""

    def claim(setup: Setup) -> tuple[bool, str]:
        sent = next(training(setup, 1, (module,))).outputs[module]
        share = float((sent == 0).float().mean())
        return share > above, f"{share:.0%} of what {module} sends is zero"

    return claim


@healthy("contact6a-spiking-sparse", mostly_quiet("layers.1", 0.85), widths=(64,), dtypes=(FLOAT32,))
def spiking_sparse(width: int) -> Setup:
    """Two layers of neurons with a high threshold behind a norm: spikes are rare, most of what is sent is
    zero, and the few that come tell the digits apart."""
    return setup(SpikingNet(width, 2, norm=True, threshold=1.8), some_digits(64), F.cross_entropy, 3e-3)


# --------------------------------------------------------------------------------- an optimizer of one's own


class OwnAdam(Optimizer):
    """Adam, written again; `doubled` says whether the correction of the bias takes its complement twice."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, doubled: bool) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.8, 0.99), "doubled": doubled})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(count=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["count"] += 1
                first, second = group["betas"]
                state["mean"].lerp_(p.grad, 1 - first)
                state["square"].lerp_(p.grad.square(), 1 - second)
                left = [1 - beta ** state["count"] for beta in group["betas"]]
                if group["doubled"]:
                    left = [1 - part for part in left]
                scale = (state["square"] / left[1]).sqrt() + 1e-8
                p.sub_(group["lr"] / left[0] * state["mean"] / scale)


@functools.cache
def prose() -> Tensor:
    """The help pages that come with Python, as small letters and spaces in numbers below 28."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)).lower()
    return torch.tensor([max(0, min(27, ord(c) - 96)) for c in text if ord(c) < 128])


def snippets(number: int = 16, length: int = 24) -> Sample:
    """Pieces of the text; the target is the next letter at each place."""
    text = prose()

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        start = choice(g, len(text) - length - 1, number, 1)
        whole = text[start + torch.arange(length + 1)]
        return whole[:, :-1], whole[:, 1:]

    return sample


class Letters(nn.Module):
    """A recurrent model of letters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(28, size)
        self.rnn = nn.GRU(size, size, batch_first=True)
        self.norm = nn.LayerNorm(size)
        self.out = nn.Linear(size, 28)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.norm(self.rnn(self.embed(tokens))[0]))


@sick(
    "contact6a-letters-own_adam",
    [("UNSTABLE", "*")],
    rises(1.5, steps=20),
    allow=["EXPLODING", "SATURATION", "NUMERICAL"],
    source="https://github.com/kozistr/pytorch_optimizer/pull/308",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def letters_own_adam(sick: bool, width: int) -> Setup:
    """An optimizer corrects the bias of its moments by one minus one minus a power, so its steps grow from
    one to the next without end. Repair: one minus the power, as it should be."""
    return setup(
        Letters(width), snippets(), token_loss, lambda parameters: OwnAdam(parameters, 1e-2, doubled=sick)
    )


# -------------------------------------------------------------------------------------------------- flows


class Coupling(nn.Module):
    """One half of the features scales and shifts the other."""

    def __init__(self, features: int, size: int, turned: bool) -> None:
        super().__init__()
        self.half, self.turned = features // 2, turned
        self.net = stack(fc_1=nn.Linear(self.half, size), act=nn.ReLU(), fc_2=nn.Linear(size, features))
        nn.init.zeros_(self.net.fc_2.weight)
        nn.init.zeros_(self.net.fc_2.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flip(-1) if self.turned else x
        a, b = x[:, : self.half], x[:, self.half :]
        scale, shift = self.net(a).chunk(2, -1)
        scale = 2 * (scale / 2).tanh()
        return torch.cat([a, b * scale.exp() + shift], -1), scale.sum(-1)


class Flow(nn.Module):
    """Couplings to a standard normal."""

    def __init__(self, features: int, size: int, number: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(features, size, i % 2 == 1) for i in range(number))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, volume = coupling(x)
            total = total + volume
        return total - 0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


@healthy(
    "contact6a-flow-identity",
    zero_at_first(*(f"couplings.{i}.net.fc_1" for i in range(6))),
    widths=(32,),
    dtypes=(FLOAT32,),
)
def flow_identity(width: int) -> Setup:
    """Couplings whose last layers start at zero, so the flow begins as the identity and the first layers get
    no gradient in the first step; their log-scales end in a tanh."""

    def sample(g: Generator) -> tuple[Tensor, None]:
        z = normal(g, 128, 4)
        return torch.cat([z[:, :2], 2 * z[:, :2].sin() + 0.2 * z[:, 2:]], -1), None

    return setup(Flow(4, width, 6), sample, lambda logp, _: -logp.mean(), 3e-3)
