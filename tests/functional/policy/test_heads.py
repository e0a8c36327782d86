"""Heads by name: those that are named, those whose names tell, and what only looks like a policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from torch import Tensor, distributions, nn
from torch.nn import functional as F

from gradflow.errors import ModelInputError, UnknownLayerError
from gradflow.functional.policy.scene import kind_of_name
from tests.functional.policy.models import measured
from tests.policies import (
    ACTIONS,
    STATE,
    ActorCritic,
    Gaussian,
    Plain,
    actor_critic_loss,
    batch,
    gaussian_loss,
)

Categorical, Normal = distributions.Categorical, distributions.Normal


def test_heads_and_backbone_that_are_named() -> None:
    model, data = ActorCritic(), batch()
    by_itself = measured(model, actor_critic_loss(data))
    named = measured(
        model,
        actor_critic_loss(data),
        policy_head_name="action_head",
        value_head_name=["value_head"],
        shared_backbone_name="affine1",
    )
    assert [a for a in named.assumptions if "by default" in a] == []
    assert len([a for a in by_itself.assumptions if "by default" in a]) == 2
    np.testing.assert_array_equal(named.policy_grad_norm, by_itself.policy_grad_norm)
    wrong = measured(model, actor_critic_loss(data), shared_backbone_name="action_head")
    assert any("No parameter of the backbone" in said for said in wrong.assumptions)
    assert np.isnan(wrong.gradient_cosine).all()


def test_a_container_can_be_a_head() -> None:
    model, data = Gaussian(lambda mean, log_std: Normal(mean, log_std.exp())), batch()
    found = measured(model, gaussian_loss(data), policy_head_name="actor", value_head_name="critic")
    by_itself = measured(model, gaussian_loss(data))
    np.testing.assert_allclose(found.policy_grad_norm, by_itself.policy_grad_norm)
    np.testing.assert_allclose(
        found.policy_head_grad_norm, by_itself.policy_grad_norm
    )  # all is the head's own
    assert found.distributions[0].heads == ("actor.2",)


def test_the_model_itself_can_be_the_policy() -> None:
    model, data = nn.Linear(STATE, ACTIONS), batch()
    found = measured(model, lambda y: F.cross_entropy(y, data.choices))
    assert (found.policy_heads, found.value_heads) == (("",), ())
    assert "(model)" in found.assumptions[0]
    assert np.isnan(found.value_grad_norm).all()
    assert math.isnan(found.statistics().gradient_ratio)


@pytest.mark.parametrize("keyword", ["policy_head_name", "value_head_name", "shared_backbone_name"])
def test_a_wrong_name_is_an_error_with_the_nearest(keyword: str) -> None:
    with pytest.raises(UnknownLayerError, match=r"no entry named 'acton_head'. The nearest .*: action_head"):
        measured(ActorCritic(), actor_critic_loss(batch()), **{keyword: "acton_head"})
    with pytest.raises(ModelInputError, match="a head or backbone was given as a Linear, not by name"):
        measured(ActorCritic(), actor_critic_loss(batch()), **{keyword: [nn.Linear(1, 1)]})


def test_names_that_tell() -> None:
    policy = ["actor", "pi", "net.action_net", "policyHead", "critic.actor", "mu", "log_std", "heads.logits"]
    value = ["critic", "value_net.2", "qf0", "actor.value", "VHead", "q_net"]
    assert {kind_of_name(n) for n in policy} == {"policy"}
    assert {kind_of_name(n) for n in value} == {"value"}
    assert {kind_of_name(n) for n in ["fc2", "", "trunk.0", "quality", "actor_critic", "piano"]} == {""}


def test_names_in_the_output_tell_too() -> None:
    model = Plain(lambda x, v: {"logits": x, "state_value": v.expand(-1, 2)})
    found = measured(model, lambda out: out["logits"].square().mean() + out["state_value"].mean())
    assert (found.policy_heads, found.value_heads) == (("fc2",), ("fc3",))


def test_a_model_without_a_policy_says_so() -> None:
    model = nn.Sequential(nn.Linear(STATE, 8), nn.Tanh(), nn.Linear(8, 5))
    found = measured(model, lambda y: y.square().mean())
    assert (found.policy_heads, found.value_heads, found.distributions) == ((), (), ())
    assert "No policy head was found" in found.assumptions[0]
    assert "No value head was found" in found.assumptions[1]
    assert math.isnan(found.statistics().policy_grad_norm)


def test_the_softmax_of_a_gate_or_of_a_critic_is_no_policy() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.out, self.critic = nn.Linear(STATE, 4), nn.Linear(4, ACTIONS), nn.Linear(4, 11)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.gate(x).softmax(-1) * x
            return self.out(h), self.critic(h).log_softmax(-1)

    data = batch()
    found = measured(
        Gated(), lambda out: F.cross_entropy(out[0], data.choices) - out[1][:, 3].mean()
    )  # a critic of eleven atoms
    assert (found.policy_heads, found.value_heads) == (("out",), ("critic",))


def test_a_head_that_is_not_called() -> None:
    model = ActorCritic()
    model.spare = nn.Linear(2, 2)
    found = measured(model, actor_critic_loss(batch()), policy_head_name="spare")
    assert any("'spare' was not called in step 0" in said for said in found.assumptions)
    assert not found.policy_reached.any()
