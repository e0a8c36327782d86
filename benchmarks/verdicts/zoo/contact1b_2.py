"""Models that learn to act, to learn, to compare and to spike, re-created from public reports of failures.

Each is built with its illness and with the repair that the report found.
"""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .claims import Claim, fading, not_finite, training
from .data import choice, normal, seeded, setup, textures, trained, uniform
from .registry import FLOAT32, Setup, sick

W = 16

# ----------------------------------------------------------------------- truncated quantile critics


def quantile_huber(quantiles: Tensor, target: Tensor) -> Tensor:
    """Return the Huber loss of (batch, critics, quantiles) to each value of a target (batch, values)."""
    number = quantiles.shape[-1]
    level = (torch.arange(number) + 0.5) / number
    off = target[:, None, None] - quantiles[..., None]
    weight = (level[:, None] - (off.detach() < 0).float()).abs()
    return (weight * F.huber_loss(off, torch.zeros_like(off), reduction="none")).mean()


class QuantileAgent(nn.Module):
    """An actor and two critics that tell quantiles of the return, with targets that follow them slowly."""

    def __init__(self, width: int, leaks: bool):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(6, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2), nn.Tanh())
        self.critics = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 2 * width), nn.ReLU(), nn.Linear(2 * width, 8)) for _ in range(2)
        )
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.leaks = leaks

    def forward(self, s: Tensor, a: Tensor, r: Tensor, following: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            for slow, fast in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
            ahead = torch.cat([following, self.actor(following)], -1)
            pooled = torch.cat([critic(ahead) for critic in self.targets], -1).sort(-1).values[:, :-4]
        here, own = torch.cat([s, a], -1), torch.cat([s, self.actor(s)], -1)
        values = []
        for critic in self.critics:
            fixed = {n: p.detach() for n, p in critic.named_parameters()}
            values.append(critic(own) if self.leaks else functional_call(critic, fixed, (own,)))
        quantiles = torch.stack([critic(here) for critic in self.critics], 1)
        return {"quantiles": quantiles, "target": r[:, None] + 0.95 * pooled, "value": torch.cat(values, -1)}


def value_above(bound: float, *, steps: int = 120) -> Claim:
    """After some steps the critics value the actor's choices at more than any policy can earn."""

    def claim(setup: Setup) -> tuple[bool, str]:
        for _ in training(setup, steps):
            pass
        value = float(setup.model(*setup.make_batch())["value"].mean())
        return value > bound, f"value after {steps} steps = {value:.3g}"

    return claim


@sick(
    "contact1b-rl-leaking_actor_loss",
    [("UNSTABLE", "*")],
    value_above(20.0),
    allow=("EXPLODING", "SATURATION", "NUMERICAL"),
    source="https://github.com/ray-project/ray/pull/65125",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def leaking_actor_loss(sick: bool, width: int) -> Setup:
    """The actor's loss, which is minus the value of its actions, also reaches the critics' parameters: each
    step raises that value past the Bellman target, the target follows, and it grows without bound. Repair:
    the critics' parameters are held fixed in the actor's loss. No policy earns more than 1 / (1 - 0.95)."""
    aim = normal(seeded(201), 6, 2) / 3

    def sample(g: Generator) -> tuple[tuple[Tensor, ...], None]:
        s, a = normal(g, 64, 6), 2 * uniform(g, 64, 2) - 1
        r = torch.exp(-(a - torch.tanh(s @ aim)).square().sum(-1))
        return (s, a, r, 0.9 * s + 0.4 * normal(g, 64, 6)), None

    def loss(out: dict[str, Tensor], _: None) -> Tensor:
        return quantile_huber(out["quantiles"], out["target"]) - out["value"].mean()

    return setup(QuantileAgent(width, leaks=sick), sample, loss, 1e-2)


# -------------------------------------------------------------------- an inner loop that runs Adam


class FewShot(nn.Module):
    """Adapts a copy of its learner to a task's examples by a few steps of Adam, and applies it to others."""

    def __init__(self, width: int, eps_root: float):
        super().__init__()
        body = [nn.Linear(6, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU()]
        self.learner = nn.Sequential(*body, nn.Linear(width, 3))
        self.eps_root = eps_root

    def adapted(self, x: Tensor, y: Tensor, steps: int = 3) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = dict(self.learner.named_parameters())
        first = {n: torch.zeros_like(p) for n, p in weights.items()}
        second = {n: torch.zeros_like(p) for n, p in weights.items()}
        for t in range(1, steps + 1):
            loss = F.cross_entropy(functional_call(self.learner, weights, (x,)), y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            for (n, p), grad in zip(list(weights.items()), grads, strict=True):
                first[n] = 0.9 * first[n] + 0.1 * grad
                second[n] = 0.999 * second[n] + 0.001 * grad.square()
                size = (second[n] / (1 - 0.999**t) + self.eps_root).sqrt() + 1e-8
                weights[n] = p - 0.03 * first[n] / (1 - 0.9**t) / size
        return weights

    def forward(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        tasks = zip(x, y, queries, strict=True)
        return torch.stack([functional_call(self.learner, self.adapted(a, b), (q,)) for a, b, q in tasks])


@sick(
    "contact1b-meta-inner_adam",
    [("NUMERICAL", "*")],
    not_finite(3, loss=False),
    source="https://github.com/metaopt/torchopt/issues/26",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def inner_adam(sick: bool, width: int) -> Setup:
    """The inner loop's Adam takes the root of a mean of squares, which is zero where a gradient is, as behind
    a ReLU that is off; the outer gradient goes through that root's derivative, and is NaN. Repair: a small
    number under the root."""
    middles = normal(seeded(202), 3, 6)

    def sample(g: Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        kind = choice(g, 3, 4, 15)
        turn = torch.stack([torch.randperm(3, generator=g) for _ in range(4)])
        points = 1.5 * middles[kind] + 0.5 * normal(g, 4, 15, 6)
        label = turn.gather(1, kind)
        return (points[:, :6], label[:, :6], points[:, 6:]), label[:, 6:]

    def loss(out: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), label.flatten())

    return setup(FewShot(width, 0.0 if sick else 1e-6), sample, loss, 3e-3, seed=3)


# -------------------------------------------------------------------------- triplets, hardest first


class Embedder(nn.Module):
    """Embeds two views of each sample."""

    def __init__(self, width: int):
        super().__init__()
        self.trunk = nn.ModuleList(nn.Linear(n, 2 * width) for n in (12, 2 * width))
        self.project = nn.Linear(2 * width, width)

    def forward(self, view: Tensor) -> Tensor:
        for layer in self.trunk:
            view = F.relu(layer(view))
        return self.project(view)


class Siamese(nn.Module):
    """The embeddings of two views, by one network."""

    def __init__(self, width: int):
        super().__init__()
        self.encoder = Embedder(width)

    def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(one), self.encoder(two)


def collapsed(module: str, below: float, *, after: int = 60) -> Claim:
    """After some steps the samples differ by a small part of a module's output."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, after, (module,))
        out = last.outputs[module].detach().double()
        share = float((out - out.mean(0)).square().mean().sqrt() / out.square().mean().sqrt())
        return share < below, f"what differs in {module} after {after} steps = {share:.2g}"

    return claim


@sick(
    "contact1b-contrastive-hardest_triplet",
    [("BOTTLENECK", "encoder")],
    collapsed("encoder", 0.1),
    allow=("VANISHING", "DEAD"),
    source="https://github.com/wanggrun/triplet/issues/1",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def hardest_triplet(sick: bool, width: int) -> Setup:
    """Each triplet takes the nearest of all negatives, which pulls everything to one point: the loss stays at
    the margin and all samples have the same embedding. Repair: negatives of middle rank, averaged."""
    mix = normal(seeded(203), 6, 12)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], None]:
        content = normal(g, 48, 6) @ mix
        return (content + 2 * normal(g, 48, 12), content + 2 * normal(g, 48, 12)), None

    def loss(views: tuple[Tensor, Tensor], _: None) -> Tensor:
        apart = (views[0][:, None] - views[1][None]).square().sum(-1)
        others = apart[~torch.eye(48, dtype=torch.bool)].view(48, 47).sort(-1).values
        negative = others[:, 0] if sick else others[:, 8:24].mean(-1)
        return F.relu(1.0 + apart.diagonal() - negative).mean()

    ready = setup(Siamese(width), sample, loss, 3e-3)
    return trained(ready, 150) if sick else ready


# --------------------------------------------------------------------------------- spiking networks


class FastSigmoid(torch.autograd.Function):
    """A step whose derivative is taken as that of a fast sigmoid with a slope of 25."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / (1 + 25 * ctx.saved_tensors[0].abs()).square()


class ArcTan(torch.autograd.Function):
    """A step whose derivative is taken as that of an arc tangent."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / (1 + (torch.pi * ctx.saved_tensors[0]).square())


class Leaky(nn.Module):
    """Leaky neurons that fire above a threshold, which is then taken off; the first dimension is time."""

    def __init__(self, surrogate: type[torch.autograd.Function], threshold: float, beta: float = 0.8):
        super().__init__()
        self.surrogate, self.threshold, self.beta = surrogate, threshold, beta

    def forward(self, current: Tensor) -> Tensor:
        mem, spk = torch.zeros_like(current[0]), []
        for now in current:
            mem = self.beta * mem + now
            spk.append(self.surrogate.apply(mem - self.threshold))
            mem = mem - self.threshold * spk[-1].detach()
        return torch.stack(spk)


class SpikingConvNet(nn.Module):
    """Convolutions of spikes, which sees a picture for some steps and counts the spikes of its last layer."""

    def __init__(self, channels: int, surrogate: type[torch.autograd.Function], threshold: float, skip: bool):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(6))
        self.lifs = nn.ModuleList(Leaky(surrogate, threshold) for _ in range(7))
        self.fc = nn.Linear(channels, 4)
        self.skip = skip

    def forward(self, picture: Tensor, steps: int = 6) -> Tensor:
        x = self.lifs[0](self.stem(picture).expand(steps, -1, -1, -1, -1))
        for conv, lif in zip(self.convs, self.lifs[1:], strict=True):
            y = lif(conv(x.flatten(0, 1)).unflatten(0, (steps, -1)))
            x = x + y if self.skip else y
        return self.fc(x.mean((0, 3, 4)))


@sick(
    "contact1b-spiking-steep_surrogate",
    [("VANISHING", "*")],
    fading("lifs.0", "lifs.6", 1e-3),
    allow=("DEAD", "SATURATION", "BOTTLENECK"),
    source="https://github.com/jeshraghian/snntorch/issues/219",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def steep_surrogate(sick: bool, width: int) -> Setup:
    """Behind each layer of spikes the gradient is multiplied by the slope of a surrogate that is steep at the
    threshold and falls off at once, and there is no way round, so that it fades from layer to layer. Repair:
    the surrogate of an arc tangent, a threshold above zero, and shortcuts."""
    surrogate = FastSigmoid if sick else ArcTan
    model = SpikingConvNet(width, surrogate, 0.0 if sick else 0.3, skip=not sick)
    return setup(model, textures(), F.cross_entropy, 3e-3)


# ------------------------------------------------------------------------------------------- tables


class TableVAE(nn.Module):
    """A variational autoencoder of rows of a table: three numbers, and one column of three kinds."""

    def __init__(self, width: int, bounds: tuple[float, float] | None):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(6, 4 * width), nn.ReLU(), nn.Linear(4 * width, 4 * width), nn.ReLU()
        )
        self.mu, self.log_var = nn.Linear(4 * width, 4), nn.Linear(4 * width, 4)
        for layer in (*self.encoder, self.log_var):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)
        self.decoder = nn.Sequential(nn.Linear(4, 2 * width), nn.ReLU(), nn.Linear(2 * width, 6))
        self.bounds = bounds

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        h = self.encoder(rows)
        mu, log_var = self.mu(h), self.log_var(h)
        if self.bounds:
            log_var = log_var.clamp(*self.bounds)
        z = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
        return {"rows": self.decoder(z), "mu": mu, "log_var": log_var}


@sick(
    "contact1b-tabular-vae_log_variance",
    [("NUMERICAL", "*")],
    not_finite(3),
    allow=("EXPLODING", "UNSTABLE"),
    source="https://github.com/vanderschaarlab/synthcity/issues/331",
    widths=(W,),
    dtypes=(FLOAT32,),
)
def vae_log_variance(sick: bool, width: int) -> Setup:
    """The encoder's weights are large, and for some rows of the table it tells a log variance whose
    exponential is infinite. Repair: the log variance is clamped."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        hidden = normal(g, 64, 2)
        numbers = hidden[:, [0, 0, 1]] + 0.2 * normal(g, 64, 3)
        kind = (hidden.sum(-1) > 0).long() + (hidden[:, 1] > 1).long()
        rows = torch.cat([numbers, F.one_hot(kind, 3).float()], -1)
        return rows, rows

    def loss(out: dict[str, Tensor], rows: Tensor) -> Tensor:
        kinds = F.cross_entropy(out["rows"][:, 3:], rows[:, 3:])
        mu, log_var = out["mu"], out["log_var"]
        kl = -0.5 * (1 + log_var - mu.square() - log_var.exp()).sum(-1).mean()
        return F.mse_loss(out["rows"][:, :3], rows[:, :3]) + kinds + 0.05 * kl

    return setup(TableVAE(width, None if sick else (-30.0, 3.0)), sample, loss, 3e-3)
