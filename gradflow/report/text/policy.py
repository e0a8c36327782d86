"""A policy's statistics as a few lines of plain text."""

from __future__ import annotations

from gradflow.records import PolicyDistributionStats

_ROWS = (
    ("entropy", "mean_entropy", "nats"),
    ("share of its maximum", "entropy_share", ""),
    ("largest action probability", "max_action_prob", "mean over samples"),
    ("deterministic samples", "deterministic_share", "share"),
    ("smallest deviation", "std_min", ""),
    ("largest deviation", "std_max", ""),
    ("policy gradient", "policy_grad_norm", ""),
    ("value gradient", "value_grad_norm", ""),
    ("policy / value", "gradient_ratio", ""),
    ("cosine of the two", "gradient_cosine", ""),
)


def policy_text(stats: PolicyDistributionStats) -> str:
    """Return a policy's numbers, a line each, and what was assumed; those that are NaN are left out.

    >>> import attrs
    >>> numbers = {f.name: 0.5 for f in attrs.fields(PolicyDistributionStats) if f.name != "assumptions"}
    >>> policy_text(PolicyDistributionStats(**numbers)).splitlines()[1]
    '  entropy                     0.5 nats'
    """
    lines = ["Policy:"]
    for title, field, unit in _ROWS:
        value = getattr(stats, field)
        if value == value:
            lines.append(f"  {title:<27} {value:.3g} {unit}".rstrip())
    return "\n".join([*lines, *(f"  - {sentence}" for sentence in stats.assumptions)])
