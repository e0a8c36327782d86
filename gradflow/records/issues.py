"""Verdicts: `Issue` and `Cause`, their severity, and their types: the seven, and those of one's own."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from gradflow.errors import PipelineError, RecordInputError
from gradflow.records.evidence import Evidence
from gradflow.records.fields import float_field, mapping_field, to_tuple
from gradflow.records.showing import Shown


class IssueType(enum.Enum):
    """The seven kinds of illness. `member.value` is the name in capitals."""

    VANISHING = "VANISHING"
    EXPLODING = "EXPLODING"
    DEAD = "DEAD"
    UNSTABLE = "UNSTABLE"
    NUMERICAL = "NUMERICAL"
    BOTTLENECK = "BOTTLENECK"
    SATURATION = "SATURATION"


_NAME = re.compile(r"[A-Z][A-Z0-9_]*")


def _check_value(instance: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise PipelineError(
            f"OwnIssueType: expected a name in capitals, digits and underscores, got {value!r}. Write, for "
            'instance, OwnIssueType("OUTLIERS").'
        )
    if value in IssueType.__members__:
        raise PipelineError(
            f"OwnIssueType: {value} is one of the seven types that gradflow has. Write IssueType.{value}, or "
            "choose another name."
        )


@attrs.frozen(repr=False)
class OwnIssueType:
    """A type of issue that gradflow does not know: used wherever an `IssueType` is; equal by its value.

    Args:
        value: its name in capitals.

    Raises:
        PipelineError: if it is no such name, or one of the seven of `IssueType`.

    >>> OwnIssueType("OUTLIERS").value, OwnIssueType("OUTLIERS") == issue_type("OUTLIERS")
    ('OUTLIERS', True)
    """

    value: str = attrs.field(validator=_check_value)

    @property
    def name(self) -> str:
        """The same as `value`, as for the members of `IssueType`."""
        return self.value

    def __repr__(self) -> str:
        return f"OwnIssueType({self.value!r})"


AnyIssueType = IssueType | OwnIssueType
"""A type of issue, built in or of one's own."""


def issue_type(name: str) -> AnyIssueType:
    """Return the type of issue of that name: one of the seven, or else one's own.

    Raises:
        PipelineError: if it is no name in capitals.

    >>> issue_type("DEAD"), issue_type("OUTLIERS")
    (<IssueType.DEAD: 'DEAD'>, OwnIssueType('OUTLIERS'))
    """
    return IssueType[name] if name in IssueType.__members__ else OwnIssueType(name)


def type_place(issue_type: AnyIssueType) -> tuple[int, str]:
    """Return what types are sorted by: the seven in their order, then others by name."""
    known = list(IssueType)
    at = known.index(issue_type) if isinstance(issue_type, IssueType) else len(known)
    return (at, issue_type.value)


class IssueSeverity(enum.Enum):
    """How much an issue matters, most severe first. Ordered: ``CRITICAL > HIGH > ... > INFO``."""

    CRITICAL = "CRITICAL"
    HIGH = "HIGH"
    MEDIUM = "MEDIUM"
    LOW = "LOW"
    INFO = "INFO"

    @property
    def rank(self) -> int:
        """0 for INFO up to 4 for CRITICAL."""
        return _RANKS[self]

    @property
    def is_serious(self) -> bool:
        """Whether it is MEDIUM or above: an issue of it makes a model sick; one below is a remark."""
        return self >= IssueSeverity.MEDIUM

    def __lt__(self, other: IssueSeverity) -> bool:
        return self.rank < other.rank

    def __le__(self, other: IssueSeverity) -> bool:
        return self.rank <= other.rank

    def __gt__(self, other: IssueSeverity) -> bool:
        return self.rank > other.rank

    def __ge__(self, other: IssueSeverity) -> bool:
        return self.rank >= other.rank


_RANKS = {severity: len(IssueSeverity) - 1 - i for i, severity in enumerate(IssueSeverity)}


@attrs.frozen(kw_only=True)
class Issue(Shown):
    """A verdict on one layer.

    Args:
        layer: name of the layer call at fault (`encoder.0`, `relu@1`); `""` is the model itself.
        layer_type: class name of that layer, such as `Linear`.
        issue_type: which of the seven kinds, or one of one's own.
        severity: how much it matters.
        description: one or two sentences with the number that decided it.
        magnitude: that number; its unit is told in the description.
        recommended_actions: what to change, most likely cure first.
        metrics: what was measured, by name, for the reader: plain numbers, strings and tuples.
        evidence: how it came about, as far as it is known, for finding causes.

    >>> print(Issue(layer="fc", layer_type="Linear", issue_type=IssueType.DEAD,
    ...             severity=IssueSeverity.HIGH, description="No unit ever fires.", magnitude=1.0,
    ...             recommended_actions=("Use LeakyReLU.",)))
    [HIGH] DEAD in fc (Linear)
      Description: No unit ever fires.
      Magnitude: 1.00e+00
      Recommended Actions:
        - Use LeakyReLU.
    """

    layer: str
    layer_type: str
    issue_type: AnyIssueType
    severity: IssueSeverity
    description: str
    magnitude: float = float_field()
    recommended_actions: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    metrics: Mapping[str, Any] = mapping_field()
    evidence: Evidence = attrs.field(factory=Evidence)

    def __str__(self) -> str:
        name = self.layer or "(model)"
        lines = [
            f"[{self.severity.value}] {self.issue_type.value} in {name} ({self.layer_type})",
            f"  Description: {self.description}",
            f"  Magnitude: {self.magnitude:.2e}",
        ]
        if self.recommended_actions:
            lines.append("  Recommended Actions:")
            lines.extend(f"    - {action}" for action in self.recommended_actions)
        return "\n".join(lines)


@attrs.frozen(kw_only=True)
class Cause:
    """The one layer and mechanism that explains a group of issues.

    Args:
        layer: the layer at fault; where the gradient is cut, the layer whose output is cut.
        issue_type: the illness at that layer.
        mechanism: what happens there, in one sentence.
        issues: the issues this explains, the one at `layer` first.
        confidence: between 0 and 1.
        reason: why the confidence is what it is.
        evidence: what was seen along the path from the loss, one line each.
    """

    layer: str
    issue_type: AnyIssueType
    mechanism: str
    issues: tuple[Issue, ...] = attrs.field(converter=to_tuple)
    confidence: float
    reason: str = ""
    evidence: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)


def check_issues(call: str, values: Any) -> tuple[Issue, ...]:
    """Return issues as a tuple.

    Raises:
        RecordInputError: if they are something else than an iterable of `Issue`.
    """
    return _checked(call, values, Issue, "detect(record) returns them")


def check_causes(call: str, values: Any) -> tuple[Cause, ...]:
    """Return causes as a tuple.

    Raises:
        RecordInputError: if they are something else than an iterable of `Cause`.
    """
    return _checked(call, values, Cause, "find_causes(record, issues) returns them")


def _checked(call: str, values: Any, kind: Any, hint: str) -> Any:
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        got = type(values).__name__
        raise RecordInputError(f"{call}: expected an iterable of {kind.__name__}, got {got}: {hint}.")
    found = tuple(values)
    for value in found:
        if not isinstance(value, kind):
            got = type(value).__name__
            raise RecordInputError(f"{call}: expected only {kind.__name__}, got {got}: {hint}.")
    return found
