"""Detectors as values: what one is, how they combine, and `detect`, which runs them on a record.

A detector is any function from a `FlowRecord` to an iterable of `Issue`. Nothing here knows any detector
by name, so one that a user writes works everywhere a built-in one does.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import attrs

from gradflow.detect.defaults import default_detectors
from gradflow.detect.view import shared_flow
from gradflow.errors import PipelineError
from gradflow.records import (
    AnyIssueType,
    FlowRecord,
    Issue,
    IssueSeverity,
    check_record,
    type_place,
)

Detector = Callable[[FlowRecord], Iterable[Issue]]
"""What judges: a pure function from a record to issues."""


def detect(record: FlowRecord, pipeline: Any = None) -> tuple[Issue, ...]:
    """Return the issues that a pipeline sees in a record, most severe first.

    The result does not depend on the order of the detectors: issues are sorted by severity, then by their
    place in the order of execution, and two issues of one layer and type are merged into the graver one.

    Args:
        record: what `gradflow.analyze` returned.
        pipeline: a pipeline, one detector, or an iterable of detectors; None for the default detectors.

    Raises:
        PipelineError: if `pipeline` is none of these, or a detector returns something else than issues.
        RecordInputError: if `record` is no record.

    >>> from gradflow.records import FlowRecord
    >>> detect(FlowRecord(steps=0, losses=[], layers=(), parameters=()))
    ()
    """
    check_record("detect", record)
    detectors = check_detectors(pipeline)
    if not record.steps:  # nothing was measured: the outline of a model without values
        return ()
    with shared_flow():
        found = [issue for detector in detectors for issue in _issues(detector, record)]
    return sorted_issues(record, found)


def sorted_issues(record: FlowRecord, issues: Iterable[Issue]) -> tuple[Issue, ...]:
    """Return issues merged by layer and type, and sorted: gravest first, then in order of execution."""
    place = {layer.name: layer.order for layer in record.layers}

    def key(issue: Issue) -> tuple[Any, ...]:
        where = place.get(issue.layer, len(place))
        return (-issue.severity.rank, where, issue.layer, type_place(issue.issue_type), issue.description)

    merged: dict[tuple[str, AnyIssueType], Issue] = {}
    for issue in sorted(issues, key=key):
        at = (issue.layer, issue.issue_type)
        merged[at] = _merged(merged[at], issue) if at in merged else issue
    return tuple(sorted(merged.values(), key=key))


def _merged(first: Issue, second: Issue) -> Issue:
    """Return the graver issue with what the other one adds: its actions, evidence, and metrics of other
    names."""
    actions = dict.fromkeys((*first.recommended_actions, *second.recommended_actions))
    return attrs.evolve(
        first,
        recommended_actions=tuple(actions),
        metrics={**second.metrics, **first.metrics},
        evidence=first.evidence.merged(second.evidence),
    )


def all_of(*detectors: Detector) -> Detector:
    """Return the detector that reports what any of `detectors` reports.

    Raises:
        PipelineError: if one of them is not a function.
    """
    parts = check_detectors(detectors)

    def detector(record: FlowRecord) -> Iterable[Issue]:
        return [issue for part in parts for issue in _issues(part, record)]

    return detector


def only(detector: Detector, layers: str | Sequence[str] | Callable[[str], bool]) -> Detector:
    """Return a detector restricted to some layers.

    Args:
        detector: the detector.
        layers: a glob such as `"encoder.*"`, several of them, or a predicate on the layer's name.

    Raises:
        PipelineError: if `layers` is none of these.
    """
    check_detectors([detector])
    wanted = _predicate(layers)

    def restricted(record: FlowRecord) -> Iterable[Issue]:
        return [issue for issue in _issues(detector, record) if wanted(issue.layer)]

    return restricted


def without(detector: Detector, *issue_types: AnyIssueType) -> Detector:
    """Return a detector that leaves out issues of some types.

    Raises:
        PipelineError: if one of `issue_types` is neither an `IssueType` nor a type of one's own.
    """
    check_detectors([detector])
    for kind in issue_types:
        if not isinstance(kind, AnyIssueType):
            raise PipelineError(
                f"without: expected members of IssueType, got {kind!r}. Write, for instance, "
                'without(detector, IssueType.BOTTLENECK), or issue_type("OUTLIERS") for one of your own.'
            )
    left_out = frozenset(issue_types)

    def reduced(record: FlowRecord) -> Iterable[Issue]:
        return [issue for issue in _issues(detector, record) if issue.issue_type not in left_out]

    return reduced


Remapping = Mapping[IssueSeverity, IssueSeverity] | Callable[[Issue], IssueSeverity]


def remap(detector: Detector, mapping: Remapping) -> Detector:
    """Return a detector whose issues carry other severities.

    Args:
        detector: the detector.
        mapping: from severity to severity (one that is not a key stays), or a function from an issue to its
            severity.

    Raises:
        PipelineError: if `mapping` is neither, or gives something that is not an `IssueSeverity`.
    """
    check_detectors([detector])
    if not isinstance(mapping, Mapping) and not callable(mapping):
        raise PipelineError(
            f"remap: expected a mapping of severities or a function of an issue, got "
            f"{type(mapping).__name__}. Write, for instance, "
            "remap(detector, {IssueSeverity.LOW: IssueSeverity.HIGH})."
        )

    def severity(issue: Issue) -> IssueSeverity:
        if isinstance(mapping, Mapping):
            chosen = mapping.get(issue.severity, issue.severity)
        else:
            chosen = mapping(issue)
        if not isinstance(chosen, IssueSeverity):
            raise PipelineError(f"remap: expected an IssueSeverity for {issue.layer!r}, got {chosen!r}.")
        return chosen

    def remapped(record: FlowRecord) -> Iterable[Issue]:
        return [attrs.evolve(issue, severity=severity(issue)) for issue in _issues(detector, record)]

    return remapped


def check_detectors(pipeline: Any, call: str = "detect") -> tuple[Detector, ...]:
    """Return the detectors that `pipeline` stands for; None stands for the default ones.

    Args:
        pipeline: a pipeline, one detector, an iterable of detectors, or None.
        call: the function that was given it, for the message.

    Raises:
        PipelineError: if it is neither a function of a record nor an iterable of such functions.
    """
    if pipeline is None:
        return default_detectors()
    if isinstance(pipeline, type):
        raise PipelineError(
            f"{call}: expected a pipeline or detectors, got the class {pipeline.__name__}. Make one first: "
            f"{pipeline.__name__}(...)."
        )
    if callable(pipeline):
        return (cast(Detector, pipeline),)
    if isinstance(pipeline, (str, Mapping)) or not isinstance(pipeline, Iterable):
        raise PipelineError(
            f"{call}: expected a pipeline, a detector (a function from a FlowRecord to issues) or an "
            f"iterable of detectors, got {type(pipeline).__name__}. Pass, for instance, "
            "[vanishing(), my_detector], or None for the default detectors."
        )
    detectors = tuple(pipeline)
    for entry in detectors:
        if not callable(entry) or isinstance(entry, type):
            raise PipelineError(
                f"{call}: expected every detector to be a function from a FlowRecord to issues, got "
                f"{entry!r}. A factory must be called: vanishing(), not 'vanishing'."
            )
    return detectors


def _issues(detector: Detector, record: FlowRecord) -> tuple[Issue, ...]:
    """Run one detector, and say which one it was if what comes back is not issues."""
    name = getattr(detector, "__qualname__", type(detector).__name__)
    found: Any = detector(record)
    if not isinstance(found, Iterable):
        hint = " A factory must be called first: vanishing(), not vanishing." if callable(found) else ""
        raise PipelineError(
            f"detect: detector {name} returned {type(found).__name__}; expected an iterable of Issue.{hint}"
        )
    issues = tuple(found)
    for issue in issues:
        if not isinstance(issue, Issue):
            raise PipelineError(
                f"detect: detector {name} gave {type(issue).__name__} {issue!r}; expected only Issue."
            )
        if not isinstance(issue.issue_type, AnyIssueType) or not isinstance(issue.severity, IssueSeverity):
            raise PipelineError(
                f"detect: detector {name} gave an issue of type {issue.issue_type!r} and severity "
                f'{issue.severity!r}; expected a member of IssueType, or issue_type("OUTLIERS") for a '
                "type of one's own, and a member of IssueSeverity."
            )
    return issues


def _predicate(layers: Any) -> Callable[[str], bool]:
    if isinstance(layers, str):
        layers = [layers]
    if isinstance(layers, Sequence) and all(isinstance(entry, str) for entry in layers):
        globs = tuple(layers)
        return lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    if callable(layers):
        return cast(Callable[[str], bool], layers)
    raise PipelineError(
        "only: expected a glob, a sequence of globs or a predicate on the layer's name, got "
        f"{type(layers).__name__}. Write, for instance, only(detector, 'encoder.*')."
    )
