"""Cases re-created from public reports: a policy gradient, a vector-quantised autoencoder, a hand-written
recurrent cell; and two healthy models of these fields."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .claims import Claim, fades_in_time, no_gradient, not_finite, strong, training
from .data import choice, factors, normal, seeded, series, setup
from .registry import FLOAT32, Setup, healthy, sick

# ------------------------------------------------------------------- proximal policy optimisation


class ActorCritic(nn.Module):
    """Gaussian policy with a learnt, state-independent log standard deviation, and a value network."""

    def __init__(self, observations: int, actions: int, hidden: int, log_std: float, bounded: bool) -> None:
        super().__init__()
        self.actor = nn.ModuleList([nn.Linear(observations, hidden), nn.Linear(hidden, hidden)])
        self.mean = nn.Linear(hidden, actions)
        self.critic = nn.ModuleList([nn.Linear(observations, hidden), nn.Linear(hidden, 1)])
        self.log_std = nn.Parameter(torch.full((actions,), log_std))
        self.bounded = bounded

    def forward(self, obs: Tensor) -> dict[str, Tensor]:
        """Return mean and std, (samples, actions), and value, (samples,), for obs (samples, observations)."""
        a = obs
        for layer in self.actor:
            a = F.elu(layer(a))
        mean = self.mean(a)
        log_std = self.log_std.clamp(-2.5, 1.0) if self.bounded else self.log_std
        value = self.critic[1](F.elu(self.critic[0](obs))).squeeze(-1)
        return {"mean": mean, "std": torch.exp(log_std).expand_as(mean), "value": value}


def _log_prob(policy: dict[str, Tensor], action: Tensor) -> Tensor:
    normal_ = torch.distributions.Normal(policy["mean"], policy["std"], validate_args=False)
    return normal_.log_prob(action).sum(-1)


def _ppo_loss(new: dict[str, Tensor], rollout: dict[str, Tensor]) -> Tensor:
    log_prob = _log_prob(new, rollout["action"])
    ratio = torch.exp(log_prob - rollout["log_prob"])
    advantage = rollout["advantage"]
    surrogate = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
    value_loss = (new["value"] - rollout["returns"]).square().mean()
    return surrogate + value_loss


@sick(
    "contact4b-rl-std_underflows",
    expect=[("NUMERICAL", "*")],
    claim=not_finite(4),
    allow=["EXPLODING", "DEAD", "UNSTABLE", "SATURATION"],
    source="https://github.com/leggedrobotics/rsl_rl/pull/190",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def ppo_std(sick: bool, width: int) -> Setup:
    """Proximal policy optimisation late in a run that has driven the learnt log standard deviation so low
    that the variance is zero in float32: log-probabilities and their gradients are NaN. Repair: bounds."""
    model = ActorCritic(8, 3, width, -52.0 if sick else -1.0, bounded=not sick)
    old = copy.deepcopy(model)
    goal = normal(seeded(41), 8, 3) / 3

    def sample(g: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        obs = normal(g, 64, 8)
        with torch.no_grad():
            policy = old(obs)
            action = policy["mean"] + policy["std"] * normal(g, 64, 3)
            reward = 2.0 - (action - obs @ goal).square().sum(-1)
            advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
            rollout = {
                "action": action,
                "log_prob": _log_prob(policy, action),
                "advantage": advantage,
                "returns": reward,
            }
        return obs, rollout

    return setup(model, sample, _ppo_loss, 1e-3)


# ------------------------------------------------------------------ vector-quantised autoencoder


class Quantizer(nn.Module):
    """Nearest entry of a codebook that follows the encoder by moving averages, straight through."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor

    def __init__(self, codes: int, size: int, uniform: bool, decay: float = 0.99) -> None:
        super().__init__()
        bound = math.sqrt(3 / (codes * size))
        embed = torch.empty(codes, size).uniform_(-bound, bound) if uniform else torch.randn(codes, size)
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("cluster_size", torch.ones(codes))
        self.decay = decay

    @torch.no_grad()
    def _follow(self, flat: Tensor, onehot: Tensor) -> None:
        self.cluster_size.lerp_(onehot.sum(0), 1 - self.decay)
        self.embed_avg.lerp_(onehot.t() @ flat, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + 1e-5) / (total + len(self.embed) * 1e-5) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the quantised z, (samples, parts, size), and the commitment loss."""
        flat = z.flatten(0, -2)
        index = torch.cdist(flat, self.embed).argmin(1)
        quantized = self.embed[index].view_as(z)
        if self.training:
            self._follow(flat, F.one_hot(index, len(self.embed)).type_as(flat))
        return z + (quantized - z).detach(), F.mse_loss(z, quantized)


class VQVAE(nn.Module):
    """Autoencoder whose code is some quantised parts."""

    def __init__(self, features: int, hidden: int, parts: int, size: int, uniform: bool) -> None:
        super().__init__()
        self.enc1, self.enc2 = nn.Linear(features, hidden), nn.Linear(hidden, parts * size)
        self.quantizer = Quantizer(64, size, uniform)
        self.dec1, self.dec2 = nn.Linear(parts * size, hidden), nn.Linear(hidden, features)
        self.parts = parts

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the reconstruction of x, (samples, features), and the quantiser's loss."""
        z = self.enc2(F.relu(self.enc1(x))).unflatten(1, (self.parts, -1))
        quantized, loss = self.quantizer(z)
        return {"recon": self.dec2(F.relu(self.dec1(quantized.flatten(1)))), "vq": loss}


def _one_code(steps: int) -> Claim:
    """After some steps all samples of a batch are decoded from the same vector, but for rounding."""

    def claim(setup: Setup) -> tuple[bool, str]:
        *_, last = training(setup, steps, ("quantizer",))
        code = last.outputs["quantizer"].detach().flatten(0, 1)
        spread = float((code - code.mean(0)).norm() / code.norm())
        return spread < 1e-3, f"what differs in the codes = {spread:.2g}"

    return claim


@sick(
    "contact4b-vq-normal_codebook",
    expect=[("BOTTLENECK", "*")],
    claim=_one_code(100),
    allow=["DEAD", "VANISHING", "SATURATION"],
    source="https://github.com/lucidrains/vector-quantize-pytorch/issues/19",
    steps=400,
    widths=(32,),
    dtypes=(FLOAT32,),
)
def vq_init(sick: bool, width: int) -> Setup:
    """Codebook drawn from a standard normal, far from the encoder's small outputs: the entry of least norm
    is nearest to every one of them, the index collapses and all samples are decoded alike. Repair: a small
    uniform codebook round the origin."""
    model = VQVAE(24, 2 * width, 1, 64, uniform=not sick)

    def loss(output: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.mse_loss(output["recon"], x) + output["vq"]

    return setup(model, factors(24, 3), loss, 1e-3)


# ----------------------------------------------------------------------- recurrence by hand


class FastRNNCell(nn.Module):
    """h = alpha tanh(W x + U h + b) + beta h, with two learnt scalars."""

    def __init__(self, features: int, hidden: int, squashed: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)
        self.weight_ih = nn.Parameter(torch.empty(hidden, features).uniform_(-bound, bound))
        self.weight_hh = nn.Parameter(torch.empty(hidden, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.alpha = nn.Parameter(torch.tensor(-3.0))
        self.beta = nn.Parameter(torch.tensor(3.0))
        self.squashed = squashed

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the next state, (samples, hidden)."""
        candidate = torch.tanh(x @ self.weight_ih.t() + h @ self.weight_hh.t() + self.bias)
        if self.squashed:
            return torch.sigmoid(self.alpha) * candidate + torch.sigmoid(self.beta) * h
        return self.alpha * candidate + self.beta * h


class FastRNN(nn.Module):
    """The cell, over time, and one number from its last state."""

    def __init__(self, features: int, hidden: int, squashed: bool) -> None:
        super().__init__()
        self.cell = FastRNNCell(features, hidden, squashed)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (samples, 1) for x, (samples, time, features)."""
        h = x.new_zeros(x.shape[0], self.head.in_features)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


@sick(
    "contact4b-rnn-raw_residual_scalars",
    expect=[("EXPLODING", "*")],
    claim=strong("cell", 1e4),
    allow=["NUMERICAL", "UNSTABLE", "SATURATION", "VANISHING"],
    source="https://github.com/MartinuzziFrancesco/torchrecurrent/pull/30",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def fast_rnn(sick: bool, width: int) -> Setup:
    """Cell with a weighted residual whose two scalars are meant to pass a sigmoid and do not: the state is
    tripled at every step, forwards, and so is the gradient, backwards. Repair: the sigmoid."""

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 24, 4)
        return x, 2 * x[..., :2].mean((1, 2))[:, None]

    return setup(FastRNN(4, width, squashed=not sick), sample, F.mse_loss, 1e-2)


# ------------------------------------------------------------------------------------- healthy


class DuelingQ(nn.Module):
    """Online dueling network for the values of actions, and a frozen copy of it for the targets."""

    def __init__(self, observations: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.body, self.gain = nn.Linear(observations, hidden), nn.Linear(hidden, actions)
        self.state = nn.Linear(hidden, 1)
        self.target = nn.ModuleList(copy.deepcopy([self.body, self.gain, self.state])).requires_grad_(False)

    @staticmethod
    def _values(x: Tensor, body: nn.Module, gain: nn.Module, state: nn.Module) -> Tensor:
        h = F.relu(body(x))
        gains = gain(h)
        return state(h) + gains - gains.mean(1, keepdim=True)

    def forward(self, now: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of actions now, and the greedy value later by the frozen copy."""
        with torch.no_grad():
            future = self._values(later, *self.target).amax(1)
        return self._values(now, self.body, self.gain, self.state), future


@healthy(
    "contact4b-rl-dueling_frozen_target",
    looks=no_gradient("target"),
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dueling(width: int) -> Setup:
    """Deep Q-learning with a frozen target network and large rewards under the Huber loss: no gradient
    reaches the copy, as is meant, and most errors lie where the loss is linear."""
    model = DuelingQ(6, 3, 2 * width)
    paying = normal(seeded(42), 6, 3)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        now = normal(g, 64, 6)
        action = choice(g, 3, 64)
        reward = 3 * torch.tanh(now @ paying)[torch.arange(64), action]
        return (now, now + 0.3 * normal(g, 64, 6)), (action, reward)

    def loss(output: tuple[Tensor, Tensor], played: tuple[Tensor, Tensor]) -> Tensor:
        values, future = output
        action, reward = played
        chosen = values.gather(1, action[:, None]).squeeze(1)
        return F.smooth_l1_loss(chosen, reward + 0.9 * future)

    return setup(model, sample, loss, 3e-3)


class Peephole(nn.Module):
    """A long short-term memory by hand, with a look of the gates at the memory."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Linear(features + hidden, 4 * hidden)
        self.peep = nn.Parameter(torch.zeros(3, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state, (samples, hidden), for x, (samples, time, features)."""
        h = c = x.new_zeros(x.shape[0], self.peep.shape[1])
        for x_t in x.unbind(1):
            i, f, g, o = self.gates(torch.cat([x_t, h], 1)).chunk(4, 1)
            i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
            c = f * c + i * torch.tanh(g)
            h = torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c)
        return h


class LateReader(nn.Module):
    """The memory and a classifier."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.rnn, self.head = Peephole(features, hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.rnn(x))


@healthy(
    "contact4b-rnn-late_evidence",
    looks=fades_in_time("rnn", 1e-3),
    widths=(32,),
    dtypes=(FLOAT32,),
)
def late(width: int) -> Setup:
    """Gated memory written by hand, whose gradient fades towards the first steps; the class is told by the
    last quarter of the sequence, so that nothing is lost by it."""
    early = series(32, 32)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x, kind = early(g)
        return x.flip(1), kind

    return setup(LateReader(4, width), sample, F.cross_entropy, 5e-3)
