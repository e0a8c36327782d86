"""Whole training runs of actor-critics with a shared trunk: where the thresholds for policies come from.

    python benchmarks/policy_runs.py

PPO and A2C with the defaults of stable-baselines3, but for a trunk that policy and value share, on CartPole
and Acrobot: as they are, with rewards scaled up, and with the value cut off from the trunk. For every case,
over two seeds: the mean return of the first and of the last twenty episodes; the gradient of the policy over
that of the value at the trunk and at the heads' own parameters, and the cosine of the two at the trunk (the
smallest and the largest of the medians of the first twenty updates and of the others that were looked at);
the entropy as a share of its maximum at the end; the largest share of deterministic samples.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from gradflow.functional import action_statistics, head_gradients

GAMMA, ENVS, WIDTH, LOOKS = 0.99, 8, 64, 60


@attrs.frozen
class Case:
    """A run: environment, algorithm, whether advantages are standardised, factor on rewards, cut trunk."""

    env: str
    algorithm: str
    standardised: bool
    scale: float = 1.0
    cut: bool = False

    @property
    def updates(self) -> int:
        return 2500 if self.algorithm == "a2c" else 100


CASES = [
    Case("CartPole-v1", "a2c", False),
    Case("CartPole-v1", "a2c", True),
    Case("CartPole-v1", "ppo", True),
    Case("CartPole-v1", "a2c", True, 10.0),
    Case("CartPole-v1", "ppo", True, 10.0),
    Case("CartPole-v1", "ppo", True, 10.0, cut=True),
    Case("CartPole-v1", "ppo", True, 100.0),
    Case("Acrobot-v1", "a2c", False),
    Case("Acrobot-v1", "ppo", True),
    Case("Acrobot-v1", "ppo", True, cut=True),
]


class Net(nn.Module):
    """Two layers that policy and value share, unless the value is cut off from them."""

    def __init__(self, inputs: int, actions: int, cut: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.pi, self.v, self.cut = nn.Linear(WIDTH, actions), nn.Linear(WIDTH, 1), cut
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            gain = {self.pi: 0.01, self.v: 1.0}.get(layer, 2**0.5)
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.pi(h), self.v(h.detach() if self.cut else h).squeeze(-1)


class Rollouts:
    """Steps of several environments with the present policy."""

    def __init__(self, case: Case, seed: int) -> None:
        self.envs = gymnasium.make_vec(case.env, num_envs=ENVS, vectorization_mode="sync")
        self.states, _ = self.envs.reset(seed=seed)
        self.case, self.running, self.returns = case, np.zeros(ENVS), list[float]()

    def draw(self, net: Net) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return states, actions, their log probabilities, advantages and returns."""
        length, lam = (5, 1.0) if self.case.algorithm == "a2c" else (128, 0.95)
        seen: list[tuple[Tensor, ...]] = []
        for _ in range(length):
            x = torch.as_tensor(self.states, dtype=torch.float32)
            with torch.no_grad():
                logits, value = net(x)
            policy = Categorical(logits=logits)
            action = policy.sample()
            self.states, reward, failed, long, _ = self.envs.step(action.numpy())
            done = failed | long
            self.running += reward
            self.returns += self.running[done].tolist()
            self.running[done] = 0
            scaled = torch.as_tensor(self.case.scale * reward, dtype=torch.float32)
            seen.append((x, action, policy.log_prob(action), scaled, torch.as_tensor(done), value))
        with torch.no_grad():
            after = net(torch.as_tensor(self.states, dtype=torch.float32))[1]
        gain, gains = torch.zeros(ENVS), []
        for _, _, _, reward, done, value in reversed(seen):
            gain = reward + GAMMA * after * ~done - value + GAMMA * lam * ~done * gain
            gains.append(gain)
            after = value
        x, action, log_prob, _, _, value = (
            torch.stack(column).flatten(0, 1) for column in zip(*seen, strict=True)
        )
        advantage = torch.stack(gains[::-1]).flatten()
        return x, action, log_prob, advantage, advantage + value


def loss_of(case: Case, logits: Tensor, value: Tensor, data: tuple[Tensor, ...]) -> Tensor:
    """Return the loss: no entropy bonus, half a squared error."""
    _, action, before, advantage, returns = data
    if case.standardised:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_prob = Categorical(logits=logits).log_prob(action)
    if case.algorithm == "a2c":
        policy = -(log_prob * advantage).mean()
    else:
        ratio = (log_prob - before).exp()
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    return policy + 0.5 * F.mse_loss(value, returns)


def look(net: Net, logits: Tensor, value: Tensor, loss: Tensor) -> list[float]:
    """Return ratio at the trunk, ratio at the heads, cosine, entropy share, deterministic share."""
    found = head_gradients(loss, [logits], [value], dict(net.named_parameters()))
    own = float(found.policy["pi.weight"].norm() / found.value["v.weight"].norm())
    numbers = action_statistics(Categorical(logits=logits.detach()))
    policy, worth = (
        torch.cat([g[n].flatten() for n in found.shared]) if found.shared else torch.full((1,), math.nan)
        for g in (found.policy, found.value)
    )
    ratio, cosine = float(policy.norm() / worth.norm()), float(F.cosine_similarity(policy, worth, 0))
    return [ratio, own, cosine, numbers.entropy_share, numbers.deterministic_share]


def run(case: Case, seed: int) -> tuple[np.ndarray, list[float]]:
    """Train, and return what was seen at the looks, and the episodes' returns."""
    torch.manual_seed(seed)
    rollouts = Rollouts(case, seed)
    space: Any = rollouts.envs.single_action_space
    net = Net(rollouts.states.shape[1], int(space.n), case.cut)
    a2c = case.algorithm == "a2c"
    optimizer: torch.optim.Optimizer = (
        torch.optim.RMSprop(net.parameters(), 7e-4, alpha=0.99, eps=1e-5)
        if a2c
        else torch.optim.Adam(net.parameters(), 3e-4, eps=1e-5)
    )
    seen: list[list[float]] = []
    for update in range(case.updates):
        data = rollouts.draw(net)
        number = len(data[0])
        looked = update < 20 or update % max(1, case.updates // LOOKS) == 0
        for epoch in range(1 if a2c else 4):
            for start, part in enumerate(torch.randperm(number).split(number if a2c else 256)):
                logits, value = net(data[0][part])
                loss = loss_of(case, logits, value, tuple(d[part] for d in data))
                if looked and epoch == start == 0:
                    seen.append(look(net, logits, value, loss))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
    return np.array(seen), rollouts.returns


def main() -> None:
    """Print a line for every case."""
    torch.set_num_threads(1)
    columns = ("returns", 29), ("trunk ratio", 15), ("heads' ratio", 15), ("cosine", 11), ("entropy", 9)
    titles = "  ".join(title.ljust(width) for title, width in columns)
    print(f"{'environment':11}  {'algorithm':13}  rewards  trunk   {titles}  sure")
    for case in CASES:
        runs = [run(case, seed) for seed in (0, 1)]
        returns = "  ".join(f"{np.mean(r[:20]):.0f} -> {np.mean(r[-20:]):.0f}" for _, r in runs)

        def medians(column: int, runs: Any = runs) -> str:
            halves = [np.median(half) for seen, _ in runs for half in (seen[:20, column], seen[20:, column])]
            return f"{min(halves):.1e} {max(halves):.1e}"

        cosines = [np.median(half) for seen, _ in runs for half in (seen[:20, 2], seen[20:, 2])]
        ends = " ".join(f"{seen[-1, 3]:.2f}" for seen, _ in runs)
        sure = max(seen[:, 4].max() for seen, _ in runs)
        name = case.algorithm + (" standard." if case.standardised else "")
        trunk = "cut" if case.cut else "shared"
        what = f"{case.env:11}  {name:13}  x{case.scale:<6.0f}  {trunk:6}  {returns:29}"
        angle = f"{min(cosines):5.2f} {max(cosines):5.2f}"
        print(f"{what}  {medians(0):15}  {medians(1):15}  {angle}  {ends}  {sure:.2f}", flush=True)


if __name__ == "__main__":
    main()
