"""`transformer`: the base pipeline, with what attention and residual branches show."""

from __future__ import annotations

from gradflow.detect import (
    Detector,
    collapsed_attention,
    collapsed_rank,
    growing_logits,
    idle_branches,
    incomplete_blocks,
    redundant_heads,
    saturated_attention,
    unbalanced_attention,
)
from gradflow.functional.attention.measurement import attention
from gradflow.pipelines.flow import Pipeline, flow


def transformer(base: Pipeline | None = None) -> Pipeline:
    """Return the pipeline for models with attention: what attention and residual branches show besides.

    Args:
        base: the pipeline to add to; `flow()` by default.

    >>> pipeline = transformer()
    >>> pipeline.name, len(pipeline.measurements)
    ('flow+transformer', 1)
    """
    own = Pipeline("transformer", attention_detectors(), measurements=(attention(),))
    return (base or flow()) + own


def attention_detectors() -> tuple[Detector, ...]:
    """Return the detectors of what attention and residual branches show."""
    return (
        collapsed_attention(),
        saturated_attention(),
        growing_logits(),
        collapsed_rank(),
        redundant_heads(),
        unbalanced_attention(),
        idle_branches(),
        incomplete_blocks(),
    )
