"""The pipeline for policies: distributions of actions and gradients through heads, and what `flow` judges."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

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
    >>> pipeline.name, len(pipeline.detectors), len(pipeline.measurements)
    ('flow+policy', 21, 1)
    """
    heads = policy_heads(
        policy_head_name=policy_head_name,
        value_head_name=value_head_name,
        shared_backbone_name=shared_backbone_name,
    )
    detectors = (
        collapsed_policy(),
        deterministic_policy(),
        misscaled_deviation(),
        renormalised_policy(),
        dominant_value(),
        conflicting_heads(),
        starved_policy(),
    )
    base = base or flow()
    base = attrs.evolve(base, detectors=[sparing_policies(d) for d in base.detectors])
    return base + Pipeline("policy", detectors, measurements=(heads,))
