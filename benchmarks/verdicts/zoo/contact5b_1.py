"""Cases from public reports: spiking and binary networks, agents and world models."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call
from torch.nn import functional as F

from .claims import flat, huge, no_gradient, not_finite, rises
from .data import choice, clusters, normal, seeded, setup, sgd
from .registry import FLOAT32, Setup, healthy, sick

W = 16
ONE = {"widths": (W,), "dtypes": (FLOAT32,)}


# ------------------------------------------------------------------------------- spiking, binary


class _Spike(Function):
    """A step whose backward is the slope of a sigmoid, written with exponentials or with the sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, plain: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope, ctx.plain = slope, plain
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.plain:
            e = torch.exp(-ctx.slope * x)
            return grads[0] * ctx.slope * e / (e + 1) ** 2, None, None
        s = torch.sigmoid(ctx.slope * x)
        return grads[0] * ctx.slope * s * (1 - s), None, None


class _Leaky(nn.Module):
    def __init__(self, beta: float, plain: bool) -> None:
        super().__init__()
        self.beta, self.plain = beta, plain

    def forward(self, current: Tensor, membrane: Tensor) -> tuple[Tensor, Tensor]:
        membrane = self.beta * membrane + current
        spike = _Spike.apply(membrane - 1.0, 25.0, self.plain)
        return spike, membrane - spike.detach()


class _SpikingNet(nn.Module):
    def __init__(self, width: int, plain: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 4 * width), nn.Linear(4 * width, 4)
        self.lif1, self.lif2 = _Leaky(0.9, plain), _Leaky(0.9, plain)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mem1 = x.new_zeros(len(x), self.fc1.out_features)
        mem2 = x.new_zeros(len(x), self.fc2.out_features)
        spikes, membranes = [], []
        for _ in range(8):
            spike, mem1 = self.lif1(self.fc1(x), mem1)
            out, mem2 = self.lif2(self.fc2(spike), mem2)
            spikes.append(out)
            membranes.append(mem2)
        return {"rate": torch.stack(spikes), "membrane": torch.stack(membranes)}


def _membrane_loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    steps = output["membrane"]
    return torch.stack([F.cross_entropy(step, target) for step in steps]).mean()


@sick(
    "contact5b-spiking-surrogate-overflow",
    [("NUMERICAL", "*")],
    not_finite(loss=False),
    source="https://github.com/jeshraghian/snntorch/issues/427",
    **ONE,
)
def spiking_surrogate_overflow(sick: bool, width: int) -> Setup:
    """The surrogate slope of the spike is a quotient of exponentials: membranes a few units below the
    threshold make it infinity over infinity in the backward, while the forward is sound. Repaired by writing
    it with the sigmoid."""
    return setup(_SpikingNet(width, plain=sick), clusters(12, 4, spread=1.5), _membrane_loss)


class _Sign(Function):
    """The sign; the gradient passes where the input is within one of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() <= 1)


class _BinaryLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(0.1 * torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.latent.abs().mean(1, keepdim=True).detach()
        return F.linear(x, _Sign.apply(self.latent) * scale)


class _BinaryNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, 4 * width)
        self.bn1, self.bn2 = nn.BatchNorm1d(4 * width), nn.BatchNorm1d(4 * width)
        self.middle = _BinaryLinear(4 * width, 4 * width)
        self.last = nn.Linear(4 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = _Sign.apply(self.bn1(self.first(x)))
        x = _Sign.apply(self.bn2(self.middle(x)))
        return self.last(x)


@healthy("contact5b-binary-clipped-through", flat("bn1", "clamp", 0.2), **ONE)
def binary_clipped_through(width: int) -> Setup:
    """Signs of weights and activations: a third of the activations lie where no gradient passes, and the
    sign itself has none, yet the straight-through estimate trains it as it does every binary network."""
    return setup(_BinaryNet(width), clusters(12, 4, spread=1.5), F.cross_entropy)


# ------------------------------------------------------------------------------------- the agents


class _SquashedActor(nn.Module):
    """An actor of a soft actor-critic with its critic, which is fixed here."""

    def __init__(self, width: int, unsquash: bool) -> None:
        super().__init__()
        self.unsquash = unsquash
        self.trunk = nn.Sequential(nn.Linear(6, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU())
        self.mean, self.log_std = nn.Linear(width, 2), nn.Linear(width, 2)
        nn.init.constant_(self.log_std.bias, -4.0)
        nn.init.normal_(self.mean.weight, std=4 / math.sqrt(width))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(obs)
        mean, std = self.mean(h), self.log_std(h).clamp(-5, 2).exp()
        dist = torch.distributions.Normal(mean, std)
        raw = dist.rsample()
        action = torch.tanh(raw)
        if self.unsquash:
            raw = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))
            jacobian = torch.log(1 - torch.tanh(raw) ** 2 + 1e-6)
        else:
            jacobian = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return action, (dist.log_prob(raw) - jacobian).sum(-1)


def _observations(g: torch.Generator) -> tuple[Tensor, Tensor]:
    x = normal(g, 64, 6)
    x[:5] *= 15  # a few falls, with speeds out of the ordinary
    return x, torch.tanh(x[:, :2])


def _actor_loss(output: tuple[Tensor, Tensor], best: Tensor) -> Tensor:
    action, log_prob = output
    q = -((action - best) ** 2).sum(-1)
    return (0.2 * log_prob - q).mean()


@sick(
    "contact5b-agent-unsquashed-action",
    [("EXPLODING", "*")],
    huge("mean", 300.0),
    allow=("SATURATION", "UNSTABLE", "NUMERICAL"),
    source="https://github.com/ray-project/ray/issues/14878",
    **ONE,
)
def agent_unsquashed_action(sick: bool, width: int) -> Setup:
    """The log-probability of a squashed action is taken at the clamped inverse of its tanh: where a mean
    is far out, the inverse stops at 7.25 and the density of a narrow policy there has a slope of thousands.
    Repaired by keeping the value before the tanh and the stable form of its jacobian."""
    return setup(_SquashedActor(width, unsquash=sick), _observations, _actor_loss, 1e-2)


class _Imagining(nn.Module):
    """A latent world model with an actor that is trained through imagined steps."""

    def __init__(self, width: int, through: bool) -> None:
        super().__init__()
        self.through = through
        self.encoder = nn.Sequential(nn.Linear(6, 2 * width), nn.ELU(), nn.Linear(2 * width, width))
        self.dynamics = nn.GRUCell(4, width)
        self.reward = nn.Sequential(nn.Linear(width, width), nn.ELU(), nn.Linear(width, 1))
        self.actor = nn.Sequential(nn.Linear(width, 2 * width), nn.ELU(), nn.Linear(2 * width, 4))

    def act(self, h: Tensor) -> Tensor:
        dist = torch.distributions.OneHotCategorical(logits=self.actor(h))
        action = dist.sample()
        return action + dist.probs - dist.probs.detach() if self.through else action

    def forward(self, obs: Tensor, action: Tensor, after: Tensor) -> dict[str, Tensor]:
        h = self.encoder(obs)
        step = self.dynamics(action, h)
        fixed = [{n: p.detach() for n, p in m.named_parameters()} for m in (self.dynamics, self.reward)]
        dream, returns = h.detach(), []
        for _ in range(4):
            dream = functional_call(self.dynamics, fixed[0], (self.act(dream), dream))
            returns.append(functional_call(self.reward, fixed[1], (dream,)))
        return {
            "reward": self.reward(step),
            "latent": ((step - self.encoder(after).detach()) ** 2).mean(),
            "return": torch.stack(returns).sum(0).mean(),
        }


def _transitions(g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    push = normal(seeded(31), 4, 6)
    obs, action = normal(g, 64, 6), F.one_hot(choice(g, 4, 64), 4).float()
    after = 0.8 * obs + 0.5 * action @ push
    return (obs, action, after), after[:, :1] - 0.5 * after[:, 1:2]


def _dream_loss(output: dict[str, Tensor], reward: Tensor) -> Tensor:
    return F.mse_loss(output["reward"], reward) + output["latent"] - 0.1 * output["return"]


@sick(
    "contact5b-dream-sampled-action",
    [("DEAD", "actor")],
    no_gradient("actor"),
    source="https://github.com/juliusfrost/dreamer-pytorch/pull/41",
    **ONE,
)
def dream_sampled_action(sick: bool, width: int) -> Setup:
    """The actor is to be trained by the imagined return, through the dynamics; its actions are sampled
    one-hot vectors, which carry no gradient, so only the world model trains. Repaired by passing the gradient
    straight through to the probabilities."""
    return setup(_Imagining(width, through=not sick), _transitions, _dream_loss)


class _Ranker(nn.Module):
    """The value of placing a document next; the value of the following step is bootstrapped."""

    def __init__(self, width: int, own: bool) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(9, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
        self.target = None if own else copy.deepcopy(self.value).requires_grad_(False)

    def forward(self, document: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ahead = (self.target or self.value)(rest).squeeze(-1).amax(1)
        return self.value(document).squeeze(-1), ahead


def _ranking(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    taste = normal(seeded(32), 8)
    document, rest = normal(g, 32, 8), normal(g, 32, 6, 8)
    position = 1 + choice(g, 8, 32).float()
    gain = 2 ** (document @ taste).clamp(-2, 2) / torch.log2(position + 1)
    following = (position + 1)[:, None, None].expand(-1, 6, 1)
    return (torch.cat([document, position[:, None]], 1), torch.cat([rest, following], 2)), gain


def _td_loss(output: tuple[Tensor, Tensor], gain: Tensor) -> Tensor:
    value, ahead = output
    return F.mse_loss(value, gain + 0.99 * ahead)


@sick(
    "contact5b-ranking-own-target",
    [("UNSTABLE", "*")],
    rises(10.0, steps=100),
    allow=("EXPLODING", "NUMERICAL"),
    source="https://github.com/abhi1345/deep-q-rank/issues/4",
    **ONE,
)
def ranking_own_target(sick: bool, width: int) -> Setup:
    """A value network for ranking takes its targets from itself at once: the position in its input grows from
    step to step, so each update raises its own targets more than its values, and both run away. Repaired by a
    target network that stays behind."""
    return setup(_Ranker(width, own=sick), _ranking, _td_loss, sgd(0.003))


class _Duel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4 * width)
        self.state, self.advantage = nn.Linear(4 * width, 1), nn.Linear(4 * width, 4)

    def forward(self, obs: Tensor) -> Tensor:
        h = torch.relu(self.body(obs))
        advantage = self.advantage(h)
        return self.state(h) + advantage - advantage.mean(1, keepdim=True)


class _TwoNets(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.online = _Duel(width)
        self.behind = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, obs: Tensor, action: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            best = self.online(after).argmax(1, keepdim=True)
            ahead = self.behind(after).gather(1, best)
        return self.online(obs).gather(1, action), ahead


def _moves(g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    worth = normal(seeded(33), 4, 6)
    obs, action = normal(g, 64, 6), choice(g, 4, 64, 1)
    reward = 5 * (obs * worth[action[:, 0]]).sum(1, keepdim=True)
    return (obs, action, obs + 0.1 * normal(g, 64, 6)), reward


@healthy("contact5b-agent-duelling-huber", no_gradient("behind"), **ONE)
def agent_duelling_huber(width: int) -> Setup:
    """A duelling double value network: the target copy gets no gradient, the rewards are large so that the
    Huber loss is at its straight part, and each sample trains one action only. It learns."""
    return setup(
        _TwoNets(width),
        _moves,
        lambda output, reward: F.smooth_l1_loss(output[0], reward + 0.5 * output[1]),
        1e-2,
    )
