"""`policy_heads`: which heads are found, what is made of them, and the gradients through them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.errors import ModelInputError, UnknownLayerError
from gradflow.functional import policy_heads
from gradflow.functional.policy.scene import kind_of_name
from gradflow.records import PolicyRecord
from tests.functional.snapshots import difference, snapshot
from tests.policies import (
    ACTIONS,
    SAMPLES,
    STATE,
    ActorCritic,
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


def measured(model: nn.Module, loss: Any, **names: Any) -> PolicyRecord:
    record = gf.analyze(model, lambda: batch().states, loss, steps=2, measurements=[policy_heads(**names)])
    assert record.policy is not None
    assert gf.FlowRecord.from_json(record.to_json()) == record
    return record.policy


def norm_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """Return the norm of a gradient by one plain backward pass, and the gradient in one row."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    row = torch.cat([g.flatten() for g in found if g is not None])
    return float(row.norm()), row


def mean_of(x: Tensor) -> float:
    return float(x.detach().mean())


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
    assert found.steps.tolist() == [0, 1, 4, 5]
    twin = ActorCritic()
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    expected = []
    for step in range(6):
        output = twin(data.states)
        if step in (0, 1, 4, 5):
            expected.append(mean_of(Categorical(output[0]).entropy()))
        optimizer.zero_grad()
        actor_critic_loss(data)(output).backward()
        optimizer.step()
    np.testing.assert_allclose(found.entropy, expected, rtol=1e-5)


# ---------------------------------------------------------------------------------- what a head gives


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


def tanh_normal(mean: Tensor, log_std: Tensor) -> distributions.Distribution:
    base = distributions.Independent(Normal(mean, log_std.exp()), 1)
    return distributions.TransformedDistribution(base, [distributions.TanhTransform(cache_size=1)])


def mixture(mean: Tensor, log_std: Tensor) -> distributions.Distribution:
    parts = Normal(torch.stack([mean, -mean], -1), log_std.exp()[:, None].expand(*mean.shape, 2))
    return distributions.MixtureSameFamily(Categorical(logits=torch.zeros(*mean.shape, 2)), parts)


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


# ---------------------------------------------------------------------------------- heads by name


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
