"""Reported failures of reinforcement learning, single and many agents, each with its repair."""

from __future__ import annotations

import copy
import math

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from .claims import flat, not_finite, rises
from .data import adam, choice, normal, seeded, setup, sgd
from .registry import FLOAT32, Setup, healthy, sick

# -------------------------------------------------------------------- SAC: the correction for the squashing


class GaussianActor(nn.Module):
    """A policy that squashes a normal sample to the action's range, with the sample's log probability."""

    def __init__(self, states: int, actions: int, width: int, max_action: float, *, scaled: bool) -> None:
        super().__init__()
        self.max_action, self.scaled = max_action, scaled
        self.body = nn.Sequential(nn.Linear(states, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.mu, self.log_sigma = nn.Linear(width, actions), nn.Linear(width, actions)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(state)
        policy = Normal(self.mu(hidden), self.log_sigma(hidden).clamp(-5, 1).exp())
        raw = policy.rsample()
        action = torch.tanh(raw) * self.max_action
        squashed = action if self.scaled else torch.tanh(raw)
        log_prob = policy.log_prob(raw) - torch.log(1 - squashed.pow(2) + 1e-6)
        return action, log_prob.sum(1, keepdim=True)


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Return a critic of two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    )


class SoftActorCritic(nn.Module):
    """The actor, two critics that are trained on the batch's actions, and their value of the actor's own."""

    def __init__(self, actor: nn.Module, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.actor = actor
        self.critic_1, self.critic_2 = (mlp(states + actions, width, 1) for _ in range(2))

    def forward(self, state: Tensor, taken: Tensor) -> tuple[Tensor, ...]:
        action, log_prob = self.actor(state)
        pair = torch.cat([state, taken], 1)
        own = torch.cat([state, action], 1)
        values = [fixed(critic, own) for critic in (self.critic_1, self.critic_2)]
        return self.critic_1(pair), self.critic_2(pair), torch.min(*values), log_prob


def fixed(module: nn.Module, x: Tensor) -> Tensor:
    """Return the module's output with no gradient for its parameters, but for its input."""
    held = {name: p.detach() for name, p in module.named_parameters()}
    return torch.func.functional_call(module, held, (x,))


@sick(
    "contact8a-rl-sacrange",
    expect=[("NUMERICAL", "actor")],
    claim=not_finite(loss=True),
    source="https://github.com/philtabor/Actor-Critic-Methods-Paper-To-Code/issues/7",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def sac_range(sick: bool, width: int) -> Setup:
    """The report says that the log probability of SAC becomes NaN: the correction takes the logarithm of one
    minus the square of the action after it was scaled to the environment's range, which is negative where
    the range is above one. Taking the squashed sample before the scaling repairs it."""
    wish = normal(seeded(31), 5, 2) / math.sqrt(5)

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        state, taken = normal(g, 64, 5), 4 * torch.rand(64, 2, generator=g) - 2
        return (state, taken), -(taken - torch.tanh(state @ wish)).square().sum(1, keepdim=True)

    def loss(output: tuple[Tensor, ...], reward: Tensor) -> Tensor:
        q1, q2, own, log_prob = output
        return F.mse_loss(q1, reward) + F.mse_loss(q2, reward) + (0.1 * log_prob - own).mean()

    actor = GaussianActor(5, 2, width, 2.0, scaled=sick)
    return setup(SoftActorCritic(actor, 5, 2, width), sample, loss, 1.5e-3)


# -------------------------------------------------------- SAC: observations as the simulator gives them


class SquashedActor(nn.Module):
    """A policy whose spread is a parameter of its own."""

    def __init__(self, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(states, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.loc = nn.Linear(width, actions)
        self.log_std = nn.Parameter(torch.full((actions,), -1.5))

    def forward(self, observation: Tensor) -> Tensor:
        loc = self.loc(self.body(observation))
        return torch.tanh(loc + self.log_std.exp() * torch.randn_like(loc))


@sick(
    "contact8a-rl-observations",
    expect=[("SATURATION", "actor")],
    allow=["VANISHING", "DEAD"],
    claim=flat("actor.loc", "tanh of", 0.85, steps=10),
    source="https://github.com/tensorflow/agents/issues/622",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def observations(sick: bool, width: int) -> Setup:
    """The report says that SAC fails in an environment of one's own, where from the start all actions lie at
    the very ends of their range, since the observations that go into the actor are far too large. An
    observation normaliser before the actor repairs it."""
    wish = normal(seeded(32), 6, 2) / math.sqrt(6)
    scale = torch.tensor([4000.0, 900.0, 2500.0, 350.0, 1200.0, 6000.0])
    middle = torch.tensor([9000.0, -300.0, 4000.0, 200.0, -2600.0, 8000.0])

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        state = normal(g, 64, 6)
        return state if not sick else state * scale + middle, 0.7 * torch.tanh(state @ wish)

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor = SquashedActor(6, 2, width)

        def forward(self, observation: Tensor) -> Tensor:
            return self.actor(observation)

    def cost(action: Tensor, best: Tensor) -> Tensor:
        return (action - best).square().sum(1).mean()

    return setup(Agent(), sample, cost, 3e-3)


# ------------------------------------------------------------------------------ QMIX: the sum of rewards


class Mixer(nn.Module):
    """Mixes the agents' values with weights above zero that a state gives."""

    def __init__(self, agents: int, states: int, width: int) -> None:
        super().__init__()
        self.agents, self.width = agents, width
        self.hyper_w1, self.hyper_b1 = nn.Linear(states, agents * width), nn.Linear(states, width)
        self.hyper_w2 = nn.Linear(states, width)
        self.hyper_b2 = nn.Sequential(nn.Linear(states, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, values: Tensor, state: Tensor) -> Tensor:
        first = self.hyper_w1(state).abs().view(-1, self.agents, self.width)
        hidden = F.elu((values[:, None] @ first)[:, 0] + self.hyper_b1(state))
        return (hidden * self.hyper_w2(state).abs()).sum(1, keepdim=True) + self.hyper_b2(state)


class QMix(nn.Module):
    """One network for all agents and the mixer, each with a target that is a copy."""

    def __init__(self, agents: int, seen: int, actions: int, width: int) -> None:
        super().__init__()
        self.agent = nn.Sequential(nn.Linear(seen, width), nn.ReLU(), nn.Linear(width, actions))
        self.mixer = Mixer(agents, agents * seen, 16)
        self.target_agent = copy.deepcopy(self.agent).requires_grad_(False)
        self.target_mixer = copy.deepcopy(self.mixer).requires_grad_(False)

    def forward(self, seen: Tensor, action: Tensor, seen_next: Tensor) -> tuple[Tensor, Tensor]:
        taken = self.agent(seen).gather(2, action[..., None]).squeeze(2)
        best = self.target_agent(seen_next).amax(2)
        return self.mixer(taken, seen.flatten(1)), self.target_mixer(best, seen_next.flatten(1))


@sick(
    "contact8a-marl-qmix",
    expect=[("UNSTABLE", "*")],
    allow=["EXPLODING", "NUMERICAL"],
    claim=rises(5.0),
    source="https://github.com/VeinsureLee/RL-Tutorial/pull/16",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def qmix(sick: bool, width: int) -> Setup:
    """The report says that QMIX with four robots diverges at the current rate where the joint reward is the
    sum of the robots' rewards, with fifty for reaching the goal. Taking the mean of the rewards (or scaling
    the rate down with the number of agents) repairs it."""
    agents, seen = 4, 6
    to_goal = normal(seeded(33), seen, 5)

    def sample(g: Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        now, later = normal(g, 32, agents, seen), normal(g, 32, agents, seen)
        action = choice(g, 5, 32, agents)
        gain = (now @ to_goal).gather(2, action[..., None]).squeeze(2)
        reward = torch.where(gain > 2, 50.0, -1.0)
        joint = reward.sum(1, keepdim=True) if sick else reward.mean(1, keepdim=True)
        return (now, action, later), joint

    def loss(output: tuple[Tensor, Tensor], reward: Tensor) -> Tensor:
        value, following = output
        return F.mse_loss(value, reward + 0.9 * following)

    return setup(QMix(agents, seen, 5, width), sample, loss, sgd(2e-3))


# ----------------------------------------------------------- healthy: an actor's loss made of a gradient


class Deterministic(nn.Module):
    """A policy without spread."""

    def __init__(self, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(states, width), nn.Tanh(), nn.Linear(width, actions), nn.Tanh())

    def forward(self, state: Tensor) -> Tensor:
        return self.net(state)


class DqdaActor(nn.Module):
    """Gives an action, and the gradient of a fixed critic with respect to it."""

    def __init__(self, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.actor, self.critic = Deterministic(states, actions, width), mlp(states + actions, width, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        action = self.actor(state)
        value = self.critic(torch.cat([state, action], 1))
        (dqda,) = torch.autograd.grad(value.sum(), action, retain_graph=True)
        return action, dqda


@healthy(
    "contact8a-rl-dqda",
    source="https://github.com/HorizonRobotics/alf/issues/1204",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def dqda_actor(width: int) -> Setup:
    """An actor's loss that is half the square of the gradient of the value by the action, with everything but
    the action itself detached. The question is why it is positive and squared; the maintainers answer that
    its gradient is that of minus the value, only it is easier to read."""
    wish = normal(seeded(34), 5, 2) / math.sqrt(5)
    model = DqdaActor(5, 2, width)
    g0, optimizer = seeded(35), adam(5e-3)(model.critic.parameters())
    for _ in range(300):
        state, action = normal(g0, 128, 5), 2 * torch.rand(128, 2, generator=g0) - 1
        reward = -(action - 0.7 * torch.tanh(state @ wish)).square().sum(1, keepdim=True)
        optimizer.zero_grad()
        F.mse_loss(model.critic(torch.cat([state, action], 1)), reward).backward()
        optimizer.step()
    model.critic.requires_grad_(False)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        return normal(g, 64, 5), torch.zeros(())

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        action, dqda = output
        return 0.5 * ((dqda + action).detach() - action).square().sum(1).mean()

    return setup(model, sample, loss, 3e-3)


# --------------------------------------------------------------- healthy: hard samples with a soft gradient


class Speakers(nn.Module):
    """Two agents that each say one of some words, drawn hard."""

    def __init__(self, seen: int, words: int, width: int) -> None:
        super().__init__()
        self.actors = nn.ModuleList(
            nn.Sequential(nn.Linear(seen, width), nn.ReLU(), nn.Linear(width, words)) for _ in range(2)
        )

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        said = [F.gumbel_softmax(a(seen[:, i]), tau=1.0, hard=True) for i, a in enumerate(self.actors)]
        return said[0], said[1]


def all_or_nothing(setup: Setup) -> tuple[bool, str]:
    """What the model gives out is zero or one, and still has a gradient."""
    said = setup.model(setup.make_batch())[0]
    rest = float(torch.minimum(said, 1 - said).abs().max().detach())
    return rest < 1e-6 and said.requires_grad, f"distance from zero or one = {rest:.2g}"


@healthy(
    "contact8a-marl-gumbel",
    looks=all_or_nothing,
    source="https://github.com/shariqiqbal2810/maddpg-pytorch/issues/34",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def gumbel(width: int) -> Setup:
    """Actors of MADDPG whose words are one-hot samples of a Gumbel softmax with `hard=True`. The question is
    how a gradient can pass; the author answers that only the forward pass is hard."""
    words = 4
    code = normal(seeded(36), 2, 6, words)

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        seen = normal(g, 128, 2, 6)
        return seen, torch.einsum("bas,asw->baw", seen, code).argmax(2)

    def loss(said: tuple[Tensor, Tensor], right: Tensor) -> Tensor:
        hits = torch.stack([s.gather(1, right[:, i : i + 1]).squeeze(1) for i, s in enumerate(said)])
        return -(hits[0] + hits[1] + hits[0] * hits[1]).mean() + 3

    return setup(Speakers(6, words, width), sample, loss, 1e-2)


# ------------------------------------------------------------ healthy: a world model with detached latents


class LatentModel(nn.Module):
    """An encoder, a model of what follows, of the reward and of the value, and a policy in the latents."""

    def __init__(self, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(states, width), nn.ELU(), nn.Linear(width, 12))
        self.dynamics = nn.Sequential(nn.Linear(12 + actions, width), nn.ELU(), nn.Linear(width, 12))
        self.reward = nn.Sequential(nn.Linear(12 + actions, width), nn.ELU(), nn.Linear(width, 1))
        self.value = nn.Sequential(nn.Linear(12 + actions, width), nn.ELU(), nn.Linear(width, 1))
        self.pi = nn.Sequential(nn.Linear(12, width), nn.ELU(), nn.Linear(width, actions), nn.Tanh())

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = self.encoder(states[:, 0])
        miss, rewards, values, own = torch.zeros(()), [], [], []
        for t in range(actions.shape[1]):
            pair = torch.cat([z, actions[:, t]], 1)
            rewards.append(self.reward(pair))
            values.append(self.value(pair))
            held = z.detach()
            own.append(fixed(self.value, torch.cat([held, self.pi(held)], 1)))
            z = z + self.dynamics(pair)
            miss = miss + F.mse_loss(z, self.encoder(states[:, t + 1]).detach())
        return miss, torch.cat(rewards, 1), torch.cat(values, 1), torch.cat(own, 1)


def policy_stops_at_latents(setup: Setup) -> tuple[bool, str]:
    """The policy's part of the loss gives the policy a gradient, and nothing else."""
    own = setup.model(*setup.make_batch())[3]
    (-own.mean()).backward()
    has = sorted({n.split(".")[0] for n, p in setup.model.named_parameters() if p.grad is not None})
    return has == ["pi"], f"the policy's loss reaches {has}"


@healthy(
    "contact8a-rl-tdmpc",
    looks=policy_stops_at_latents,
    source="https://github.com/nicklashansen/tdmpc/issues/20",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def tdmpc(width: int) -> Setup:
    """A latent world model whose policy is trained on detached latents and through a value that is held
    fixed. The question is whether this stops the gradient through time; the author answers that it is meant
    for the policy only, while the model itself is trained through the whole rollout."""
    g0 = seeded(37)
    drift, push, wish = 0.2 * normal(g0, 4, 4), 0.5 * normal(g0, 2, 4), normal(g0, 4, 2) / 2

    def sample(g: Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        state, action = normal(g, 64, 4), 2 * torch.rand(64, 3, 2, generator=g) - 1
        states, rewards = [state], []
        for t in range(3):
            rewards.append(1 - (action[:, t] - torch.tanh(states[-1] @ wish)).square().sum(1, keepdim=True))
            states.append(states[-1] + torch.tanh(states[-1] @ drift) + action[:, t] @ push)
        got = torch.cat(rewards, 1)
        to_go = got.flip(1).cumsum(1).flip(1)
        return (torch.stack(states, 1), action), (got, to_go)

    def loss(output: tuple[Tensor, ...], target: tuple[Tensor, Tensor]) -> Tensor:
        miss, rewards, values, own = output
        fit = F.mse_loss(rewards, target[0]) + F.mse_loss(values, target[1])
        return 2 * miss + fit - 0.1 * own.mean()

    return setup(LatentModel(4, 2, width), sample, loss, 1e-2)
