"""Illnesses of the gradients through a policy's heads and through a value's; see `policy.py`.

All detectors here return nothing for a record without `policy`.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np

from gradflow.detect.evidence import late, middle
from gradflow.detect.policy.actions import conflict_actions, dominance_actions, starved_actions
from gradflow.detect.policy.evidence import Detector, policy_issue
from gradflow.records import (
    Evidence,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    PolicyRecord,
    Role,
)

SURE = 0.2  # entropy share below which a policy is sure


def dominant_value(ratio: float = 1e-4, *, severe_ratio: float = 1e-5, own_ratio: float = 2e-3) -> Detector:
    """Return the detector of values whose gradient leaves the policy no say in the layers that both share.

    Measured: at the shared parameters, the norm of the gradient through the policy's heads over that through
    the value's, and the same ratio at the heads' own parameters; medians over the measured steps.

    Why this is evidence: the shared layers follow the sum of the two. Where the policy's part is smaller by
    orders of magnitude, they serve the value alone, the policy has features that nobody made for it, and
    clipping by the common norm leaves it next to nothing.

    Looks alike and is not: a value gradient a hundred to a thousand times larger at the start, which is the
    rule: errors are as large as returns, advantages are of size one, and the policy's head starts with a
    hundredth of the usual weights, so that little gradient passes through it. That is why the heads' own
    parameters, whose gradient does not pass through those weights, must agree. And a policy that is sure,
    whose gradient is small for that reason: LOW, for `collapsed_policy` judges whether it may be.

    Args:
        ratio: at the shared parameters, from which the verdict is MEDIUM. PPO and A2C with a shared trunk
            learn CartPole at 8e-4 to 6e-2 (`benchmarks/policy_runs.py`). With rewards ten times as large it
            is 4e-5 to 4e-4, and they do not; PPO does, if the value is cut off from the trunk.
        severe_ratio: from which it is HIGH, if `own_ratio` is undercut by five as well. With rewards a
            hundred times as large it is 1e-6 to 3e-6.
        own_ratio: at the heads' own parameters, that must not be exceeded: 0.01 to 0.2 where they learn, 4e-4
            to 9e-3 with rewards ten times as large, 1e-4 with a hundred times.
    """

    def detector(record: FlowRecord) -> Iterator[Issue]:
        p = record.policy
        if p is None or not p.shared_parameters or not p.policy_reached.any():
            return
        seen = middle(p.gradient_ratio)
        with np.errstate(divide="ignore", invalid="ignore"):
            own = middle(p.policy_head_grad_norm / p.value_head_grad_norm)
        if not 0 < seen <= ratio or own > own_ratio:
            return
        heads = ", ".join(p.policy_heads)
        severe = seen <= severe_ratio and own <= own_ratio / 5
        severity = IssueSeverity.HIGH if severe else IssueSeverity.MEDIUM
        if any(late(d.entropy_share) <= SURE for d in p.distributions):
            severity = IssueSeverity.LOW
        yield policy_issue(
            record,
            p.value_heads,
            IssueType.EXPLODING,
            severity,
            f"Its gradient at the layers shared with {heads} is {1 / seen:.3g} times that of the policy, so "
            "it alone steers them.",
            1 / seen,
            dominance_actions(", ".join(p.value_heads), heads, seen),
            {"dominance": 1 / seen, "own_ratio": own, "rival": heads},
        )

    return detector


def conflicting_heads(cosine: float = -0.5, *, kept: float = 0.3, looks: int = 3) -> Detector:
    """Return the detector of policies and values that pull their shared layers in opposite directions.

    Measured: the cosine between the two gradients at the shared parameters, and what is kept of them in their
    sum, the norm of the sum over the sum of the norms, as medians over the measured steps.

    Why this is evidence: where the two are of like size and opposed, they cancel, and the shared layers learn
    neither. Of a cosine alone no harm follows: where A2C learns CartPole, medians of -0.7 are met, since two
    heads of few outputs move the last shared layer in few directions, which are alike or opposed by chance.

    Looks alike and is not: single steps of any cosine; a conflict in which one side is much larger (LOW),
    which `dominant_value` judges.

    Args:
        cosine: from which on there is a conflict, LOW.
        kept: share of the gradients that is kept in their sum, from which it is MEDIUM. Two of equal size at
            a right angle keep 0.7.
        looks: how many measured steps it takes at least.
    """

    def detector(record: FlowRecord) -> Iterator[Issue]:
        p = record.policy
        if p is None or np.isfinite(p.gradient_cosine).sum() < looks:
            return
        seen, left = middle(p.gradient_cosine), middle(_kept(p))
        if not seen <= cosine:
            return
        cancels = left <= kept
        much = (
            f"their sum keeps {left:.0%} of them" if cancels else "but one is so much larger that it is kept"
        )
        yield policy_issue(
            record,
            p.backbone,
            IssueType.BOTTLENECK,
            IssueSeverity.MEDIUM if cancels else IssueSeverity.LOW,
            f"The gradients of policy and value are opposed here: their cosine is {seen:.2f} at most steps, "
            f"{much}.",
            seen,
            conflict_actions(p.policy_heads, p.value_heads),
            {"gradient_cosine": seen, "kept": left},
        )

    return detector


def starved_policy() -> Detector:
    """Return the detector of policy heads that the loss does not reach.

    Measured: whether a path leads from the loss to the output of a policy head, and whether what comes is
    exactly zero, at every measured step.

    Why this is evidence: it is read off the graph. The usual reasons are an action taken by `argmax` or
    sampled in the place of its log probability, log probabilities that were stored when acting, and a
    `detach`.

    Looks alike and is not: a loss that is the value's alone, with the policy run under `no_grad` (SAC's
    critic): INFO. Where a path leads there and brings zeros (advantages that are all zero, ratios that are
    all clipped) it is MEDIUM, since another batch may bring more."""

    def detector(record: FlowRecord) -> Iterator[Issue]:
        p = record.policy
        if p is None or not p.policy_heads or np.isnan(p.policy_head_grad_norm).all():
            return
        reached = bool(p.policy_reached.any())
        if np.nanmax(p.policy_head_grad_norm) > 0 or np.nanmax(p.policy_grad_norm) > 0:
            return
        severity = IssueSeverity.MEDIUM if reached else IssueSeverity.HIGH
        text = "No path leads from the loss to the policy: it cannot learn."
        if reached:
            text = "Every gradient that reaches the policy is exactly zero."
        if not p.policy_differentiable:
            severity = IssueSeverity.INFO
            text = "The policy was run without gradients: this loss, the value's maybe, cannot teach it."
        issue = policy_issue(
            record,
            p.policy_heads,
            IssueType.DEAD,
            severity,
            text,
            0.0,
            starved_actions(reached=reached),
            {"value_reached": bool(p.value_reached.any())},
        )
        yield attrs.evolve(issue, evidence=Evidence(roles=Role.BLOCKED if reached else Role.CUT))

    return detector


def _kept(p: PolicyRecord) -> Floats:
    """Return ‖a + b‖ / (‖a‖ + ‖b‖) of the two gradients at the shared parameters, shape (measured steps,)."""
    a, b = p.policy_grad_norm, p.value_grad_norm
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(np.maximum(a * a + b * b + 2 * a * b * p.gradient_cosine, 0.0)) / (a + b)
