"""Verdicts: `Issue` and `Cause`, and the two enums."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import attrs

from gradflow.records.fields import float_field, mapping_field, to_tuple


class IssueType(enum.Enum):
    """The seven kinds of illness. `member.value` is the name in capitals."""

    VANISHING = "VANISHING"
    EXPLODING = "EXPLODING"
    DEAD = "DEAD"
    UNSTABLE = "UNSTABLE"
    NUMERICAL = "NUMERICAL"
    BOTTLENECK = "BOTTLENECK"
    SATURATION = "SATURATION"


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
        return len(IssueSeverity) - 1 - list(IssueSeverity).index(self)

    def __lt__(self, other: IssueSeverity) -> bool:
        return self.rank < other.rank

    def __le__(self, other: IssueSeverity) -> bool:
        return self.rank <= other.rank

    def __gt__(self, other: IssueSeverity) -> bool:
        return self.rank > other.rank

    def __ge__(self, other: IssueSeverity) -> bool:
        return self.rank >= other.rank


@attrs.frozen(kw_only=True)
class Issue:
    """A verdict on one layer.

    Args:
        layer: name of the layer call at fault (`encoder.0`, `relu@1`); `""` is the model itself.
        layer_type: class name of that layer, such as `Linear`.
        issue_type: which of the seven kinds.
        severity: how much it matters.
        description: one or two sentences with the number that decided it.
        magnitude: that number; its unit is told in the description.
        recommended_actions: what to change, most likely cure first.
        metrics: the evidence, by name; plain numbers, strings and tuples.

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
    issue_type: IssueType
    severity: IssueSeverity
    description: str
    magnitude: float = float_field()
    recommended_actions: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    metrics: Mapping[str, Any] = mapping_field()

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
    issue_type: IssueType
    mechanism: str
    issues: tuple[Issue, ...] = attrs.field(converter=to_tuple)
    confidence: float
    reason: str = ""
    evidence: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
