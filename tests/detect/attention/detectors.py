"""The detectors of attention, with their own thresholds."""

from __future__ import annotations

from gradflow.detect import (
    collapsed_attention,
    collapsed_rank,
    growing_logits,
    idle_branches,
    redundant_heads,
    saturated_attention,
    unbalanced_attention,
)

OWN = (
    collapsed_attention(),
    saturated_attention(),
    growing_logits(),
    collapsed_rank(),
    redundant_heads(),
    unbalanced_attention(),
    idle_branches(),
)
