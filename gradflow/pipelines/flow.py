"""`Pipeline`: what to measure and which detectors judge it; and `flow`, the one that runs by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs

from gradflow.detect import Detector, Rule, check_detectors, default_detectors, detect
from gradflow.errors import PipelineError
from gradflow.functional.measurement import Measurement
from gradflow.records import FlowRecord, Issue, text_lines

DETAILS = ("cheap", "full")
Summary = Callable[[FlowRecord], Iterable[str]]


def _check_detail(instance: Any, attribute: Any, value: Any) -> None:
    if value not in DETAILS:
        raise PipelineError(f"Pipeline: expected detail 'cheap' or 'full', got {value!r}.")


def _to_detectors(value: Any) -> tuple[Detector, ...]:
    return check_detectors(value, "Pipeline")


def _to_summaries(value: Any) -> tuple[Summary, ...]:
    """Return functions from a record to lines, of one or several."""
    found: tuple[Any, ...] = (value,)
    if isinstance(value, Iterable) and not isinstance(value, str):
        found = tuple(value)
    for entry in found:
        if not callable(entry) or isinstance(entry, type):
            raise PipelineError(
                "Pipeline: expected summaries to be functions from a FlowRecord to lines of text, got "
                f"{entry!r}. Write, for instance, summaries=[lambda record: [f'{{record.steps}} steps']]."
            )
    return found


def _to_rules(value: Any) -> tuple[Rule, ...]:
    found: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
    for entry in found:
        if not isinstance(entry, Rule):
            raise PipelineError(
                f"Pipeline: expected rules to be of gradflow.Rule, got {entry!r}. Write, for instance, "
                "rules=[gf.Rule(cause=gf.IssueType.BOTTLENECK, victim=gf.IssueType.VANISHING, "
                "where='upstream', because='it is too narrow')]."
            )
    return found


@attrs.frozen
class Pipeline:
    """A choice of measurements and detectors, immutable; itself a detector, so pipelines compose.

    Args:
        name: what it is called in reports.
        detectors: functions from a `FlowRecord` to issues.
        detail: the measurements it needs, as for `gradflow.analyze`: `cheap`, or `full`, with the flow on
            every edge of the graph.
        measurements: what else it needs measured, such as `gradflow.functional.attention()`.
        summaries: functions from the record to lines of text, which the report shows.
        rules: what one issue can bring about, for the causes that `gradflow.diagnose` finds, beside what is
            built in; see `gradflow.Rule`.

    >>> from gradflow.detect import dead, vanishing
    >>> quick = Pipeline("quick", [dead()]) + vanishing()
    >>> len(quick.detectors)
    2
    """

    name: str
    detectors: tuple[Detector, ...] = attrs.field(converter=_to_detectors)
    detail: str = attrs.field(default="cheap", validator=_check_detail)
    measurements: tuple[Measurement, ...] = attrs.field(default=(), converter=tuple)
    summaries: tuple[Summary, ...] = attrs.field(default=(), converter=_to_summaries)
    rules: tuple[Rule, ...] = attrs.field(default=(), converter=_to_rules)

    def __call__(self, record: FlowRecord) -> tuple[Issue, ...]:
        """Return the issues that the detectors see in a record, most severe first."""
        return detect(record, self.detectors)

    def lines(self, record: FlowRecord) -> tuple[str, ...]:
        """Return the lines of all summaries of a record, which the report shows.

        Raises:
            PipelineError: if a summary returns something else than lines of text.
        """
        return tuple(line for summary in self.summaries for line in _lines(summary, record))

    def __add__(self, other: Pipeline | Detector | Iterable[Detector]) -> Pipeline:
        """Return a pipeline with what this one and `other` detect, measure, summarise and know of causes."""
        if not isinstance(other, Pipeline):
            return attrs.evolve(self, detectors=(*self.detectors, *check_detectors(other)))
        return Pipeline(
            name=f"{self.name}+{other.name}",
            detectors=(*self.detectors, *other.detectors),
            detail="full" if "full" in (self.detail, other.detail) else "cheap",
            measurements=tuple(dict.fromkeys((*self.measurements, *other.measurements))),
            summaries=tuple(dict.fromkeys((*self.summaries, *other.summaries))),
            rules=tuple(dict.fromkeys((*self.rules, *other.rules))),
        )


def _lines(summary: Summary, record: FlowRecord) -> tuple[str, ...]:
    found = summary(record)
    lines = text_lines(found)
    if lines is None:
        name = getattr(summary, "__qualname__", type(summary).__name__)
        raise PipelineError(
            f"Pipeline: summary {name} returned {found!r}; expected lines of text, such as a list of str."
        )
    return lines


def flow(
    *,
    vanishing_threshold: float = 1e-6,
    exploding_threshold: float = 10.0,
    dead_threshold: float = 0.9,
    unstable_cv_threshold: float = 3.0,
    detail: str = "cheap",
) -> Pipeline:
    """Return the base pipeline: the default detectors, for any model.

    Args:
        vanishing_threshold: see `gradflow.vanishing`.
        exploding_threshold: see `gradflow.exploding`.
        dead_threshold: see `gradflow.dead`.
        unstable_cv_threshold: see `gradflow.unstable`.
        detail: what to measure, `cheap` or `full`.

    >>> flow().name, flow().detail
    ('flow', 'cheap')
    """
    return Pipeline(
        "flow",
        default_detectors(
            vanishing_threshold=vanishing_threshold,
            exploding_threshold=exploding_threshold,
            dead_threshold=dead_threshold,
            unstable_cv_threshold=unstable_cv_threshold,
        ),
        detail,
    )
