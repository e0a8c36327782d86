"""`policy_heads`: gradients and entropies by hand, heads that no gradient reaches, and no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.functional import policy_heads
from tests.functional.policy.models import mean_of, measured, mixture, norm_of, tanh_normal
from tests.functional.snapshots import difference, snapshot
from tests.policies import (
    ActorCritic,
    Gaussian,
    Mixed,
    actor_critic_loss,
    batch,
    gaussian_loss,
    mixed_loss,
    policy_loss,
    value_loss,
)

Categorical, Normal = distributions.Categorical, distributions.Normal


# ---------------------------------------------------------------------------------- by hand


def test_gradients_and_entropy_are_those_by_hand() -> None:
    """The numbers equal two separate backward passes, one of the policy's loss and one of the value's."""
    model, data = ActorCritic(), batch()
    found = measured(model, actor_critic_loss(data))
    probs, value = model(data.states)
    d = Categorical(probs)
    policy = policy_loss(d.log_prob(data.choices), value, data.returns)
    worth = value_loss(value, data.returns)
    trunk = dict(model.affine1.named_parameters())
    p_norm, p_row = norm_of(policy, trunk)
    v_norm, v_row = norm_of(worth, trunk)
    assert (found.policy_heads, found.value_heads) == (("action_head",), ("value_head",))
    assert found.shared_parameters == ("affine1.weight", "affine1.bias")
    assert found.backbone == ("affine1",)
    np.testing.assert_allclose(found.policy_grad_norm, p_norm, rtol=1e-5)
    np.testing.assert_allclose(found.value_grad_norm, v_norm, rtol=1e-5)
    np.testing.assert_allclose(found.gradient_ratio, p_norm / v_norm, rtol=1e-5)
    np.testing.assert_allclose(found.gradient_cosine, float(F.cosine_similarity(p_row, v_row, 0)), rtol=1e-4)
    own_p, _ = norm_of(policy, dict(model.action_head.named_parameters()))
    own_v, _ = norm_of(worth, dict(model.value_head.named_parameters()))
    np.testing.assert_allclose(found.policy_head_grad_norm, own_p, rtol=1e-5)
    np.testing.assert_allclose(found.value_head_grad_norm, own_v, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, mean_of(d.entropy()), rtol=1e-5)
    (made,) = found.distributions
    np.testing.assert_allclose(made.max_prob, mean_of(probs.amax(-1)), rtol=1e-5)
    np.testing.assert_allclose(made.largest_prob, float(probs.detach().max()), rtol=1e-5)
    numbers = found.statistics()
    assert numbers.mean_entropy == pytest.approx(mean_of(d.entropy()), rel=1e-5)
    assert numbers.max_action_prob == pytest.approx(mean_of(probs.amax(-1)), rel=1e-5)
    assert numbers.gradient_ratio == pytest.approx(p_norm / v_norm, rel=1e-5)
    assert numbers.first_entropy == numbers.last_entropy == found.entropy[0]


def test_without_shared_parameters_the_norms_are_of_all_that_each_depends_on() -> None:
    model, data = Gaussian(lambda mean, log_std: Normal(mean, log_std.exp())), batch()
    found = measured(model, gaussian_loss(data))
    d, value = model(data.states)
    log_prob = d.log_prob(data.moves.clamp(-0.9, 0.9)).sum(-1)
    actor = {n: p for n, p in model.named_parameters() if not n.startswith("critic")}
    p_norm, _ = norm_of(policy_loss(log_prob, value, data.returns), actor)
    v_norm, _ = norm_of(value_loss(value, data.returns), dict(model.critic.named_parameters()))
    np.testing.assert_allclose(found.policy_grad_norm, p_norm, rtol=1e-5)
    np.testing.assert_allclose(found.value_grad_norm, v_norm, rtol=1e-5)
    assert np.isnan(found.gradient_cosine).all()
    assert "share no parameters" in found.assumptions[-1]
    head = {"w": model.actor[2].weight, "b": model.actor[2].bias, "log_std": model.log_std}
    own, _ = norm_of(policy_loss(log_prob, value, data.returns), head)
    np.testing.assert_allclose(found.policy_head_grad_norm, own, rtol=1e-5)
    assert found.distributions[0].parameters == ("log_std",)


def test_the_numbers_follow_an_optimizer() -> None:
    model, data = ActorCritic(), batch()
    record = gf.analyze(
        model,
        [data.states] * 6,
        actor_critic_loss(data),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        measurements=[policy_heads()],
    )
    found = record.policy
    assert found is not None
    assert found.steps.tolist() == [0, 1, 5]
    twin = ActorCritic()
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    expected = []
    for step in range(6):
        output = twin(data.states)
        if step in (0, 1, 5):
            expected.append(mean_of(Categorical(output[0]).entropy()))
        optimizer.zero_grad()
        actor_critic_loss(data)(output).backward()
        optimizer.step()
    np.testing.assert_allclose(found.entropy, expected, rtol=1e-5)


# ---------------------------------------------------------------------------------- no gradient


@pytest.mark.parametrize(
    "cut", [lambda x: x.detach(), lambda x: x.argmax(-1, keepdim=True).float()], ids=["detach", "argmax"]
)
def test_a_policy_that_the_loss_does_not_reach(cut: Any) -> None:
    data = batch()
    found = measured(
        ActorCritic(),
        lambda out: (cut(out[0]) * data.returns[:, None]).mean() + value_loss(out[1], data.returns),
    )
    assert found.policy_heads == ("action_head",)
    assert not found.policy_reached.any()
    assert found.policy_differentiable
    assert found.value_reached.all()
    assert found.policy_grad_norm.tolist() == found.policy_head_grad_norm.tolist() == [0, 0]
    assert np.isnan(found.gradient_cosine).all()
    assert found.statistics().gradient_ratio == 0
    assert (found.entropy > 0).all()


def test_a_policy_under_no_grad_is_known_all_the_same() -> None:
    model, data = ActorCritic(), batch()

    def forward(m: nn.Module, step: int) -> Tensor:
        with torch.no_grad():
            Categorical(m(data.states)[0]).sample()
        return m.value_head(m.affine1(data.states)).square().mean()  # type: ignore[operator]

    record = gf.analyze_custom(model, forward, steps=2, measurements=[policy_heads()])
    found = record.policy
    assert found is not None
    assert found.policy_heads == ("action_head",)
    assert not found.policy_differentiable


def test_inside_a_reentrant_checkpoint_nothing_is_claimed() -> None:
    model, data = ActorCritic(), batch()
    record = gf.analyze_custom(
        model,
        lambda m, step: checkpoint(m, data.states.clone().requires_grad_(), use_reentrant=True),
        actor_critic_loss(data),
        steps=1,
        measurements=[policy_heads(policy_head_name="action_head", value_head_name="value_head")],
    )
    found = record.policy
    assert found is not None
    assert np.isnan(found.policy_grad_norm).all()
    assert any("reentrant" in said for said in found.assumptions)


def test_under_vjp_the_first_step_is_measured() -> None:
    model, data = ActorCritic(), batch()
    fused, other = (
        gf.analyze(
            model,
            [data.states] * 3,
            actor_critic_loss(data),
            transform=how,
            measurements=[policy_heads()],
        ).policy
        for how in ("fused", "vjp")
    )
    assert fused is not None
    assert other is not None
    assert other.steps.tolist() == [0]
    assert other.policy_grad_norm[0] == fused.policy_grad_norm[0]


# ---------------------------------------------------------------------------------- purity


class Leaky(Gaussian):
    """A policy that samples, keeps its distribution, and counts."""

    def __init__(self) -> None:
        super().__init__(lambda mean, log_std: Normal(mean, log_std.exp()))
        self.kept: list[Any] = []
        self.steps = 0

    def forward(self, x: Tensor) -> Any:
        d, value = super().forward(x)
        self.steps += 1
        self.kept.append(d.rsample())
        np.random.rand()
        random.random()
        return d, value


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [mixture, tanh_normal, None])
def test_everything_is_left_as_it_was(fails: bool, kind: Any) -> None:
    model, data = (Leaky() if kind is None else Gaussian(kind)), batch()
    loss = gaussian_loss(data)
    loss(model(data.states)).backward()

    def failing(output: Any) -> Tensor:
        if fails:
            raise ZeroDivisionError("as asked")
        return loss(output)

    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, optimizer)

    def run() -> None:
        gf.analyze(
            model, [data.states] * 3, failing, optimizer=optimizer, measurements=[policy_heads()], mode="eval"
        )

    if fails:
        with pytest.raises(ZeroDivisionError, match="as asked"):
            run()
    else:
        run()
    assert difference(before, snapshot(model, optimizer)) == ""


def test_the_rest_of_the_record_is_as_without_it() -> None:
    model, data = Mixed(), batch()
    with_it = gf.analyze(model, [data.states] * 3, mixed_loss(data), measurements=[policy_heads()])
    without = gf.analyze(model, [data.states] * 3, mixed_loss(data))
    assert without.policy is None
    for name in ("losses", "layers", "parameters", "activations", "graph_record", "provenance"):
        a, b = getattr(with_it, name), getattr(without, name)
        assert np.array_equal(a, b) if name == "losses" else a == b


def test_the_measurement_is_a_value() -> None:
    assert policy_heads(policy_head_name="a") == policy_heads(policy_head_name=["a"])
    assert hash(policy_heads()) == hash(policy_heads())


@pytest.mark.parametrize("reentrant", [False])
def test_a_checkpoint_that_shows_its_graph_changes_nothing(reentrant: bool) -> None:
    model, data = ActorCritic(), batch()
    plain = measured(model, actor_critic_loss(data))
    record = gf.analyze_custom(
        model,
        lambda m, step: checkpoint(m, data.states, use_reentrant=reentrant),
        actor_critic_loss(data),
        steps=2,
        measurements=[policy_heads()],
    )
    assert record.policy is not None
    np.testing.assert_allclose(record.policy.policy_grad_norm, plain.policy_grad_norm, rtol=1e-6)
    np.testing.assert_allclose(record.policy.value_grad_norm, plain.value_grad_norm, rtol=1e-6)


class Broken(Normal):
    """A distribution of the user's own whose entropy fails."""

    def entropy(self) -> Tensor:
        raise ZeroDivisionError("not today")


def test_a_distribution_that_fails_is_told_and_not_raised() -> None:
    model, data = Gaussian(lambda mean, log_std: Broken(mean, log_std.exp())), batch()
    found = measured(model, gaussian_loss(data))
    assert found.policy_heads == ("actor.2",)
    assert found.distributions == ()
    assert any(
        "Broken of actor.2 could not be had: ZeroDivisionError: not today" in a for a in found.assumptions
    )
    assert (found.policy_grad_norm > 0).all()


def test_names_that_do_not_fit_make_no_gaussian() -> None:
    model = Gaussian(lambda mean, log_std: mean)
    model.log_std = nn.Parameter(torch.zeros(3, 5, 2))
    found = measured(model, lambda out: out[0].square().mean() + out[1].mean(), policy_head_name="actor")
    assert [d.family for d in found.distributions] == ["Categorical"]
    assert found.distributions[0].assumed


def test_an_empty_batch_has_no_numbers() -> None:
    data = batch(samples=0)
    record = gf.analyze(
        ActorCritic(),
        [data.states],
        lambda out: Categorical(out[0]).entropy().sum() + out[1].sum(),
        measurements=[policy_heads()],
    )
    assert record.policy is not None
    assert record.policy.distributions[0].num_samples.tolist() == [0]
    assert np.isnan(record.policy.entropy).all()
