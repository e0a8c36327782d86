"""The callback for stable-baselines3, with its real algorithms."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradflow as gf
from tests.integrations.trainings import bits

pytest.importorskip("stable_baselines3")
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.logger import configure
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

from gradflow.integrations import stable_baselines3 as sb3
from gradflow.integrations.stable_baselines3 import GradflowCallback

SMALL = {"net_arch": [16, 16]}
ALGORITHMS: dict[str, tuple[Any, str, dict[str, Any], int]] = {
    "PPO": (PPO, "CartPole-v1", {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "clip_range_vf": 0.2}, 640),
    "PPO of real actions": (PPO, "Pendulum-v1", {"n_steps": 32, "batch_size": 16, "use_sde": True}, 320),
    "A2C": (A2C, "CartPole-v1", {"ent_coef": 0.01}, 300),
    "A2C, normalized": (A2C, "CartPole-v1", {"normalize_advantage": True}, 300),
    "DQN": (DQN, "CartPole-v1", {"learning_starts": 40, "batch_size": 8, "train_freq": 2}, 200),
    "DQN of several steps": (DQN, "CartPole-v1", {"learning_starts": 40, "batch_size": 8, "n_steps": 3}, 120),
    "SAC": (SAC, "Pendulum-v1", {"learning_starts": 40, "batch_size": 8}, 62),
    "SAC of one temperature": (
        SAC,
        "Pendulum-v1",
        {"learning_starts": 40, "ent_coef": 0.1, "use_sde": True},
        100,
    ),
    "TD3": (TD3, "Pendulum-v1", {"learning_starts": 40, "batch_size": 8, "train_freq": 1}, 62),
    "DDPG": (DDPG, "Pendulum-v1", {"learning_starts": 40, "batch_size": 8, "train_freq": 1}, 62),
}


def made(name: str, **more: Any) -> Any:
    kind, env, options, _ = ALGORITHMS[name]
    options = {"policy_kwargs": dict(SMALL), **options, **more}
    return kind("MlpPolicy", env, seed=0, device="cpu", **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_training_is_the_same(name: str) -> None:
    plain, callback = made(name).learn(ALGORITHMS[name][3]), GradflowCallback(every=4)
    plain_bits = bits(plain.policy)
    watched = made(name).learn(ALGORITHMS[name][3], callback=callback)
    assert bits(watched.policy) == plain_bits
    assert watched.policy.training == plain.policy.training
    for monitor in callback.monitors.values():
        assert monitor.history.steps.tolist()[:4] == [0, 1, 4, 8]
        assert not any("could not be looked at" in note for note in monitor.history.notes)
    assert list(callback.monitors) == (["actor", "critic"] if name[:3] in ("SAC", "TD3", "DDP") else [""])


class Logged(GradflowCallback):
    """Keeps what `train()` logs, round by round."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounds: list[dict[str, float]] = []

    def _on_rollout_start(self) -> None:
        if any(name.startswith("train/") for name in self.logger.name_to_value):
            self.rounds.append(dict(self.logger.name_to_value))


# what is logged is the mean over a round's minibatches, or the loss of the last: with one, that of the look
ONE = {
    "PPO": ({"batch_size": 32, "n_epochs": 1}, {"": "train/loss"}),
    "DQN": ({}, {"": "train/loss"}),
    "DQN of several steps": ({}, {"": "train/loss"}),
    "SAC": ({}, {"critic": "train/critic_loss"}),
    "TD3": ({}, {"critic": "train/critic_loss"}),
    "DDPG": ({}, {"critic": "train/critic_loss"}),
}


@pytest.mark.parametrize("name", ONE)
def test_the_loss_is_the_algorithms_own(name: str) -> None:
    """It is what `train()` logs of the minibatch that it draws next; the temperature of SAC has moved."""
    options, keys = ONE[name]
    callback, algorithm = Logged(every=1), made(name, **options)
    algorithm.learn(ALGORITHMS[name][3], callback=callback, log_interval=10**9)
    for part, key in keys.items():
        logged = [row[key] for row in callback.rounds]
        seen = callback.monitors[part].history["loss"][: len(logged)].tolist()
        assert len(logged) > 15
        assert seen == pytest.approx(logged, rel=1e-3 if name == "SAC" else 1e-5)


def test_the_loss_of_a2c_is_made_of_what_it_logs() -> None:
    callback, algorithm = Logged(every=1), made("A2C")
    algorithm.learn(300, callback=callback, log_interval=10**9)
    expected = [
        row["train/policy_loss"] + 0.01 * row["train/entropy_loss"] + 0.5 * row["train/value_loss"]
        for row in callback.rounds
    ]
    assert callback.history["loss"][: len(expected)].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["SAC", "TD3"])
def test_the_actors_loss_is_the_algorithms_own(name: str) -> None:
    """`train()` computes it after the critic's step, so the critic stands still here."""
    options = {"ent_coef": 0.1} if name == "SAC" else {"policy_delay": 1}
    callback, algorithm = Logged(every=1), made(name, **options)
    for group in algorithm.critic.optimizer.param_groups:
        group["lr"] = 0.0
    algorithm._update_learning_rate = lambda optimizers: None
    algorithm.learn(62, callback=callback, log_interval=10**9)
    logged = [row["train/actor_loss"] for row in callback.rounds]
    seen = callback.monitors["actor"].history["loss"][: len(logged)].tolist()
    assert len(logged) > 15
    assert seen == pytest.approx(logged, rel=1e-4)


def test_observations_of_several_parts_and_environments() -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.envs import SimpleMultiObsEnv

    def learnt(callback: Any = None) -> Any:
        np.random.seed(0)  # by which the environment makes its observations up
        env = make_vec_env(SimpleMultiObsEnv, n_envs=2, seed=0, env_kwargs={"random_start": True})
        options = {"n_steps": 16, "batch_size": 8, "n_epochs": 1}
        policy = {"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}}
        return PPO("MultiInputPolicy", env, seed=0, device="cpu", policy_kwargs=policy, **options).learn(
            160, callback
        )

    plain, callback = bits(learnt().policy), GradflowCallback(every=2)
    assert bits(learnt(callback).policy) == plain
    assert callback.history.steps.tolist() == [0, 1, 2, 4]
    assert callback.history.notes == ()


def test_the_logger_gets_the_scalars_where_asked(tmp_path: Path) -> None:
    algorithm, callback = made("SAC"), GradflowCallback(every=10, log="few", path=tmp_path / "history.jsonl")
    algorithm.set_logger(configure(str(tmp_path), ["csv"]))
    seen: dict[str, float] = {}
    callback.on_look(lambda report, step: seen.update(callback.logger.name_to_value))
    algorithm.learn(100, callback=callback, log_interval=10**9)
    algorithm.logger.close()
    assert {"gradflow/actor/loss", "gradflow/critic/loss", "gradflow/critic/issues/high"} <= seen.keys()
    for part in ("actor", "critic"):
        history = gf.read_history(tmp_path / f"history-{part}.jsonl")
        assert history.steps.tolist() == callback.monitors[part].history.steps.tolist()


def test_trouble_is_told() -> None:
    algorithm, told = made("PPO", policy_kwargs={**SMALL, "activation_fn": nn.ReLU}), []
    with torch.no_grad():
        algorithm.policy.mlp_extractor.policy_net[2].bias.fill_(-100.0)
    callback = GradflowCallback(every=4)
    callback.on_issue(lambda issue, step: told.append((issue.issue_type.value, step)))
    algorithm.learn(320, callback=callback)
    assert "DEAD" in [kind for kind, _ in told]


def test_another_algorithm_needs_its_losses() -> None:
    class Other(OnPolicyAlgorithm):
        def train(self) -> None:
            pass

    def other() -> Any:
        options = {"n_steps": 8, "gamma": 0.9, "gae_lambda": 1.0, "ent_coef": 0.0, "vf_coef": 0.5}
        return Other(
            ActorCriticPolicy, "CartPole-v1", learning_rate=1e-3, max_grad_norm=0.5, use_sde=False,
            sde_sample_freq=-1, seed=0, device="cpu", **options,
        )  # fmt: skip

    with pytest.raises(gf.GradflowError, match="the losses of Other are not known. Pass them: `losses="):
        other().learn(32, callback=GradflowCallback())

    def values(algorithm: Any, batch: Any) -> torch.Tensor:
        value, log_prob, _ = algorithm.policy.evaluate_actions(batch.observations, batch.actions.flatten())
        return value.square().mean() - log_prob.mean()

    loss = sb3.Loss(lambda algorithm: algorithm.policy, values)
    callback = GradflowCallback(every=2, losses={"": loss})
    other().learn(32, callback=callback)
    assert callback.history.steps.tolist() == [0, 1, 2]


def test_without_stable_baselines3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gradflow.integrations.stable_baselines3")
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ImportError, match=r"pip install 'gradient-flow\[sb3\]'"):
        importlib.import_module("gradflow.integrations.stable_baselines3")
