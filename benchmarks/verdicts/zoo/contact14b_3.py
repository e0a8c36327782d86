"""Trainings after public reports: recommenders, metric learning, adapters, physics, critics and more."""

from __future__ import annotations

import itertools

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from .claims import Claim, fading, huge, rank_below, training
from .contact14b_1 import ONE, Speaker, louder, outside, unmoved
from .data import (
    choice,
    clusters,
    frozen,
    grammar,
    normal,
    seeded,
    setup,
    sgd,
    stack,
    token_loss,
    trained,
    uniform,
)
from .registry import Setup, sick

# ------------------------------------------------------------------------------------- recommenders


class SessionConv(nn.Module):
    """Layers over a session's items, kept in a dictionary: a plain one, or one that registers them."""

    def __init__(self, width: int, plain: bool, depth: int = 2) -> None:
        super().__init__()
        layers = {f"w{i}": nn.Linear(width, width, bias=False) for i in range(depth)}
        self.layers = layers if plain else nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + torch.tanh(layer(x)).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x


class Sessions(nn.Module):
    """Scores of the next item of a session."""

    def __init__(self, items: int, width: int, plain: bool) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.conv = SessionConv(width, plain)
        self.out = nn.Linear(width, items)

    def forward(self, session: Tensor) -> Tensor:
        return self.out(self.conv(self.items(session)))


@sick(
    "contact14b-session-dict",
    [("DEAD", "conv")],
    outside(),
    source="https://github.com/xiaxin1998/COTREC/issues/15",
    **ONE,
)
def session_dict(ill: bool, width: int) -> Setup:
    """A session recommender that keeps its convolution's layers in a plain dictionary: parameters() does not
    know them, so no optimizer ever updates them. Repaired by a ModuleDict."""
    return setup(Sessions(16, width, ill), grammar(), token_loss, 5e-3)


class Factors(nn.Module):
    """The rating of an item by a user: the product of their factors."""

    def __init__(self, users: int, items: int, width: int, same: bool) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        for table in (self.user, self.item):
            if same:
                nn.init.constant_(table.weight, 0.1)
            else:
                nn.init.normal_(table.weight, 0.0, 0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(-1)


@sick(
    "contact14b-factors-equal",
    [("BOTTLENECK", "item")],
    rank_below("item", 1.2, steps=20),
    source="https://github.com/NicolasHug/Surprise/issues/22",
    **ONE,
)
def factors_equal(ill: bool, width: int) -> Setup:
    """Matrix factorisation with every factor at 0.1: all factors of a row get the same gradient and stay the
    same for ever, so the model has a single one. Repaired by normal numbers of that size."""
    ratings = normal(seeded(21), 30, 3) @ normal(seeded(22), 3, 30)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        user, item = choice(g, 30, 256), choice(g, 30, 256)
        return (user, item), ratings[user, item]

    return setup(Factors(30, 30, width, ill), sample, F.mse_loss, 2e-2)


# ------------------------------------------------------------------------------------- metric learning


class Margin(nn.Module):
    """The cosine between a feature and the prototype of each class."""

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kinds, width))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


@sick(
    "contact14b-margin-forgotten",
    [("DEAD", "margin")],
    unmoved("margin"),
    source="https://github.com/wujiyang/Face_Pytorch/issues/10",
    **ONE,
)
def margin_forgotten(ill: bool, width: int) -> Setup:
    """Face recognition with an angular margin, whose module has the classes' prototypes: the optimizer is
    given the backbone's parameters alone, so the prototypes stay random. Repaired by giving it both."""
    model = stack(
        net=nn.Sequential(nn.Linear(16, width), nn.PReLU(), nn.Linear(width, width)), margin=Margin(width, 10)
    )

    def loss(cosine: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(12 * (cosine - 0.2 * F.one_hot(target, 10)), target)

    return setup(
        model, clusters(16, 10), loss, sgd(0.1, 0.9), trains=(model.net if ill else model).parameters
    )


# ------------------------------------------------------------------------------------- adapters


class Hyper(nn.Module):
    """A small net whose output is added to the context of a frozen model."""

    def __init__(self, width: int, loud: bool) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for layer in (self.linear1, self.linear2):
            if loud:
                nn.init.kaiming_normal_(layer.weight)
            else:
                nn.init.normal_(layer.weight, 0.0, 0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


class Tuned(nn.Module):
    """A frozen language model, with nets added to its context in a row."""

    def __init__(self, base: Speaker, width: int, loud: bool) -> None:
        super().__init__()
        self.base = frozen(base)
        self.adapter = nn.ModuleList(Hyper(width, loud) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.base.rnn(self.base.embed(tokens))[0]
        for net in self.adapter:
            x = x + net(x)
        return self.base.head(x)


def loud_adapter(above: float) -> Claim:
    """The adapter's part of the context is above a multiple of what the frozen model says."""

    def claim(ready: Setup) -> tuple[bool, str]:
        step = next(training(ready, 1, ("base.rnn", "adapter.2")))
        own, added = (
            step.outputs[name].detach().square().mean().sqrt() for name in ("base.rnn", "adapter.2")
        )
        return float(added / own) > above, f"size of the last adapter / of the context = {added / own:.2g}"

    return claim


@sick(
    "contact14b-adapter-loud",
    [("EXPLODING", "adapter")],
    loud_adapter(2.0),
    allow=("UNSTABLE",),
    source="https://github.com/AUTOMATIC1111/stable-diffusion-webui/issues/4350",
    **ONE,
)
def adapter_loud(ill: bool, width: int) -> Setup:
    """Nets that are added to a pretrained model's context and start with Kaiming weights: each one's output
    is larger than the context, and the model is ruined before the first step. Repaired by a deviation of
    0.01."""
    base = Speaker(16, width)
    trained(setup(base, grammar(certain=0.95), token_loss, 1e-2), 80)
    text = grammar(certain=0.95)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        tokens, following = text(g)
        return tokens, torch.where(following < 8, following, 23 - following)

    return setup(Tuned(base, width, ill), sample, token_loss, 3e-3)


# ---------------------------------------------------------------------- physics, critics, meta-learning


class Oscillator(nn.Module):
    """The position over time: its values at some times, and the equation's residual at others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        with torch.no_grad():  # wide enough for the waves
            self.net[0].weight *= 20
            self.net[0].bias *= 20

    def forward(self, seen: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        times = times.detach().requires_grad_()
        y = self.net(times)
        (dy,) = torch.autograd.grad(y.sum(), times, create_graph=True)
        (ddy,) = torch.autograd.grad(dy.sum(), times, create_graph=True)
        return self.net(seen), ddy + 4 * dy + 400 * y


@sick(
    "contact14b-pinn-weight",
    [("EXPLODING", "*")],
    louder(1, 0, 100.0),
    allow=("UNSTABLE", "BOTTLENECK"),
    source="https://github.com/benmoseley/harmonic-oscillator-pinn/issues/3",
    **ONE,
)
def pinn_weight(ill: bool, width: int) -> Setup:
    """A damped oscillator by a physics-informed net, the equation's residual as it stands: with a stiffness
    of 400 its square swamps the data, and zero is all that is learnt. Repaired by dividing the residual by
    the stiffness, so that both errors have one unit, and by a weight of 0.1."""
    unit, weight = (1.0, 1.0) if ill else (400.0, 0.1)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        t = torch.linspace(0, 0.36, 10)[:, None]
        return (t, uniform(g, 30, 1)), torch.exp(-2 * t) * torch.cos(19.9 * t)

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output[0], target) + weight * (output[1] / unit).square().mean()

    return setup(Oscillator(width), sample, loss, 5e-3)


class Critic(nn.Module):
    """A deep critic of real and of made samples, held by spectral norms or by a penalty on its gradient."""

    def __init__(self, size: int, width: int, depth: int, spectral: bool) -> None:
        super().__init__()
        sizes = [size] + [width] * depth
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)] + [nn.Linear(width, 1)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
        self.layers = nn.ModuleList(spectral_norm(layer) if spectral else layer for layer in layers)
        self.spectral = spectral

    def score(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.leaky_relu(layer(x), 0.1)
        return self.layers[-1](x)

    def forward(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        penalty = real.new_zeros(())
        if not self.spectral:
            between = (0.5 * real + 0.5 * made).requires_grad_()
            (slope,) = torch.autograd.grad(self.score(between).sum(), between, create_graph=True)
            penalty = (slope.norm(dim=-1) - 1).square().mean()
        return *self.score(torch.cat([real, made])).chunk(2), penalty


@sick(
    "contact14b-critic-spectral",
    [("VANISHING", "layers")],
    fading("layers.0", "layers.9", 0.02),
    source="https://github.com/christiancosgrove/pytorch-spectral-normalization-gan/issues/9",
    **ONE,
)
def critic_spectral(ill: bool, width: int) -> Setup:
    """A Wasserstein critic of ten layers with spectral normalisation: the largest singular value is one, the
    usual ones and the slopes are less, and the gradient fades from layer to layer. Repaired by a gradient
    penalty."""

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        return (0.5 * normal(g, 32, 8) + 1, normal(g, 32, 8)), None

    def loss(output: tuple[Tensor, Tensor, Tensor], _: None) -> Tensor:
        return output[1].mean() - output[0].mean() + 10 * output[2]

    return setup(Critic(8, width, 10, ill), sample, loss, 1e-3)


class Adapting(nn.Module):
    """A small net that learns a task by some steps of its own, and the prediction of what it has become."""

    def __init__(self, width: int, rate: float, steps: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
        self.rate, self.steps = rate, steps

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        answers = []
        for task in range(len(x)):
            weights = dict(self.net.named_parameters())
            for _ in range(self.steps):
                fit = F.mse_loss(torch.func.functional_call(self.net, weights, x[task]), y[task])
                grads = torch.autograd.grad(fit, list(weights.values()), create_graph=True)
                weights = {n: w - self.rate * g for (n, w), g in zip(weights.items(), grads, strict=True)}
            answers.append(torch.func.functional_call(self.net, weights, query[task]))
        return torch.stack(answers)


def waves(g: Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return tasks: points on waves of several heights and phases, and the values at others."""
    height, phase = 1 + 2 * uniform(g, 4, 1, 1), 1.5 * uniform(g, 4, 1, 1)
    x, query = 6 * uniform(g, 4, 10, 1) - 3, 6 * uniform(g, 4, 10, 1) - 3
    return (x, height * torch.sin(x + phase), query), height * torch.sin(query + phase)


@sick(
    "contact14b-hyper-rate",
    [("UNSTABLE", "*")],
    huge("net", 1e3),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/nicholas-leonard/drmad/issues/3",
    **ONE,
)
def hyper_rate(ill: bool, width: int) -> Setup:
    """A meta-gradient through some steps of an inner descent, whose own rate is too high: the inner loop runs
    away, and the outer loss and gradient grow with each of its steps. Repaired by a low inner rate."""
    return setup(Adapting(width, 0.2 if ill else 0.01, 5), waves, F.mse_loss, 3e-3)
