"""Entropy, largest probability and spread of an action distribution of `torch.distributions`.

NOTE [Entropy without a closed form]
A squashed Gaussian is a base distribution seen through invertible transforms, y = f(x), and its entropy is
H(y) = H(x) + E[log |det ∂f/∂x|]. Where the transforms act on every element by itself and the base has an
inverse cumulative distribution function, the expectation is taken over its quantiles, without random numbers.
Otherwise, as for mixtures, the entropy is the mean of −log p over samples drawn from a fixed seed; the random
state is put back.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, distributions

from gradflow.functional.model.purity import RandomState
from gradflow.functional.tap.watch import MASKED
from gradflow.records import NAN, float_field

Distribution = distributions.Distribution

DETERMINISTIC = 0.99  # an alternative of this probability leaves one action in a hundred to chance
_MOST_NODES, _MOST_SAMPLES, _MOST_ELEMENTS = 512, 1024, 2**22


@attrs.frozen(kw_only=True)
class ActionStatistics:
    """An action distribution in numbers; see `gradflow.records.ActionDistribution` for each of them."""

    discrete: bool
    num_samples: int
    num_parts: int
    num_actions: int = 0
    entropy: float = float_field()
    entropy_share: float = float_field(NAN)
    max_prob: float = float_field(NAN)
    largest_prob: float = float_field(NAN)
    deterministic_share: float = float_field(NAN)
    mixture_share: float = float_field(NAN)
    std_min: float = float_field(NAN)
    std_mean: float = float_field(NAN)
    std_max: float = float_field(NAN)
    mean_rms: float = float_field(NAN)


def action_entropy(distribution: Distribution) -> Tensor:
    """Return the entropy in nats of a distribution, one for each member of its batch.

    Exact wherever there is a closed form; see NOTE [Entropy without a closed form] for squashed ones and
    mixtures. The distribution and the random state are left as they are.

    Args:
        distribution: any of `torch.distributions`; differential entropy where it is continuous.

    Returns:
        The entropies, shape `distribution.batch_shape`, without a graph.

    >>> from torch.distributions import Categorical
    >>> action_entropy(Categorical(logits=torch.zeros(2, 4))) / math.log(4)
    tensor([1., 1.], dtype=torch.float64)
    """
    with torch.no_grad():
        return _entropy(own_copy(distribution)).double()


def action_statistics(distribution: Distribution, *, part_dims: int = 0) -> ActionStatistics:
    """Return entropy, largest probability and spread of an action distribution.

    Args:
        distribution: of a batch of actions, any of `torch.distributions`.
        part_dims: how many of the last batch dimensions are parts of one action: 1 for a `Normal` of shape
            (samples, action dimensions) that was not wrapped in `Independent`.

    Returns:
        The numbers: means over samples, entropies summed over the parts.

    >>> from torch.distributions import Categorical
    >>> found = action_statistics(Categorical(probs=torch.tensor([[0.5, 0.5], [1.0, 0.0]])))
    >>> round(found.entropy, 4), found.max_prob, found.deterministic_share
    (0.3466, 0.75, 0.5)
    """
    with torch.no_grad():
        distribution = own_copy(distribution)
        entropy = _entropy(distribution).double()
        parts = math.prod(entropy.shape[entropy.dim() - part_dims :]) if part_dims else 1
        joint = entropy.flatten(-part_dims).sum(-1) if part_dims else entropy
        values: dict[str, Any] = {"num_samples": joint.numel(), "entropy": float(joint.mean())}
        if not joint.numel():
            return ActionStatistics(discrete=is_discrete(distribution), num_parts=parts, **values)
        base, joined = _unwrapped(distribution)
        if is_discrete(base):
            numbers = _discrete(base, by_part=bool(part_dims) or joined > 1)
            return ActionStatistics(discrete=True, num_parts=parts * joined, **values, **numbers)
        return ActionStatistics(
            discrete=False,
            num_parts=parts * math.prod(distribution.event_shape),
            **values,
            **_spread(base, by_part=bool(part_dims or distribution.event_shape)),
        )


def probabilities(distribution: Distribution) -> Tensor:
    """Return the probabilities of a discrete distribution, shape (..., alternatives), in double precision."""
    logits, given = _given(distribution)
    if isinstance(distribution, distributions.Bernoulli):
        p = given.sigmoid() if logits else given
        return torch.stack([1 - p, p], -1)
    return given.softmax(-1) if logits else given


def _given(distribution: Distribution) -> tuple[bool, Tensor]:
    """Return whether a discrete distribution was made of logits, and what it was made of."""
    held = vars(vars(distribution).get("_categorical", distribution))  # a one-hot one holds a categorical
    return held.get("logits") is held["_param"], held["_param"].double()


def own_copy(distribution: Distribution) -> Distribution:
    """Return a distribution over the same tensors without their graph, which can be asked for anything.

    What a distribution or a transform computes lazily is kept on it: on the copy, in this case.
    """
    memo: dict[int, Tensor] = {}
    own = copy.copy(distribution)
    for name, value in vars(distribution).items():
        if isinstance(value, Tensor):
            vars(own)[name] = memo.setdefault(id(value), value.detach())
        elif isinstance(value, Distribution):
            vars(own)[name] = own_copy(value)
        elif name == "transforms":
            vars(own)[name] = [transform.with_cache(0) for transform in value]
    return own


def is_discrete(distribution: Distribution) -> bool:
    """Whether a distribution is over alternatives whose probabilities are known one by one."""
    kinds = (distributions.Categorical, distributions.OneHotCategorical, distributions.Bernoulli)
    return isinstance(distribution, kinds)


def is_bounded(distribution: Distribution) -> bool:
    """Whether its values lie in a bounded interval by construction."""
    if isinstance(distribution, distributions.Independent):
        return is_bounded(distribution.base_dist)
    if isinstance(distribution, distributions.TransformedDistribution):
        kinds = (distributions.TanhTransform, distributions.SigmoidTransform)
        return any(isinstance(t, kinds) for t in _flat(distribution.transforms))
    return isinstance(distribution, (distributions.Beta, distributions.Uniform, distributions.Dirichlet))


def parts_of(distribution: Distribution) -> tuple[Distribution, ...]:
    """Return the distributions that a distribution is made of, at any depth, without itself."""
    inner = [
        value for value in vars(distribution).values() if isinstance(value, Distribution)
    ]  # base_dist, _categorical, a mixture's two
    return tuple(part for d in inner for part in (d, *parts_of(d)))


def family(distribution: Distribution) -> str:
    """Return what a distribution is called, with what it is made of.

    >>> family(distributions.Independent(distributions.Normal(torch.zeros(2), torch.ones(2)), 1))
    'Independent(Normal)'
    """
    name = type(distribution).__name__
    if is_discrete(distribution):
        return name
    if isinstance(distribution, distributions.TransformedDistribution):
        inner = [type(t).__name__ for t in _flat(distribution.transforms)]
        return f"{name}({', '.join([family(distribution.base_dist), *inner])})"
    if isinstance(distribution, (distributions.Independent, distributions.MixtureSameFamily)):
        inner = [family(v) for v in vars(distribution).values() if isinstance(v, Distribution)]
        return f"{name}({', '.join(inner)})"
    return name


# ------------------------------------------------------------------------------------ discrete


def _discrete(distribution: Distribution, *, by_part: bool) -> dict[str, Any]:
    p = probabilities(distribution)
    allowed = _allowed(distribution, p)
    choices = allowed.sum(-1)
    free = choices > 1  # where one alternative is allowed, there is nothing to choose
    found: dict[str, Any] = {"num_actions": p.shape[-1]}
    if not free.any():
        return found
    entropy, largest = torch.special.entr(p).sum(-1)[free], p.amax(-1)[free]
    return {
        **found,
        "entropy_share": float((entropy / choices[free].double().log()).mean()),
        "max_prob": float(largest.mean()),
        "largest_prob": float(largest.max()),
        "deterministic_share": float((largest > DETERMINISTIC).double().mean()),
        "mixture_share": _mixture_share(p, allowed, by_part=by_part),
    }


def _mixture_share(p: Tensor, allowed: Tensor, *, by_part: bool) -> float:
    """Return the entropy of the mean over samples, over its largest; a mean over the parts of an action."""
    rows = p.flatten(0, -3) if by_part and p.dim() > 2 else p.flatten(0, -2)[:, None]
    can = allowed.reshape(rows.shape).any(0).sum(-1)
    entropy = torch.special.entr(rows.mean(0)).sum(-1)
    return float((entropy / can.clamp(min=2).double().log()).mean())


def _allowed(distribution: Distribution, p: Tensor) -> Tensor:
    """Return which alternatives are not masked: a mask writes one huge negative number everywhere."""
    is_logits, logits = _given(distribution)
    if not is_logits or isinstance(distribution, distributions.Bernoulli):
        return torch.ones_like(p, dtype=torch.bool)
    lowest = torch.where(logits.isinf(), 0.0, logits).amin()
    masked = (logits <= MASKED) & ((logits <= 0.99 * lowest) | logits.isinf())
    return ~masked


# ------------------------------------------------------------------------------------ continuous


def _unwrapped(distribution: Distribution) -> tuple[Distribution, int]:
    """Return the distribution inside `Independent`, and how many parts of an action that joins."""
    joined = 1
    while isinstance(distribution, distributions.Independent):
        number = distribution.reinterpreted_batch_ndims
        shape = distribution.base_dist.batch_shape
        joined *= math.prod(shape[len(shape) - number :]) if number else 1
        distribution = distribution.base_dist
    return distribution, joined


def _spread(distribution: Distribution, *, by_part: bool) -> dict[str, Any]:
    """Return standard deviations, each a mean over samples, and the mean's size, before any squashing."""
    while isinstance(distribution, (distributions.TransformedDistribution, distributions.Independent)):
        distribution = distribution.base_dist
    try:
        std, mean = distribution.stddev.double(), distribution.mean.double()
    except NotImplementedError:
        return {}
    if not std.numel():
        return {}
    parts = std.flatten(0, -2).mean(0) if by_part and std.dim() > 1 else std if by_part else std.mean()
    return {
        "std_min": float(parts.min()),
        "std_mean": float(std.mean()),
        "std_max": float(parts.max()),
        "mean_rms": float(mean.square().mean().sqrt()),
    }


def _entropy(distribution: Distribution) -> Tensor:
    if isinstance(distribution, distributions.Independent):
        inner, number = _entropy(distribution.base_dist), distribution.reinterpreted_batch_ndims
        return inner.flatten(-number).sum(-1) if number else inner
    if is_discrete(distribution):
        return torch.special.entr(probabilities(distribution)).sum(-1)
    if isinstance(distribution, distributions.TransformedDistribution):
        return _transformed(distribution)
    try:
        return distribution.entropy()
    except NotImplementedError:
        return _by_samples(distribution)


def _transformed(distribution: distributions.TransformedDistribution) -> Tensor:
    base, transforms = distribution.base_dist, _flat(distribution.transforms)
    event_dim = len(distribution.event_shape)
    x = _quantiles(base) if all(t.domain.event_dim == 0 for t in transforms) else None
    if x is None:
        with fixed_random():
            x = base.sample(torch.Size([_number(base, _MOST_SAMPLES)]))
    growth = torch.zeros((), dtype=x.dtype, device=x.device)
    for transform in transforms:
        y = transform(x)
        growth = growth + _sum_last(
            transform.log_abs_det_jacobian(x, y), event_dim - transform.domain.event_dim
        )
        x = y
    inner = _sum_last(_entropy(base), event_dim - len(base.event_shape))
    return inner + growth.mean(0)


def _sum_last(x: Tensor, dims: int) -> Tensor:
    return x.flatten(-dims).sum(-1) if dims > 0 else x


def _flat(transforms: Any) -> list[Any]:
    """Return transforms one by one, those in a `ComposeTransform` included."""
    found: list[Any] = []
    for transform in transforms:
        inner = getattr(transform, "parts", None)
        found += _flat(inner) if inner is not None else [transform]
    return found


def _quantiles(base: Distribution) -> Tensor | None:
    """Return points of equal probability of every element, shape (points, batch, event); None if unknown."""
    while isinstance(base, distributions.Independent):
        base = base.base_dist
    number = _number(base, _MOST_NODES)
    base._validate_args = False  # of our own copy: points for every element at once have one dimension more
    shape = base.batch_shape + base.event_shape
    like = next((v for v in vars(base).values() if isinstance(v, Tensor)), torch.zeros(()))
    q = (torch.arange(number, dtype=like.dtype, device=like.device) + 0.5) / number
    try:
        return base.icdf(q.reshape(-1, *[1] * len(shape)).expand(-1, *shape))
    except NotImplementedError:
        return None


def _number(distribution: Distribution, most: int) -> int:
    size = math.prod(distribution.batch_shape + distribution.event_shape)
    return max(16, min(most, _MOST_ELEMENTS // max(size, 1)))


def _by_samples(distribution: Distribution) -> Tensor:
    with fixed_random():
        x = distribution.sample(torch.Size([_number(distribution, _MOST_SAMPLES)]))
    return -distribution.log_prob(x).mean(0)


@contextlib.contextmanager
def fixed_random() -> Iterator[None]:
    """Draw from a fixed seed for the length of the context; the random state is put back."""
    state = RandomState(host=False)
    torch.manual_seed(0)
    try:
        yield
    finally:
        state.restore()
