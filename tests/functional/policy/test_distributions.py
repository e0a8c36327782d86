"""What a head gives: distributions of every kind, what tells them apart, and what is assumed of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from tests.functional.policy.models import mean_of, measured, mixture, tanh_normal
from tests.policies import (
    ACTIONS,
    SAMPLES,
    STATE,
    Gaussian,
    Mixed,
    Plain,
    actor_critic_loss,
    batch,
    gaussian_loss,
    mixed_loss,
    policy_loss,
    value_loss,
)

Categorical, Normal = distributions.Categorical, distributions.Normal


def hand_written(data: Any, given: str) -> Callable[[Any], Tensor]:
    """Return a loss that makes log probabilities of what the policy gives, without `torch.distributions`."""

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        x, value = output
        log = {"logits": lambda: x.log_softmax(-1), "probs": x.log, "logs": lambda: x}[given]()
        taken = log.gather(1, data.choices[:, None]).squeeze(1)
        return policy_loss(taken, value, data.returns) + value_loss(value, data.returns)

    return loss


@pytest.mark.parametrize(
    ("form", "given", "taken_for", "evidence"),
    [
        (lambda x, v: (x, v), "logits", "logits", "log_softmax was applied"),
        (lambda x, v: (x.softmax(-1), v), "probs", "logits", "softmax was applied"),
        (lambda x, v: (x.log_softmax(-1), v), "logs", "logits", "log_softmax was applied"),
        (lambda x, v: (x.exp() / x.exp().sum(-1, True), v), "probs", "probabilities", "are normalised"),
        (lambda x, v: (x - x.exp().sum(-1, True).log(), v), "logs", "log-probabilities", "are normalised"),
    ],
)
def test_logits_probabilities_and_their_logarithms_are_told_apart(
    form: Any, given: str, taken_for: str, evidence: str
) -> None:
    model, data = Plain(form), batch()
    names = {"policy_head_name": "fc2"} if "normalised" in evidence else {}
    found = measured(model, hand_written(data, given), **names)
    assert (found.policy_heads, found.value_heads) == (("fc2",), ("fc3",))
    (made,) = found.distributions
    assert made.given == taken_for
    assert evidence in made.evidence
    assert not made.assumed
    logits = model.fc2(model.fc1(data.states).tanh())
    np.testing.assert_allclose(found.entropy, mean_of(Categorical(logits=logits).entropy()), rtol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, v: (Categorical(logits=x), v),
        lambda x, v: (Categorical(probs=x.softmax(-1)), v),
        lambda x, v: {"distribution": Categorical(logits=x), "v": v},
        lambda x, v: [Categorical(logits=x), v],
    ],
)
def test_distributions_in_the_output(form: Any) -> None:
    model, data = Plain(form), batch()

    def loss(output: Any) -> Tensor:
        return actor_critic_loss(data)(tuple(output.values() if isinstance(output, dict) else output))

    found = measured(model, loss)
    assert (found.policy_heads, found.value_heads) == (("fc2",), ("fc3",))
    logits = model.fc2(model.fc1(data.states).tanh())
    np.testing.assert_allclose(found.entropy, mean_of(Categorical(logits=logits).entropy()), rtol=1e-5)


@pytest.mark.parametrize(
    ("form", "family", "parts"),
    [
        (lambda m, s: Normal(m, s.exp()), "Normal", 2),
        (lambda m, s: distributions.Independent(Normal(m, s.exp()), 1), "Independent(Normal)", 2),
        (lambda m, s: distributions.MultivariateNormal(m, (2 * s).exp().diag()), "MultivariateNormal", 2),
        (tanh_normal, "TransformedDistribution(Independent(Normal), TanhTransform)", 2),
        (mixture, "MixtureSameFamily(Categorical, Normal)", 2),
    ],
)
def test_continuous_distributions(form: Any, family: str, parts: int) -> None:
    model, data = Gaussian(form), batch()
    found = measured(model, gaussian_loss(data))
    assert (found.policy_heads, found.value_heads) == (("actor.2",), ("critic.2",))
    (made,) = found.distributions
    assert (made.family, made.num_parts, made.parameters) == (family, parts, ("log_std",))
    assert (made.discrete, made.num_samples.tolist()) == (False, [SAMPLES, SAMPLES])
    assert np.isnan(made.entropy_share).all()
    assert made.bounded == ("Tanh" in family)
    if family.startswith(("Normal", "Ind", "Multi")):
        np.testing.assert_allclose(found.entropy, math.log(2 * math.pi * math.e), rtol=1e-5)  # two of std 1
        np.testing.assert_allclose(made.deviation.std_min, 1.0, rtol=1e-5)
    if "Tanh" in family:
        x = model(data.states)[0].sample((4000,))
        estimate = mean_of(-model(data.states)[0].log_prob(x.clamp(-1 + 1e-6, 1 - 1e-6)))
        assert found.entropy[0] == pytest.approx(estimate, abs=0.05)


def test_a_beta_policy() -> None:
    model, data = Gaussian(lambda m, s: distributions.Beta(F.softplus(m) + 1, s.exp() + 1)), batch()

    def loss(output: tuple[Any, Tensor]) -> Tensor:
        log_prob = output[0].log_prob(data.moves.sigmoid()).sum(-1)
        return policy_loss(log_prob, output[1], data.returns) + value_loss(output[1], data.returns)

    (made,) = measured(model, loss).distributions
    expected = mean_of(model(data.states)[0].entropy().sum(-1))
    assert (made.family, made.bounded, made.num_parts) == ("Beta", True, 2)
    np.testing.assert_allclose(made.entropy, expected, rtol=1e-4)


def test_a_gaussian_written_by_hand_is_known_by_its_names() -> None:
    model, data = Gaussian(lambda mean, log_std: (mean, log_std)), batch()

    def loss(output: Any) -> Tensor:
        (mean, log_std), value = output
        log_prob = (-0.5 * ((data.moves - mean) / log_std.exp()) ** 2 - log_std).sum(-1)
        return policy_loss(log_prob, value, data.returns) + value_loss(value, data.returns)

    found = measured(model, loss)
    assert found.policy_heads == ("actor.2",)
    (made,) = found.distributions
    assert (made.given, made.family) == ("mean, log of the standard deviation", "Normal")
    np.testing.assert_allclose(found.entropy, math.log(2 * math.pi * math.e), rtol=1e-5)


def test_mixed_and_several_choices() -> None:
    model, data = Mixed(), batch()
    found = measured(model, mixed_loss(data))
    assert set(found.policy_heads) == {"choose", "move"}
    assert found.value_heads == ("worth",)
    by_kind = sorted((d.family, d.num_actions, d.num_parts) for d in found.distributions)
    assert by_kind == [("Categorical", 2, 1), ("Categorical", 3, 1), ("Normal", 0, 2)]
    out = model(data.states)
    first, second = out["choice"].split([2, 3], -1)
    mean, log_std = out["move"]
    parts = [
        Categorical(logits=first).entropy(),
        Categorical(logits=second).entropy(),
        Normal(mean, log_std.exp()).entropy().sum(-1),
    ]
    np.testing.assert_allclose(found.entropy, sum(mean_of(p) for p in parts), rtol=1e-5)
    assert found.backbone == ("body",)


def test_yes_and_no_in_several_parts() -> None:
    model, data = Plain(lambda x, v: (distributions.Bernoulli(logits=x), v)), batch()
    choices = F.one_hot(data.choices, ACTIONS).float()

    def loss(output: Any) -> Tensor:
        return policy_loss(output[0].log_prob(choices).sum(-1), output[1], data.returns) + value_loss(
            output[1], data.returns
        )

    (made,) = measured(model, loss).distributions
    expected = mean_of(model(data.states)[0].entropy().sum(-1))
    np.testing.assert_allclose(made.entropy, expected, rtol=1e-5)
    assert (made.num_actions, made.num_parts) == (2, ACTIONS)


def test_a_distribution_in_every_time_step_is_one_distribution() -> None:
    data = batch()

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.pi = nn.GRU(STATE, 8, batch_first=True), nn.Linear(8, ACTIONS)

        def forward(self, x: Tensor) -> Tensor:
            return self.pi(self.rnn(x.reshape(8, 4, STATE))[0])

    model = Recurrent()
    choices = data.choices.reshape(8, 4)

    def loss(logits: Tensor) -> Tensor:
        return -sum((Categorical(logits=logits[:, t]).log_prob(choices[:, t]) * 0.5).mean() for t in range(4))  # type: ignore[return-value]

    found = measured(model, loss)
    (made,) = found.distributions
    assert made.num_samples.tolist() == [32, 32]
    expected = mean_of(Categorical(logits=model(data.states)).entropy())
    np.testing.assert_allclose(found.entropy, expected, rtol=1e-5)


def test_an_older_policy_does_not_count() -> None:
    model, data = Plain(), batch()
    old = Plain()

    def loss(output: Any) -> Tensor:
        with torch.no_grad():
            before = Categorical(logits=old(data.states)[0])
            same = Categorical(logits=output[0] * 3)
        now = Categorical(logits=output[0])
        ratio = (now.log_prob(data.choices) - before.log_prob(data.choices)).exp()
        return (ratio * same.entropy()).mean() + output[1].square().mean()

    found = measured(model, loss)
    assert len(found.distributions) == 1
    logits = model(data.states)[0]
    np.testing.assert_allclose(found.entropy, mean_of(Categorical(logits=logits).entropy()), rtol=1e-5)


def test_probabilities_that_are_taken_for_logits_are_noticed() -> None:
    data = batch()
    for form, twice in (
        (lambda x, v: (x.softmax(-1), v), True),
        (lambda x, v: (x.log_softmax(-1), v), False),
    ):
        model = Plain(form)
        made = measured(
            model,
            lambda out: F.cross_entropy(out[0], data.choices) + out[1].square().mean(),
            policy_head_name="fc2",
        ).distributions
        assert [d.normalised_twice for d in made] == [twice]
        seen = measured(
            model, lambda out: -Categorical(logits=out[0]).log_prob(data.choices).mean() + out[1].mean()
        ).distributions
        assert [d.normalised_twice for d in seen] == [twice]


def test_what_nothing_tells_is_assumed_and_said() -> None:
    model = Plain()
    found = measured(
        model,
        lambda out: out[0].square().mean() + out[1].mean(),
        policy_head_name="fc2",
        value_head_name="fc3",
    )
    (made,) = found.distributions
    assert made.assumed
    assert found.assumptions == (
        "The output of fc2 is taken for logits (Categorical), since nothing was seen that tells what it "
        "holds.",
    )
    bounded = measured(Plain(lambda x, v: x.tanh()), lambda a: a.square().mean(), policy_head_name="fc2")
    assert bounded.distributions == ()
    assert any("Nothing tells what fc2 gives" in said for said in bounded.assumptions)
    assert np.isnan(bounded.entropy).all()
    assert math.isnan(bounded.statistics().mean_entropy)
