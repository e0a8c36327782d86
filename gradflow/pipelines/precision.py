"""The pipeline for short formats: what they lose of gradients and activations, besides what `flow` judges."""

from __future__ import annotations

from gradflow.detect import Detector
from gradflow.detect.precision.overflow import overflowing
from gradflow.detect.precision.scaler import stuck_scaler
from gradflow.detect.precision.slow import crawling
from gradflow.detect.precision.underflow import underflowing
from gradflow.functional.precision.measurement import precision as measured
from gradflow.pipelines.flow import Pipeline, flow


def precision(base: Pipeline | None = None, *, loss_scale: float | None = None) -> Pipeline:
    """Return the pipeline for models in float16, bfloat16 or shorter, or that are to be.

    Args:
        base: the pipeline to add to; `flow()` by default.
        loss_scale: what the training multiplies the loss by, `scaler.get_scale()`; None for nothing.

    Raises:
        ValueError: if the loss scale is no power of two.

    >>> pipeline = precision()
    >>> pipeline.name, len(pipeline.measurements)
    ('flow+precision', 1)
    """
    own = Pipeline("precision", precision_detectors(), measurements=(measured(loss_scale=loss_scale),))
    return (base or flow()) + own


def precision_detectors() -> tuple[Detector, ...]:
    """Return the detectors of what number formats lose."""
    return (underflowing(), overflowing(), crawling(), stuck_scaler())
