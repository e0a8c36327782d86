"""The pipeline for recurrent networks: gradient, state and gates through time, besides what `flow` judges."""

from __future__ import annotations

from gradflow.detect import Detector
from gradflow.detect.precision.slow import crawling
from gradflow.detect.recurrent.crossed import along_samples
from gradflow.detect.recurrent.through_time import amplifying, fading, gated
from gradflow.functional.recurrent.measurement import recurrence
from gradflow.pipelines.flow import Pipeline, flow


def recurrent(
    base: Pipeline | None = None, *, track_hidden_states: bool = True, exact: bool = False
) -> Pipeline:
    """Return the pipeline for models with recurrent layers, or loops over recurrent cells.

    Args:
        base: the pipeline to add to; `flow()` by default.
        track_hidden_states: also measure the rms of h and c at every step.
        exact: measure at every look, on the whole batch, and with more digits; see `recurrence`.

    >>> pipeline = recurrent()
    >>> pipeline.name, len(pipeline.measurements)
    ('flow+recurrent', 1)
    """
    through_time = Pipeline(
        "recurrent",
        (*recurrence_detectors(), crawling()),
        measurements=(recurrence(states=track_hidden_states, exact=exact),),
    )
    return (base or flow()) + through_time


def recurrence_detectors(*, fresh: float = 1.0) -> tuple[Detector, ...]:
    """Return the detectors of what happens through time.

    Args:
        fresh: see `fading`.
    """
    return (fading(fresh=fresh), amplifying(), gated(), along_samples())
