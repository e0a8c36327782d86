"""The detectors that run where no others are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.detect.bottleneck import bottleneck
from gradflow.detect.dead import dead
from gradflow.detect.exploding import exploding
from gradflow.detect.numerical import numerical
from gradflow.detect.saturation import saturation
from gradflow.detect.unstable import unstable
from gradflow.detect.vanishing import vanishing
from gradflow.records import FlowRecord, Issue


def default_detectors(
    *,
    vanishing_threshold: float = 1e-6,
    exploding_threshold: float = 10.0,
    dead_threshold: float = 0.9,
    unstable_cv_threshold: float = 3.0,
) -> tuple[Callable[[FlowRecord], Iterable[Issue]], ...]:
    """Return one detector of each of the seven types.

    Args:
        vanishing_threshold: see `vanishing`.
        exploding_threshold: see `exploding`.
        dead_threshold: see `dead`.
        unstable_cv_threshold: see `unstable`.

    >>> len(default_detectors())
    7
    """
    return (
        numerical(),
        dead(dead_threshold),
        vanishing(vanishing_threshold),
        exploding(exploding_threshold),
        saturation(),
        unstable(unstable_cv_threshold),
        bottleneck(),
    )
