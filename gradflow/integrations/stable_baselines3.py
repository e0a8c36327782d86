"""`GradflowCallback`: watches what stable-baselines3 trains, by the algorithm's own losses.

    model.learn(100_000, callback=GradflowCallback(path="history.jsonl"))

NOTE [The algorithm's losses]
Its `train()` computes the loss, steps the optimizer and draws the minibatch in one, so the losses are written
down here once more, each next to the name of the algorithm: those of PPO (Schulman et al. 2017), A2C (Mnih et
al. 2016), DQN (Mnih et al. 2015), SAC (Haarnoja et al. 2018) and TD3 (Fujimoto et al. 2018; DDPG is a TD3).
Tests hold them to what `train()` logs, to the last bits. A subclass has the losses of its class; another
algorithm is given its own by `losses`.

NOTE [The minibatch]
A look is taken between the collection of experience and `train()`. It draws from a copy of the rollout
buffer, or from the replay buffer, and puts the random states back: so it sees the very minibatch that
`train()` draws first, and the training draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional.model.purity import RandomState
from gradflow.integrations.trackers import Tracker, Which
from gradflow.integrations.watched import Watched

try:
    from gymnasium import spaces
    from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
except ImportError as error:
    raise ImportError(
        "gradflow.integrations.stable_baselines3 needs stable-baselines3: pip install 'gradient-flow[sb3]'."
    ) from error

_ROUNDS = {True: 10, False: 1000}  # between looks: on-policy algorithms have long rollouts, others short


class Loss(NamedTuple):
    """A loss that an algorithm trains a part of its policy by.

    Args:
        part: algorithm → the module that is trained.
        value: algorithm, minibatch → the loss.
    """

    part: Callable[[Any], nn.Module]
    value: Callable[[Any, Any], Tensor]


class GradflowCallback(Watched, BaseCallback):
    """Watches what an algorithm of stable-baselines3 trains: PPO, A2C, DQN, SAC, TD3, DDPG.

    A look computes the algorithm's own loss on copies of the policy, on the minibatch that `train()` is about
    to begin with: the weights come out the same bit for bit. SAC and TD3 train an actor and a critic by
    losses of their own, and each is watched by a monitor of its own.

    Args:
        every: rounds of collecting and training between two looks in the long run; more often at the start.
            None for 10 where the policy is trained on its own rollouts, and 1000 where on a replay buffer.
        path: a file for the history, as for `gradflow.Monitor`.
        log: which scalars of the reports are recorded with the algorithm's logger: `few`, `all`, or None.
        pipeline: judges a look; as for `gradflow.diagnose`.
        losses: by name, for an algorithm that is none of these: a `Loss` each.
        verbose: as for any callback of stable-baselines3.

    Attributes:
        monitors: by name: one named "", or `actor` and `critic`.

    Raises:
        ImportError: when this file is imported, if there is no stable-baselines3.
        ModelInputError: when the training begins, if the losses of the algorithm are not known.
        ValueError: if `log` is none of these.

    >>> callback = GradflowCallback(every=5)
    >>> callback.on_issue(lambda issue, step: print(step, issue), severity="HIGH")
    """

    def __init__(
        self,
        every: int | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        log: Which | None = None,
        pipeline: Any = None,
        losses: Mapping[str, Loss] | None = None,
        verbose: int = 0,
    ) -> None:
        Watched.__init__(self, every or 0, path, pipeline)
        BaseCallback.__init__(self, verbose)
        self._every, self._losses = every, losses
        if log is not None:
            self.on_look(Tracker(self._record, which=log))

    def _on_training_start(self) -> None:
        on_policy = isinstance(self.model, OnPolicyAlgorithm)
        self._options["every"] = _ROUNDS[on_policy] if self._every is None else self._every
        self._losses = losses_of(self.model) if self._losses is None else self._losses

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        algorithm: Any = self.model
        if not _will_train(algorithm):
            return
        for name, loss in (self._losses or {}).items():
            part = loss.part(algorithm)

            def forward(model: nn.Module, batch: Any, loss: Loss = loss) -> Tensor:
                return loss.value(algorithm, batch)

            monitor = self.watch(name, part, forward, getattr(part, "optimizer", None))
            if monitor.is_due:
                with _about_to_train(algorithm):
                    monitor(minibatch(algorithm))
            else:
                monitor(None)

    def _record(self, scalars: dict[str, float], report: object, step: int) -> None:
        for name, value in scalars.items():
            self.logger.record(name, value)


def _will_train(algorithm: Any) -> bool:
    """Whether a round of collecting is followed by training."""
    if isinstance(algorithm, OnPolicyAlgorithm):
        return True
    return algorithm.num_timesteps > algorithm.learning_starts and algorithm.gradient_steps != 0


@contextlib.contextmanager
def _about_to_train(algorithm: Any) -> Iterator[None]:
    """Put the policy in the mode that `train()` puts it in, and the mode and the random states back."""
    random, modes = RandomState(), [(m, m.training) for m in algorithm.policy.modules()]
    algorithm.policy.set_training_mode(True)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.restore()


def minibatch(algorithm: Any) -> Any:
    """Return the minibatch that `train()` would draw first now; see NOTE [The minibatch].

    Args:
        algorithm: of stable-baselines3, after a round of collecting. Random numbers are drawn.
    """
    if not isinstance(algorithm, OnPolicyAlgorithm):
        return algorithm.replay_buffer.sample(algorithm.batch_size, env=algorithm.get_vec_normalize_env())
    buffer: Any = copy.copy(algorithm.rollout_buffer)
    if isinstance(buffer.observations, dict):
        buffer.observations = dict(buffer.observations)
    return next(iter(buffer.get(getattr(algorithm, "batch_size", None))))


# --------------------------------------------------------------- see NOTE [The algorithm's losses]


def losses_of(algorithm: Any) -> dict[str, Loss]:
    """Return the losses of an algorithm by name.

    Args:
        algorithm: of stable-baselines3.

    Raises:
        ModelInputError: if they are not known.
    """
    for kinds, losses in _LOSSES:
        if isinstance(algorithm, kinds):
            return losses
    raise ModelInputError(
        f"GradflowCallback: the losses of {type(algorithm).__name__} are not known. Pass them: "
        '`losses={"": Loss(lambda algorithm: algorithm.policy, lambda algorithm, batch: ...)}`, the part '
        "that is trained, and its loss of a minibatch."
    )


def _evaluated(algorithm: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, log-probabilities, and the term that favours entropy."""
    discrete = isinstance(algorithm.action_space, spaces.Discrete)
    actions = batch.actions.long().flatten() if discrete else batch.actions
    values, log_prob, entropy = algorithm.policy.evaluate_actions(batch.observations, actions)
    term = -torch.mean(-log_prob if entropy is None else entropy)
    return values.flatten(), log_prob, term


def _normalized(algorithm: Any, advantages: Tensor, least: int) -> Tensor:
    if not algorithm.normalize_advantage or len(advantages) < least:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def _ppo(algorithm: Any, batch: Any) -> Tensor:
    values, log_prob, entropy_term = _evaluated(algorithm, batch)
    progress = algorithm._current_progress_remaining
    clip = algorithm.clip_range(progress)
    advantages = _normalized(algorithm, batch.advantages, 2)
    ratio = torch.exp(log_prob - batch.old_log_prob)
    clipped = advantages * torch.clamp(ratio, 1 - clip, 1 + clip)
    policy_loss = -torch.min(advantages * ratio, clipped).mean()
    if algorithm.clip_range_vf is not None:
        far = algorithm.clip_range_vf(progress)
        values = batch.old_values + torch.clamp(values - batch.old_values, -far, far)
    value_loss = F.mse_loss(batch.returns, values)
    return policy_loss + algorithm.ent_coef * entropy_term + algorithm.vf_coef * value_loss


def _a2c(algorithm: Any, batch: Any) -> Tensor:
    values, log_prob, entropy_term = _evaluated(algorithm, batch)
    policy_loss = -(_normalized(algorithm, batch.advantages, 0) * log_prob).mean()
    value_loss = F.mse_loss(batch.returns, values)
    return policy_loss + algorithm.ent_coef * entropy_term + algorithm.vf_coef * value_loss


def _target(algorithm: Any, batch: Any, next_values: Tensor) -> Tensor:
    """Return what the value of a step should be, by that of the next one."""
    discounts = getattr(batch, "discounts", None)
    discounts = algorithm.gamma if discounts is None else discounts
    return batch.rewards + (1 - batch.dones) * discounts * next_values


def _dqn(algorithm: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        best = algorithm.q_net_target(batch.next_observations).max(dim=1).values.reshape(-1, 1)
        target = _target(algorithm, batch, best)
    values = torch.gather(algorithm.q_net(batch.observations), dim=1, index=batch.actions.long())
    return F.smooth_l1_loss(values, target)


def _temperature(algorithm: Any) -> Tensor:
    if algorithm.ent_coef_optimizer is not None and algorithm.log_ent_coef is not None:
        return torch.exp(algorithm.log_ent_coef.detach())
    return algorithm.ent_coef_tensor


def _lowest(values: tuple[Tensor, ...]) -> Tensor:
    return torch.min(torch.cat(values, dim=1), dim=1, keepdim=True).values


def _squares(algorithm: Any, batch: Any, target: Tensor) -> Tensor:
    values = algorithm.critic(batch.observations, batch.actions)
    return torch.stack([F.mse_loss(value, target) for value in values]).sum()


def _sac_critic(algorithm: Any, batch: Any) -> Tensor:
    if algorithm.use_sde:
        algorithm.actor.reset_noise()
    with torch.no_grad():
        algorithm.actor.action_log_prob(batch.observations)  # which draws first
        actions, log_prob = algorithm.actor.action_log_prob(batch.next_observations)
        lowest = _lowest(algorithm.critic_target(batch.next_observations, actions))
        target = _target(algorithm, batch, lowest - _temperature(algorithm) * log_prob.reshape(-1, 1))
    return 0.5 * _squares(algorithm, batch, target)


def _sac_actor(algorithm: Any, batch: Any) -> Tensor:
    if algorithm.use_sde:
        algorithm.actor.reset_noise()
    actions, log_prob = algorithm.actor.action_log_prob(batch.observations)
    lowest = _lowest(algorithm.critic(batch.observations, actions))
    return (_temperature(algorithm) * log_prob.reshape(-1, 1) - lowest).mean()


def _td3_critic(algorithm: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        noise = torch.empty_like(batch.actions).normal_(0, algorithm.target_policy_noise)
        noise = noise.clamp(-algorithm.target_noise_clip, algorithm.target_noise_clip)
        actions = (algorithm.actor_target(batch.next_observations) + noise).clamp(-1, 1)
        target = _target(algorithm, batch, _lowest(algorithm.critic_target(batch.next_observations, actions)))
    return _squares(algorithm, batch, target)


def _td3_actor(algorithm: Any, batch: Any) -> Tensor:
    return -algorithm.critic.q1_forward(batch.observations, algorithm.actor(batch.observations)).mean()


def _policy(algorithm: Any) -> nn.Module:
    return algorithm.policy


def _actor(algorithm: Any) -> nn.Module:
    return algorithm.actor


def _critic(algorithm: Any) -> nn.Module:
    return algorithm.critic


_LOSSES: tuple[tuple[type, dict[str, Loss]], ...] = (
    (PPO, {"": Loss(_policy, _ppo)}),
    (A2C, {"": Loss(_policy, _a2c)}),
    (DQN, {"": Loss(lambda algorithm: algorithm.q_net, _dqn)}),
    (SAC, {"actor": Loss(_actor, _sac_actor), "critic": Loss(_critic, _sac_critic)}),
    (TD3, {"actor": Loss(_actor, _td3_actor), "critic": Loss(_critic, _td3_critic)}),
)
