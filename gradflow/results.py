"""What the analyzers return: issues, the report, and the numbers of one kind of model."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from gradflow.records import AttentionStats, Issue, PolicyDistributionStats, ReservoirDynamics
from gradflow.report import Report


@attrs.frozen(kw_only=True)
class Results:
    """What the analyzers of one kind of model all return; subclasses add the numbers of the kind."""

    gradient_issues: tuple[Issue, ...]
    report: Report


@attrs.frozen(kw_only=True)
class TransformerResults(Results):
    """What `TransformerAnalyzer.analyze` returns.

    Args:
        attention_stats: every attention layer in plain numbers, by its qualified name.
        gradient_issues: most severe first.
        report: the whole report, with the record and the causes.
    """

    attention_stats: Mapping[str, AttentionStats]


@attrs.frozen(kw_only=True)
class PolicyResults(Results):
    """What `RLPolicyAnalyzer.analyze` returns.

    Args:
        policy_distribution_stats: the action distribution and the gradients through heads in plain numbers.
        gradient_issues: most severe first.
        report: the whole report, with the record and the causes; `report.record.policy` has every step.
    """

    policy_distribution_stats: PolicyDistributionStats


@attrs.frozen(kw_only=True)
class RecurrentResults(Results):
    """What `RecurrentAnalyzer.analyze` returns.

    Args:
        reservoir_dynamics: state and gradient through time, of the model and of each recurrent layer; without
            numbers where nothing was measured.
        gradient_issues: most severe first.
        report: the whole report, with the record and the causes.
    """

    reservoir_dynamics: ReservoirDynamics
