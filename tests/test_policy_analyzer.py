"""The class interface for policies, on the example, on stable-baselines3 as it is, on healthy policies."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.errors import ModelInputError, NotAnalyzedError, UnknownLayerError
from gradflow.pipelines import Pipeline, flow, policy
from gradflow.report import policy_text, summary_text
from tests.example_modules import example_module
from tests.functional.snapshots import difference, snapshot
from tests.policies import (
    ActorCritic,
    Gaussian,
    Mixed,
    Plain,
    actor_critic_loss,
    batch,
    gaussian_loss,
    mixed_loss,
)

Normal = torch.distributions.Normal


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("gymnasium")
    return example_module("greedy_policy")


def above_low(results: Any) -> list[str]:
    return [str(i) for i in results.gradient_issues if i.severity > gf.IssueSeverity.LOW]


def analysed(built: tuple[Any, ...], **names: Any) -> Any:
    model, batches, loss_fn, optimizer = built
    return gf.RLPolicyAnalyzer(model, **names).analyze(batches, loss_fn, steps=40, optimizer=optimizer)


def test_the_numbers_of_the_example_tell_the_sick_model_from_its_repair(example: ModuleType) -> None:
    names = {
        "policy_head_name": "actor",
        "value_head_name": "critic",
        "shared_backbone_name": "trunk",
    }
    sick, repaired = (analysed(build(), **names) for build in (example.build, example.repaired))
    a, b = sick.policy_distribution_stats, repaired.policy_distribution_stats
    for found in (a, b):
        known = {f.name for f in attrs.fields(type(found))} - {"assumptions", "std_min", "std_max"}
        assert [n for n in known if not math.isfinite(getattr(found, n))] == []
    assert a.mean_entropy < b.mean_entropy
    assert a.last_entropy < 0.1 * b.last_entropy
    assert a.entropy_share < b.entropy_share
    assert a.max_action_prob > b.max_action_prob
    assert a.deterministic_share > b.deterministic_share == 0
    assert sick.gradient_issues[0].layer == "actor"
    assert sick.gradient_issues[0].issue_type is gf.IssueType.SATURATION
    assert sick.gradient_issues[0].severity >= gf.IssueSeverity.MEDIUM
    assert above_low(repaired) == []
    assert not sick.report.ok
    assert repaired.report.ok


def test_results_are_those_of_diagnose_with_the_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    model, data = ActorCritic(), batch()
    analyzer = gf.RLPolicyAnalyzer(model)
    with pytest.raises(NotAnalyzedError, match="RLPolicyAnalyzer: nothing was analysed yet"):
        analyzer.record  # noqa: B018
    results = analyzer.analyze([data.states] * 3, actor_critic_loss(data))
    report = gf.diagnose(model, [data.states] * 3, actor_critic_loss(data), pipeline=policy())
    assert results.report.record == report.record == analyzer.record
    assert results.gradient_issues == report.issues
    assert report.record.policy is not None
    assert results.policy_distribution_stats == report.record.policy.statistics()
    analyzer.print_summary(results)
    text = policy_text(results.policy_distribution_stats)
    assert capsys.readouterr().out == f"{summary_text(results.gradient_issues)}\n\n{text}\n"
    assert "Policy heads, by default: action_head" in text
    assert "cosine of the two" in text
    assert "deviation" not in text  # there is none, and NaN is left out


def test_a_forward_of_ones_own() -> None:
    model, data = ActorCritic(), batch()
    steps: list[int] = []

    def forward(m: nn.Module, step: int) -> Any:
        steps.append(step)
        return m(data.states)

    analyzer = gf.RLPolicyAnalyzer(model)
    own = analyzer.analyze(loss_fn=actor_critic_loss(data), steps=3, forward_fn=forward)
    other = analyzer.analyze(lambda: data.states, actor_critic_loss(data), steps=3)
    assert steps == [0, 1, 2]
    assert own.policy_distribution_stats == other.policy_distribution_stats
    with pytest.raises(ModelInputError, match="was given neither of input_fn and forward_fn"):
        analyzer.analyze(loss_fn=actor_critic_loss(data))
    with pytest.raises(ModelInputError, match="was given both of input_fn and forward_fn"):
        analyzer.analyze([data.states], actor_critic_loss(data), forward_fn=forward)


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    analyzer = gf.RLPolicyAnalyzer(ActorCritic(), policy_head_name="action_haed")
    with pytest.raises(UnknownLayerError, match="no entry named 'action_haed'. The nearest .*action_head"):
        analyzer.analyze([batch().states], actor_critic_loss(batch()))


def test_the_pipeline_is_a_composition() -> None:
    base = Pipeline("mine", [gf.dead()])
    joined = policy(base, policy_head_name="pi")
    assert joined.name == "mine+policy"
    assert len(joined.detectors) == 1 + 7
    assert len(policy().detectors) == len(flow().detectors) + 7
    assert len((policy() + policy()).measurements) == 1


# ------------------------------------------------------------------------------------ sick


@pytest.mark.parametrize("cut", [Tensor.detach, lambda p: p.argmax(-1, keepdim=True).float()])
def test_a_policy_that_the_loss_does_not_reach_is_found(cut: Any) -> None:
    data = batch()

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        taken = cut(output[0]).mean(-1)
        return -(taken * data.returns).mean() + F.mse_loss(output[1].flatten(), data.returns)

    results = gf.RLPolicyAnalyzer(ActorCritic()).analyze(lambda: data.states, loss, steps=4)
    worst = results.gradient_issues[0]
    assert (worst.issue_type, worst.layer) == (gf.IssueType.DEAD, "action_head")
    assert worst.severity >= gf.IssueSeverity.HIGH
    assert results.policy_distribution_stats.policy_grad_norm == 0
    assert len([i for i in results.gradient_issues if i.layer == "action_head"]) == 1  # told once


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_value_that_dominates_is_found_whatever_width_scale_and_dtype(
    width: int, scale: float, dtype: torch.dtype
) -> None:
    data = batch(dtype)
    model = Plain()
    model.fc1, model.fc2, model.fc3 = nn.Linear(4, width), nn.Linear(width, 3), nn.Linear(width, 1)
    model.to(dtype)

    def loss_of(reward: float) -> Callable[[Any], Tensor]:
        def loss(output: Any) -> Tensor:
            gain = data.returns - data.returns.mean()
            taken = output[0].log_softmax(-1).gather(1, data.choices[:, None]).flatten()
            worth = F.mse_loss(output[1].flatten(), reward * data.returns)
            return scale * (-(taken * gain).mean() + worth)

        return loss

    sick, healthy = (
        gf.RLPolicyAnalyzer(model, policy_head_name="fc2").analyze(lambda: data.states, loss_of(r), steps=4)
        for r in (1e6, 1.0)
    )
    worst = sick.gradient_issues[0]
    assert (worst.issue_type, worst.layer) == (gf.IssueType.EXPLODING, "fc3")
    assert above_low(healthy) == []
    assert sick.policy_distribution_stats.gradient_ratio < 1e-4
    assert healthy.policy_distribution_stats.gradient_ratio > 1e-2


def test_opposed_gradients_are_found() -> None:
    data = batch()
    model = Plain(lambda x, v: (x, v))
    with torch.no_grad():
        model.fc3.weight.copy_(model.fc2.weight[:1] - model.fc2.weight[1:2])

    def loss(output: Any) -> Tensor:  # what the one pulls up along a direction, the other pushes down
        logits, value = output
        return (logits[:, 0] - logits[:, 1]).mean() - 0.9 * value.mean() + 0.0 * logits.log_softmax(-1).mean()

    results = gf.RLPolicyAnalyzer(model, "fc2", "fc3").analyze(lambda: data.states, loss, steps=5)
    (issue,) = [i for i in results.gradient_issues if "gradient_cosine" in i.metrics]
    assert (issue.severity, issue.layer) == (gf.IssueSeverity.MEDIUM, "fc1")
    assert results.policy_distribution_stats.gradient_cosine == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize(
    ("log_std", "kind"), [(-9.0, gf.IssueType.SATURATION), (4.0, gf.IssueType.EXPLODING), (0.0, None)]
)
def test_a_deviation_out_of_range_is_found(log_std: float, kind: Any) -> None:
    data = batch()
    model = Gaussian(lambda mean, log_std: Normal(mean, log_std.exp()))
    nn.init.constant_(model.log_std, log_std)
    results = gf.RLPolicyAnalyzer(model).analyze(lambda: data.states, gaussian_loss(data), steps=4)
    found = [i.issue_type for i in results.gradient_issues if "std_min" in i.metrics]
    assert found == ([kind] if kind else [])
    assert results.policy_distribution_stats.std_min == pytest.approx(math.exp(log_std), rel=1e-5)


def test_a_policy_that_is_sure_from_the_start_is_found() -> None:
    data = batch()
    model = ActorCritic()
    with torch.no_grad():
        model.action_head.weight.mul_(300)
    results = gf.RLPolicyAnalyzer(model).analyze(lambda: data.states, actor_critic_loss(data), steps=4)
    worst = [
        i
        for i in results.gradient_issues
        if "entropy_share" in i.metrics or "deterministic_share" in i.metrics
    ]
    assert [(i.layer, i.issue_type) for i in worst] == [("action_head", gf.IssueType.SATURATION)]
    assert worst[0].severity >= gf.IssueSeverity.MEDIUM


# ------------------------------------------------------------------------------------ healthy


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("train", [False, True])
def test_no_false_alarm_at_pytorchs_initialisation(seed: int, train: bool) -> None:
    data = batch(samples=256)
    torch.manual_seed(seed)
    cases = [
        (ActorCritic(), actor_critic_loss(data)),
        (Plain(lambda x, v: (torch.distributions.Categorical(logits=x), v)), actor_critic_loss(data)),
        (Gaussian(lambda mean, log_std: Normal(mean, log_std.exp())), gaussian_loss(data)),
        (Mixed(), mixed_loss(data)),
    ]
    for model, loss in cases:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3) if train else None
        results = gf.RLPolicyAnalyzer(model).analyze(lambda: data.states, loss, 20, optimizer)
        assert above_low(results) == []


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("name", ["PPO", "A2C"])
@pytest.mark.parametrize("train", [False, True])
def test_policies_of_stable_baselines3_as_they_are(env: str, name: str, train: bool) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    algorithm = getattr(sb3, name)("MlpPolicy", env, device="cpu", seed=0, n_steps=256)
    algorithm.learn(256)  # fills the buffer with a rollout, and makes the first updates
    model, buffer = algorithm.policy, algorithm.rollout_buffer
    drawn: list[Any] = []

    def evaluate(m: Any, step: int) -> Any:
        data = next(iter(buffer.get(64)))
        drawn.append(data)
        actions = data.actions.long().flatten() if env.startswith("Cart") else data.actions
        return m.evaluate_actions(data.observations, actions)

    def loss(output: Any) -> Tensor:
        value, log_prob, entropy = output
        gain = drawn[-1].advantages
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        worth = F.mse_loss(value.flatten(), drawn[-1].returns)
        return -(gain * log_prob).mean() + 0.5 * worth - 0.01 * entropy.mean()

    before = snapshot(model)
    results = gf.RLPolicyAnalyzer(model).analyze(
        None, loss, steps=10, optimizer=model.optimizer if train else None, forward_fn=evaluate
    )
    assert difference(before, snapshot(model)) == ""
    found = results.report.record.policy
    assert found is not None
    assert (found.policy_heads, found.value_heads) == (("action_net",), ("value_net",))
    assert above_low(results) == []
    numbers = results.policy_distribution_stats
    if not train:
        observed = torch.cat([d.observations for d in drawn if d is drawn[0]])
        expected = float(model.get_distribution(observed).entropy().detach().mean())
        assert found.entropy[0] == pytest.approx(expected, rel=1e-4)
    if env.startswith("Cart"):
        assert 0.9 * math.log(2) < numbers.first_entropy <= math.log(2)
    else:
        assert numbers.std_min == pytest.approx(1.0, rel=0.1)
        assert found.distributions[0].parameters == ("log_std",)


def test_the_forward_of_stable_baselines3_is_called_with_observations_alone() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model, data = sb3.PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0).policy, batch()

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        _, value, log_prob = output
        return -(log_prob * data.returns).mean() + F.mse_loss(value.flatten(), data.returns)

    results = gf.RLPolicyAnalyzer(model, policy_head_name="action_net", value_head_name="value_net").analyze(
        lambda: data.states, loss, steps=4
    )
    assert results.policy_distribution_stats.mean_entropy == pytest.approx(math.log(2), abs=1e-3)
    assert above_low(results) == []


def test_a_convolutional_policy_shares_its_features() -> None:
    pytest.importorskip("stable_baselines3")
    import numpy as np
    from gymnasium import spaces
    from stable_baselines3.common.policies import ActorCriticCnnPolicy

    torch.manual_seed(0)
    model = ActorCriticCnnPolicy(
        spaces.Box(0, 255, (4, 36, 36), np.uint8), spaces.Discrete(4), lambda _: 1e-3
    )
    images, returns = torch.randint(0, 255, (16, 4, 36, 36)), torch.randn(16)

    def loss(output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        _, value, log_prob = output
        return -(log_prob * returns).mean() + F.mse_loss(value.flatten(), returns)

    results = gf.RLPolicyAnalyzer(model).analyze(lambda: images, loss, steps=2)
    found = results.report.record.policy
    assert found is not None
    assert found.backbone[0] == "features_extractor.cnn.0"
    assert math.isfinite(results.policy_distribution_stats.gradient_cosine)
    assert above_low(results) == []


def actor_of_sac(model: Any, states: Tensor) -> Tensor:
    action, log_prob = model.actor.action_log_prob(states)
    worth = torch.cat(model.critic(states, action), 1).min(1).values
    return (0.2 * log_prob - worth).mean()


def critic_of_sac(model: Any, states: Tensor) -> Tensor:
    with torch.no_grad():
        action, log_prob = model.actor.action_log_prob(states)
        worth = torch.cat(model.critic_target(states, action), 1).min(1).values - 0.2 * log_prob
    return sum(F.mse_loss(q.flatten(), worth) for q in model.critic(states, action))  # type: ignore[return-value]


@pytest.mark.parametrize("loss", [actor_of_sac, critic_of_sac])
def test_sac_of_stable_baselines3_as_it_is(loss: Any) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.SAC("MlpPolicy", "Pendulum-v1", device="cpu", seed=0).policy
    states = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    results = gf.RLPolicyAnalyzer(model).analyze(
        loss_fn=None, steps=4, forward_fn=lambda m, step: loss(m, states)
    )
    found = results.report.record.policy
    assert found is not None
    assert "actor.mu" in found.policy_heads
    assert found.value_heads == ("critic.qf0.4", "critic.qf1.4")
    assert found.distributions[0].family == "Normal"
    assert found.shared_parameters == ()
    assert above_low(results) == []
    if loss is actor_of_sac:
        assert found.policy_heads == ("actor.mu", "actor.log_std")
        parameters = dict(model.actor.named_parameters())
        torch.manual_seed(0)
        twin = gf.analyze_custom(
            model, lambda m, step: loss(m, states), steps=1, seed=0, measurements=policy().measurements
        )
        torch.manual_seed(0)
        found_by_hand = torch.autograd.grad(loss(model, states), list(parameters.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in found_by_hand))
        assert twin.policy is not None
        assert twin.policy.policy_grad_norm[0] == pytest.approx(norm, rel=1e-4)


def test_the_forward_of_sac_runs_the_actor_alone() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.SAC("MlpPolicy", "Pendulum-v1", device="cpu", seed=0).policy
    states = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    results = gf.RLPolicyAnalyzer(model).analyze(lambda: states, lambda a: a.square().mean(), steps=3)
    assert above_low(results) == []
    named = {i.layer: i.severity for i in results.gradient_issues}
    assert named["critic"] is named["critic_target"] is gf.IssueSeverity.LOW
