"""What the detectors of policies share: where an issue stands, and what is by design."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import attrs
import numpy as np

from gradflow.detect.evidence import loss_fell
from gradflow.records import (
    ActionDistribution,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    LayerRecord,
    PolicyRecord,
    Role,
)

Detector = Callable[[FlowRecord], Iterable[Issue]]


def has_imitated(record: FlowRecord, distribution: ActionDistribution) -> bool:
    """Whether a policy has learned a teacher's actions: its cross-entropy has fallen by half within the run.

    The loss of a policy gradient tells nothing of the kind. Where returns are positive it falls whenever the
    policy becomes sure of the actions that it takes itself, whatever they bring.
    """
    taught = distribution.evidence.startswith(("cross_entropy", "nll_loss"))
    alone = record.policy is not None and not record.policy.value_heads
    return taught and alone and loss_fell(record)


def sparing_policies(detector: Detector, *, by_state: float = 1.0) -> Detector:
    """Return a detector that lowers to LOW what is by design in policies.

    Actor and critic may have losses of their own (SAC, TD3, DDPG), so a value or target network that a loss
    of the policy does not run is no illness; an action has few numbers, so a critic behind an actor sees it
    through a narrow layer; and a policy that is sure, of other actions in other states, has learned to be.
    Those issues are LOW.

    Args:
        detector: any; only its DEAD issues of modules that were never called, and its BOTTLENECK and
            SATURATION issues at policy heads, are changed.
        by_state: see `collapsed_policy`.
    """

    def spared(record: FlowRecord) -> Iterator[Issue]:
        p = record.policy
        for issue in detector(record):
            why = ""
            narrow = issue.issue_type is IssueType.BOTTLENECK and "misgiven" not in issue.metrics
            if p is not None and narrow and _is_in(issue, p.policy_heads):
                why = "An action has few numbers, by design."
            elif (
                p is not None
                and issue.issue_type is IssueType.SATURATION
                and _is_in(issue, _sure(p, by_state))
            ):
                why = "It is sure, but of other actions in other states: so is a policy that has learned."
            elif p is not None and issue.evidence.plays(Role.UNUSED) and _is_in(issue, p.others):
                why = "By its name it is a value or a target network, which may have a loss of its own."
            yield _weakened(issue, why) if why else issue

    return spared


def is_by_state(d: ActionDistribution, least: float) -> bool:
    """Whether the state decides on the action: it is not the same one, sure as it may be, in all states."""
    known = d.mixture_share[np.isfinite(d.mixture_share)]
    return len(known) > 0 and float(known[-1]) > least


def has_fallen(d: ActionDistribution, fallen_from: float = 0.3, share: float = 0.05) -> bool:
    """Whether the entropy share has fallen from `fallen_from` to `share` within the run."""
    known = d.entropy_share[np.isfinite(d.entropy_share)]
    return len(known) > 0 and bool(known[0] >= fallen_from and known[-1] <= share)


def _sure(p: PolicyRecord, least: float) -> list[str]:
    """Return the heads whose actions are decided by the state, and have not become sure in this run."""
    return [head for d in p.distributions if is_by_state(d, least) and not has_fallen(d) for head in d.heads]


def _weakened(issue: Issue, why: str) -> Issue:
    severity = min(issue.severity, IssueSeverity.LOW)
    return attrs.evolve(issue, severity=severity, description=f"{issue.description} {why}")


def _is_in(issue: Issue, modules: Sequence[str]) -> bool:
    return _is_part(issue.layer.partition("@")[0], modules)


def _is_part(module: str, modules: Sequence[str]) -> bool:
    return any(not name or module == name or module.startswith(f"{name}.") for name in modules)


def _layer(record: FlowRecord, heads: Sequence[str]) -> LayerRecord | None:
    """Return the last layer call in modules, a first call if there are several."""
    inside = [
        layer
        for layer in record.layers
        if not layer.composite and layer.call == 0 and layer.parameters and _is_part(layer.module, heads)
    ]
    return max(inside, key=lambda layer: layer.order, default=None)


def policy_issue(
    record: FlowRecord,
    heads: Sequence[str],
    issue_type: IssueType,
    severity: IssueSeverity,
    description: str,
    magnitude: float,
    actions: tuple[str, ...],
    metrics: dict[str, object],
) -> Issue:
    """Return an issue at the last layer of some heads; the other arguments are those of `Issue`."""
    layer = _layer(record, heads)
    return Issue(
        layer=layer.name if layer else (heads[-1] if heads else ""),
        layer_type=layer.type if layer else record.provenance.model,
        issue_type=issue_type,
        severity=severity,
        description=description,
        magnitude=magnitude,
        recommended_actions=actions,
        metrics=metrics,
    )
