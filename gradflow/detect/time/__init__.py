"""What only time shows: pure functions from a `HistoryRecord` to issues.

May import what all detectors share; nothing here knows a `FlowRecord`.
"""

from gradflow.detect.time.collapse import collapsing, dying, sharpening
from gradflow.detect.time.growth import diverging, growing, starving
from gradflow.detect.time.plasticity import resting, stiffening
from gradflow.detect.time.series import TimeDetector

__all__ = [
    "TimeDetector",
    "collapsing",
    "diverging",
    "dying",
    "growing",
    "resting",
    "sharpening",
    "starving",
    "stiffening",
    "time_detectors",
]


def time_detectors() -> tuple[TimeDetector, ...]:
    """Return the detectors that judge a history by default.

    >>> from gradflow.records import HistoryRecord
    >>> [issue for detector in time_detectors() for issue in detector(HistoryRecord.empty())]
    []
    """
    return (diverging(), dying(), collapsing(), sharpening(), starving(), growing(), stiffening(), resting())
