"""The pipeline for policies: distributions of actions and gradients through heads, and what `flow` judges."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from gradflow.detect import Detector
from gradflow.detect.policy.evidence import sparing_policies
from gradflow.detect.policy.heads import conflicting_heads, dominant_value, starved_policy
from gradflow.detect.policy.policy import (
    collapsed_policy,
    deterministic_policy,
    misscaled_deviation,
    renormalised_policy,
)
from gradflow.functional.policy.measurement import policy_heads
from gradflow.pipelines.flow import Pipeline, flow


def policy(
    base: Pipeline | None = None,
    *,
    policy_head_name: str | Sequence[str] | None = None,
    value_head_name: str | Sequence[str] | None = None,
    shared_backbone_name: str | Sequence[str] | None = None,
) -> Pipeline:
    """Return the pipeline for actor-critics and other models that give a distribution of actions.

    Args:
        base: the pipeline to add to; `flow()` by default.
        policy_head_name: see `gradflow.functional.policy_heads`, as for the other two.
        value_head_name: see there.
        shared_backbone_name: see there.

    >>> pipeline = policy(policy_head_name="action_net")
    >>> pipeline.name, len(pipeline.measurements)
    ('flow+policy', 1)
    """
    heads = policy_heads(
        policy_head_name=policy_head_name,
        value_head_name=value_head_name,
        shared_backbone_name=shared_backbone_name,
    )
    own = Pipeline("policy", policy_detectors(), measurements=(heads,))
    return sparing(base or flow()) + own


def sparing(base: Pipeline, *, by_state: float = 1.0) -> Pipeline:
    """Return a pipeline that lowers to LOW what is by design in policies; see `sparing_policies`."""
    return attrs.evolve(base, detectors=[sparing_policies(d, by_state=by_state) for d in base.detectors])


def policy_detectors(*, by_state: float = 1.0) -> tuple[Detector, ...]:
    """Return the detectors of action distributions and of the gradients through heads.

    Args:
        by_state: see `collapsed_policy`.
    """
    return (
        collapsed_policy(by_state=by_state),
        deterministic_policy(by_state=by_state),
        misscaled_deviation(),
        renormalised_policy(),
        dominant_value(),
        conflicting_heads(),
        starved_policy(),
    )
