"""Entropies, probabilities and deviations: against closed forms, PyTorch, SciPy and numerical integration."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from scipy import integrate
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Categorical,
    ComposeTransform,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    SigmoidTransform,
    StickBreakingTransform,
    TanhTransform,
    TransformedDistribution,
)

from gradflow.functional import action_entropy, action_statistics
from gradflow.functional.policy.statistics import family, is_bounded

stats: Any = scipy.stats


def state_of_numpy() -> Any:
    found: Any = np.random.get_state()
    return found[1]


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("number", [2, 5, 100])
def test_uniform_has_the_logarithm_of_the_number_and_one_hot_none(number: int) -> None:
    uniform = action_statistics(Categorical(logits=torch.zeros(4, number)))
    assert uniform.entropy == pytest.approx(math.log(number), abs=1e-12)
    assert uniform.entropy_share == pytest.approx(1.0, abs=1e-12)
    assert uniform.max_prob == uniform.largest_prob == pytest.approx(1 / number)
    assert uniform.deterministic_share == 0
    one_hot = action_statistics(Categorical(probs=torch.eye(number)))
    assert (one_hot.entropy, one_hot.entropy_share, one_hot.max_prob) == (0, 0, 1)
    assert one_hot.deterministic_share == 1
    assert (one_hot.num_samples, one_hot.num_actions, one_hot.num_parts) == (number, number, 1)


@pytest.mark.parametrize("kind", [Categorical, OneHotCategorical])
@pytest.mark.parametrize("given", ["logits", "probs"])
def test_discrete_entropy_is_that_of_torch_and_scipy(kind: Any, given: str) -> None:
    x = logits(6, 4)
    d = kind(**{given: x if given == "logits" else x.softmax(-1)})
    found = action_entropy(d)
    torch.testing.assert_close(found.float(), d.entropy())
    expected = stats.entropy(x.double().softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_bernoulli_has_two_alternatives_in_every_part() -> None:
    d = Bernoulli(logits=logits(6, 3))
    found = action_statistics(d, part_dims=1)
    assert found.entropy == pytest.approx(float(d.entropy().sum(-1).mean()), rel=1e-5)
    assert (found.num_actions, found.num_parts, found.num_samples) == (2, 3, 6)
    assert found.max_prob == pytest.approx(float(torch.maximum(d.probs, 1 - d.probs).mean()), rel=1e-5)
    assert action_statistics(Independent(d, 1)) == found


@pytest.mark.parametrize("fill", [-math.inf, -1e4, -1e8, torch.finfo(torch.float32).min])
def test_masked_alternatives_do_not_count(fill: float) -> None:
    x = logits(8, 4)
    x[:, 2] = fill
    x[0, 1:] = fill  # no choice at all: left out
    found = action_statistics(Categorical(logits=x))
    rest = x[1:][:, [0, 1, 3]]
    h = stats.entropy(rest.softmax(-1).numpy(), axis=-1)
    assert found.entropy_share == pytest.approx(float((h / math.log(3)).mean()), rel=1e-5)
    assert found.max_prob == pytest.approx(float(rest.softmax(-1).amax(-1).mean()), rel=1e-5)
    assert found.entropy == pytest.approx(float(h.sum() / 8), rel=1e-5)
    only = action_statistics(Categorical(logits=torch.tensor([[0.0, fill], [0.0, fill]])))
    assert math.isnan(only.entropy_share)
    assert math.isnan(only.deterministic_share)


def test_large_logits_are_no_mask() -> None:
    found = action_statistics(Categorical(logits=torch.tensor([[0.0, 300.0], [250.0, 0.0]])))
    assert found.deterministic_share == 1
    assert found.entropy_share == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("std", [0.01, 1.0, 7.0])
def test_normal_entropy_is_the_closed_form(std: float) -> None:
    d = Normal(logits(5, 2), torch.full((5, 2), std))
    found = action_statistics(d, part_dims=1)
    assert found.entropy == pytest.approx(
        2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(std)), rel=1e-5
    )
    assert found.entropy == pytest.approx(2 * float(stats.norm(scale=std).entropy()), rel=1e-5)
    assert (found.std_min, found.std_max) == pytest.approx((std, std))
    assert found.mean_rms == pytest.approx(float(d.loc.square().mean().sqrt()), rel=1e-5)
    assert not found.discrete
    assert action_statistics(Independent(d, 1)) == found
    full = MultivariateNormal(d.loc, torch.eye(2) * std**2)
    assert action_statistics(full).entropy == pytest.approx(found.entropy, rel=1e-5)


def test_deviations_are_of_parts() -> None:
    std = torch.tensor([[0.1, 2.0], [0.3, 4.0]])
    found = action_statistics(Normal(torch.zeros(2, 2), std), part_dims=1)
    assert (found.std_min, found.std_mean, found.std_max) == pytest.approx((0.2, 1.6, 3.0))


def test_beta_entropy_is_scipys() -> None:
    a, b = torch.tensor([0.5, 2.0, 30.0]), torch.tensor([1.5, 2.0, 3.0])
    expected = stats.beta(a.double().numpy(), b.double().numpy()).entropy()
    np.testing.assert_allclose(action_entropy(Beta(a, b)).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.7, 1.0), (-2.0, 0.5), (0.0, 5.0)])
@pytest.mark.parametrize("transform", [TanhTransform(), TanhTransform(cache_size=1), SigmoidTransform()])
def test_squashed_entropy_is_that_of_numerical_integration(mean: float, std: float, transform: Any) -> None:
    d = TransformedDistribution(Normal(torch.tensor([mean]), torch.tensor([std])), [transform])
    base = stats.norm(mean, std)

    def term(u: float) -> float:
        return float(base.pdf(u)) * _log_slope(transform, u)

    expected = float(base.entropy()) + integrate.quad(term, mean - 12 * std, mean + 12 * std, limit=200)[0]
    assert float(action_entropy(d)) == pytest.approx(expected, abs=5e-3)


def _log_slope(transform: Any, u: float) -> float:
    if isinstance(transform, TanhTransform):
        return 2 * (math.log(2) - u - float(np.logaddexp(0, -2 * u)))
    return -u - 2 * float(np.logaddexp(0, -u))


def test_squashed_entropy_sums_over_parts_and_transforms() -> None:
    loc, std = logits(6, 2), torch.full((6, 2), 0.5)
    chain = [TanhTransform(), AffineTransform(1.0, 3.0)]
    parts = TransformedDistribution(Normal(loc, std), chain)
    joint = TransformedDistribution(Independent(Normal(loc, std), 1), [ComposeTransform(chain)])
    alone = TransformedDistribution(Normal(loc, std), chain[:1])
    expected = action_entropy(alone).sum(-1) + 2 * math.log(3.0)
    torch.testing.assert_close(action_entropy(parts).sum(-1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(action_entropy(joint), expected, rtol=1e-4, atol=1e-5)
    assert family(parts) == "TransformedDistribution(Normal, TanhTransform, AffineTransform)"
    assert is_bounded(parts)
    assert is_bounded(joint)
    assert not is_bounded(Normal(loc, std))
    assert action_statistics(joint).std_max == pytest.approx(0.5)  # before squashing


def mixture() -> MixtureSameFamily:
    parts = Normal(torch.tensor([[-2.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.5, 0.5], [1.0, 1.0]]))
    return MixtureSameFamily(Categorical(logits=torch.zeros(2, 2)), parts)


def test_a_mixtures_entropy_is_estimated() -> None:
    found = action_entropy(mixture())
    x = np.linspace(-12, 12, 48001)
    both = [
        [stats.norm(-2, 0.5), stats.norm(2, 0.5)],
        [stats.norm(0, 1), stats.norm(0, 1)],
    ]
    for i, (a, b) in enumerate(both):
        p = 0.5 * a.pdf(x) + 0.5 * b.pdf(x)
        expected = float(integrate.trapezoid(-p * np.log(np.maximum(p, 1e-300)), x))
        assert float(found[i]) == pytest.approx(expected, abs=0.1)
    assert family(mixture()) == "MixtureSameFamily(Categorical, Normal)"
    assert action_statistics(mixture()).std_max > 1  # both samples of one part
    joint = MultivariateNormal(torch.zeros(3, 2), torch.eye(2))
    simplex = TransformedDistribution(joint, [StickBreakingTransform()])  # no quantiles: by samples
    assert torch.isfinite(action_entropy(simplex)).all()


@pytest.mark.parametrize(
    "d",
    [
        mixture(),
        TransformedDistribution(Normal(logits(4, 2), torch.ones(4, 2)), [TanhTransform(cache_size=1)]),
        Categorical(probs=logits(4, 3).softmax(-1)),
        Independent(Bernoulli(logits=logits(4, 2)), 1),
    ],
    ids=family,
)
def test_distribution_and_random_state_are_left_alone(d: Distribution) -> None:
    before = (torch.get_rng_state(), state_of_numpy().tolist(), random.getstate())

    def held(d: Distribution) -> Any:
        inner = [held(v) for v in vars(d).values() if isinstance(v, Distribution)]
        transforms = [dict(vars(t)) for t in getattr(d, "transforms", ())]
        return sorted(vars(d)), [id(v) for v in vars(d).values()], inner, transforms

    kept = held(d)
    action_statistics(d)
    action_entropy(d)
    assert held(d) == kept
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (state_of_numpy().tolist(), random.getstate()) == before[1:]


def test_low_precision_is_summed_in_double() -> None:
    x = (5 * logits(64, 6)).bfloat16()
    expected = stats.entropy(x.double().softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(action_entropy(Categorical(logits=x)).numpy(), expected, rtol=0.05, atol=0.02)
