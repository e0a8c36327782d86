"""What was measured of a policy: its action distributions, and the gradients through its heads."""

from __future__ import annotations

import math

import attrs
import numpy as np

from gradflow.records.fields import Bools, Floats, Ints, array_field, float_field, to_tuple


@attrs.frozen(kw_only=True)
class ActionDeviation:
    """How wide a continuous action's distribution is, before squashing; shape (measured steps,).

    NaN where the actions are discrete.

    Args:
        std_min: the smallest standard deviation of the parts of an action, each a mean over samples.
        std_mean: their mean.
        std_max: the largest.
        mean_rms: root mean square of the mean action.
    """

    std_min: Floats = array_field()
    std_mean: Floats = array_field()
    std_max: Floats = array_field()
    mean_rms: Floats = array_field()


@attrs.frozen(kw_only=True)
class ActionDistribution:
    """One distribution that actions are drawn from, at the measured steps; a mixed action has several.

    Arrays have shape (measured steps,), NaN where it was not seen at a step. Entropies are in nats, means
    are over samples (states). Of an action of several independent parts the entropy is that of all parts
    together, and every part counts as a choice of its own for the rest.

    Args:
        heads: names of the modules whose outputs it is made of.
        parameters: names of the parameters that enter it beside them, such as a `log_std`.
        family: `Categorical`, `Normal`, `TransformedDistribution(Normal, TanhTransform)`, ...
        given: what the heads give: `logits`, `probabilities`, `log-probabilities`, or the parameters of the
            family, such as `loc, scale`.
        evidence: how that is known, in one sentence.
        discrete: whether the actions are alternatives with probabilities.
        bounded: whether the actions lie in a bounded interval by construction (a squashed Gaussian, a Beta).
        num_parts: how many independent parts an action has.
        num_actions: alternatives of each part; 0 where continuous.
        assumed: whether nothing was seen that tells what the heads give.
        normalised_twice: whether probabilities were given where logits are expected.
        num_samples: how many samples there were.
        entropy: mean entropy; differential where continuous, so that it may be negative.
        entropy_share: mean of entropy over its maximum, the logarithm of the number of allowed alternatives;
            samples with only one are left out. NaN where continuous.
        max_prob: mean over samples of the largest action probability. NaN where continuous.
        largest_prob: the largest action probability of all samples.
        deterministic_share: share of the samples whose largest action probability is above 0.99.
        mixture_share: entropy of the mean distribution over the samples, over its maximum. As small as
            `entropy_share` where the same action is chosen in all states; large where the states decide.
        deviation: standard deviations and size of the mean action, where continuous.
    """

    heads: tuple[str, ...] = attrs.field(converter=to_tuple)
    parameters: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    family: str
    given: str
    evidence: str
    discrete: bool
    bounded: bool = False
    num_parts: int = 1
    num_actions: int = 0
    assumed: bool = False
    normalised_twice: bool = False
    num_samples: Ints = array_field(np.int64)
    entropy: Floats = array_field()
    entropy_share: Floats = array_field()
    max_prob: Floats = array_field()
    largest_prob: Floats = array_field()
    deterministic_share: Floats = array_field()
    mixture_share: Floats = array_field(unknown="num_samples")
    deviation: ActionDeviation


@attrs.frozen(kw_only=True)
class PolicyDistributionStats:
    """A policy in a few numbers: means over the measured steps. NaN where there is nothing to measure.

    Args:
        mean_entropy: entropy of the action distribution in nats, all heads together.
        entropy_share: the entropy over its largest possible value; NaN where continuous.
        first_entropy: the entropy at the first measured step.
        last_entropy: the entropy at the last measured step.
        max_action_prob: the largest action probability of a sample, mean over samples and discrete heads.
        largest_action_prob: the largest action probability of all samples, heads and steps.
        deterministic_share: share of samples whose largest action probability is above 0.99.
        std_min: smallest standard deviation of the parts of a continuous action, over heads and steps.
        std_max: largest standard deviation of them.
        policy_grad_norm: norm of the loss's gradient through the policy heads, with respect to the parameters
            that policy and value share; to all parameters where they share none.
        value_grad_norm: the same through the value heads.
        gradient_ratio: `policy_grad_norm` over `value_grad_norm`.
        gradient_cosine: cosine between the two gradients at the shared parameters; −1 is full conflict.
        policy_head_grad_norm: norm of the gradient of the policy heads' own parameters.
        value_head_grad_norm: norm of the gradient of the value heads' own parameters.
        assumptions: what was not given but found or assumed, and why a number is missing.
    """

    mean_entropy: float = float_field()
    entropy_share: float = float_field()
    first_entropy: float = float_field()
    last_entropy: float = float_field()
    max_action_prob: float = float_field()
    largest_action_prob: float = float_field()
    deterministic_share: float = float_field()
    std_min: float = float_field()
    std_max: float = float_field()
    policy_grad_norm: float = float_field()
    value_grad_norm: float = float_field()
    gradient_ratio: float = float_field()
    gradient_cosine: float = float_field()
    policy_head_grad_norm: float = float_field()
    value_head_grad_norm: float = float_field()
    assumptions: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)


@attrs.frozen(kw_only=True)
class PolicyRecord:
    """What was measured of a policy and its value estimate. Arrays have shape (measured steps,).

    Args:
        steps: which steps were measured.
        policy_heads: names of the modules that the action distribution comes from.
        value_heads: names of the modules that the value comes from.
        backbone: names of the modules whose parameters both share, in the order of registration.
        shared_parameters: names of those parameters.
        others: names of modules that, by their names, are a value or a target network: a loss of the policy
            alone need not run them.
        distributions: the action distributions.
        policy_differentiable: whether the policy heads ran with gradients on, so that a loss could reach
            them.
        policy_reached: whether a path leads from the loss to the output of a policy head.
        value_reached: whether one leads to the output of a value head.
        policy_grad_norm: norm of the loss's gradient through the policy heads, with respect to the shared
            parameters; to all parameters where there are none. 0 where no path leads to a head, NaN where no
            head is known.
        value_grad_norm: the same through the value heads, along paths that do not lead through the policy.
        gradient_cosine: cosine between the two at the shared parameters; NaN where there are none, or one is
            zero.
        policy_head_grad_norm: norm of the gradient of the policy heads' own parameters, those that enter the
            distribution directly included.
        value_head_grad_norm: norm of the gradient of the value heads' own parameters.
        assumptions: what was not given but found or assumed, and why a number is missing.
    """

    steps: Ints = array_field(np.int64)
    policy_heads: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    value_heads: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    backbone: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    shared_parameters: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    others: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    distributions: tuple[ActionDistribution, ...] = attrs.field(default=(), converter=to_tuple)
    policy_differentiable: bool = True
    policy_reached: Bools = array_field(np.bool_)
    value_reached: Bools = array_field(np.bool_)
    policy_grad_norm: Floats = array_field()
    value_grad_norm: Floats = array_field()
    gradient_cosine: Floats = array_field()
    policy_head_grad_norm: Floats = array_field()
    value_head_grad_norm: Floats = array_field()
    assumptions: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)

    @property
    def entropy(self) -> Floats:
        """Entropy of the action, all distributions together, in nats, shape (measured steps,)."""
        parts = [d.entropy for d in self.distributions]
        return np.sum(parts, axis=0) if parts else np.full(len(self.steps), np.nan)

    @property
    def gradient_ratio(self) -> Floats:
        """`policy_grad_norm` over `value_grad_norm`, shape (measured steps,); NaN where both are zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.policy_grad_norm / self.value_grad_norm

    def statistics(self) -> PolicyDistributionStats:
        """Return the policy in a few numbers."""
        discrete = [d for d in self.distributions if d.discrete]
        policy, value = _mean(self.policy_grad_norm), _mean(self.value_grad_norm)
        return PolicyDistributionStats(
            mean_entropy=_mean(self.entropy),
            entropy_share=_mean_of([d.entropy_share for d in discrete]),
            first_entropy=_end(self.entropy, 0),
            last_entropy=_end(self.entropy, -1),
            max_action_prob=_mean_of([d.max_prob for d in discrete]),
            largest_action_prob=max(_known([d.largest_prob for d in discrete]), default=math.nan),
            deterministic_share=_mean_of([d.deterministic_share for d in discrete]),
            std_min=min(_known([d.deviation.std_min for d in self.distributions]), default=math.nan),
            std_max=max(_known([d.deviation.std_max for d in self.distributions]), default=math.nan),
            policy_grad_norm=policy,
            value_grad_norm=value,
            gradient_ratio=policy / value if value else math.inf if policy > 0 else math.nan,
            gradient_cosine=_mean(self.gradient_cosine),
            policy_head_grad_norm=_mean(self.policy_head_grad_norm),
            value_head_grad_norm=_mean(self.value_head_grad_norm),
            assumptions=self.assumptions,
        )


def _known(arrays: list[Floats]) -> list[float]:
    return [float(v) for array in arrays for v in array if not math.isnan(v)]


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _mean_of(arrays: list[Floats]) -> float:
    known = [m for m in map(_mean, arrays) if not math.isnan(m)]
    return sum(known) / len(known) if known else math.nan


def _end(values: Floats, at: int) -> float:
    known = values[~np.isnan(values)]
    return float(known[at]) if len(known) else math.nan
