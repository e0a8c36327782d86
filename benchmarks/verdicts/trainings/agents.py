"""Trainings of agents by stable-baselines3: from the first step to the end, looked at from their buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn
from torch.nn import functional as F

from .data import choice, seeded
from .registry import Training, healthy


class Acting(nn.Module):
    """A policy of stable-baselines3 whose forward judges the actions that were taken."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, seen: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the values, the actions' log probabilities, and the entropy."""
        values, logs, entropy = self.policy.evaluate_actions(seen, actions)
        return values.flatten(), logs, entropy


def mean_reward(agent: Any) -> float:
    """Return the mean reward of the last episodes, or nothing where there was none."""
    rewards = [episode["r"] for episode in agent.ep_info_buffer or ()]
    return float(np.mean(rewards)) if rewards else 0.0


def of_policy(agent: Any, size: int, clip_range: float | None) -> Training:
    """Return the training of an agent that learns from what its present policy does; a step is a rollout."""
    _, callback = agent._setup_learn(1)
    agent.collect_rollouts(agent.env, callback, agent.rollout_buffer, n_rollout_steps=agent.n_steps)
    latest: dict[str, Tensor] = {}
    g = seeded(0)

    def make_batch() -> tuple[Tensor, Tensor]:
        buffer = agent.rollout_buffer
        names = ("observations", "actions", "log_probs", "advantages", "returns")
        columns = {name: getattr(buffer, name) for name in names}
        if not buffer.generator_ready:  # time and environments are still apart
            columns = {name: buffer.swap_and_flatten(column) for name, column in columns.items()}
        chosen = choice(g, len(columns["returns"]), size)
        latest.update({name: torch.as_tensor(column)[chosen] for name, column in columns.items()})
        return latest["observations"], latest["actions"].long().flatten()

    def loss_fn(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        values, logs, entropy = output
        gain = latest["advantages"].flatten()
        if clip_range is None:
            told = -(gain * logs).mean()
        else:
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            ratio = (logs - latest["log_probs"].flatten()).exp()
            told = -torch.minimum(gain * ratio, gain * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
        error = F.mse_loss(latest["returns"].flatten(), values)
        return told + agent.vf_coef * error - agent.ent_coef * entropy.mean()

    def advance(start: int, to: int) -> None:
        agent.learn((to - start) * agent.n_steps * agent.n_envs, reset_num_timesteps=False)

    def figure() -> float:
        return mean_reward(agent)

    return Training(
        Acting(agent.policy), make_batch, loss_fn, agent.policy.optimizer, figure, agent.max_grad_norm,
        advance=advance,
    )  # fmt: skip


@healthy("rl-stable-baselines-ppo-cartpole", 24, at_least=80.0)
def ppo() -> Training:
    """PPO as it comes, but for a higher rate, on CartPole."""
    agent = PPO(
        "MlpPolicy", "CartPole-v1", n_steps=512, batch_size=64, n_epochs=6, learning_rate=1e-3, seed=0,
        device="cpu",
    )  # fmt: skip
    return of_policy(agent, 64, 0.2)


@healthy("rl-stable-baselines-a2c-cartpole", 1500, at_least=80.0)
def a2c() -> Training:
    """A2C as it comes on eight CartPoles: five steps of each for an update."""
    poles = make_vec_env("CartPole-v1", n_envs=8, seed=1)
    agent = A2C("MlpPolicy", poles, n_steps=5, ent_coef=0.0, seed=1, device="cpu")
    return of_policy(agent, 40, None)


@healthy("rl-stable-baselines-dqn-cartpole", 10000, at_least=80.0)
def dqn() -> Training:
    """DQN on CartPole with settings that are known to work; a step is one in the environment."""
    agent: Any = DQN(
        "MlpPolicy", "CartPole-v1", learning_rate=2.3e-3, batch_size=64, buffer_size=20000,
        learning_starts=500, gamma=0.99, target_update_interval=10, train_freq=128, gradient_steps=64,
        exploration_fraction=0.16, exploration_final_eps=0.04, policy_kwargs={"net_arch": [64, 64]}, seed=0,
        device="cpu",
    )  # fmt: skip
    latest: dict[str, Tensor] = {}
    _, callback = agent._setup_learn(10000)
    agent.collect_rollouts(agent.env, callback, agent.train_freq, agent.replay_buffer, learning_starts=500)

    def make_batch() -> Tensor:
        data = agent.replay_buffer.sample(64)
        with torch.no_grad():
            then = agent.q_net_target(data.next_observations).amax(1, keepdim=True)
            latest["target"] = data.rewards + (1 - data.dones) * 0.99 * then
        latest["actions"] = data.actions.long()
        return data.observations

    def loss_fn(output: Tensor) -> Tensor:
        return F.smooth_l1_loss(output.gather(1, latest["actions"]), latest["target"])

    def advance(start: int, to: int) -> None:
        agent.learn(to - start, reset_num_timesteps=False)

    def figure() -> float:
        return mean_reward(agent)

    optimizer = agent.policy.optimizer
    return Training(agent.q_net, make_batch, loss_fn, optimizer, figure, agent.max_grad_norm, advance=advance)
