"""What became of a model when a remedy was tried: `TrialRecord`, one for each, and `TrialsRecord`, all."""

from __future__ import annotations

import enum

import attrs
import numpy as np

from gradflow.records.fields import NAN, Floats, array_field, float_field, to_tuple
from gradflow.records.issues import AnyIssueType, Cause

FINAL_SHARE = 0.2
"""Share of the steps, the last ones, whose mean loss is what a run came to."""


class TrialVerdict(enum.Enum):
    """What a remedy does. Like an `Issue`, a verdict by definition."""

    CURES = "cures"
    """The issue is gone with every seed, the loss is clearly lower, and nothing new is wrong."""
    HELPS = "helps"
    """The loss is clearly lower, and the issue is gone with some of the seeds, or another has come."""
    NO_EFFECT = "no effect"
    """The loss is what it was, or the issue is: nothing was mended, or nothing came of it."""
    HARMS = "harms"
    """The loss is clearly higher, or no longer finite."""
    NOT_APPLICABLE = "not applicable"
    """It could not be tried; why is told."""

    @property
    def confirms(self) -> bool:
        """Whether it bears the cause out: mending what is alleged changed the training for the better."""
        return self in (TrialVerdict.CURES, TrialVerdict.HELPS)


_RANKS = {verdict: rank for rank, verdict in enumerate(TrialVerdict)}


@attrs.frozen(kw_only=True)
class TrialRecord:
    """What became of a model when one remedy for one cause was tried, against the same runs without it.

    Both arms had the same batches in the same order and the same random states, seed by seed.

    Args:
        remedy: its name.
        words: what it changes.
        code: the same as code to paste.
        layer: the layer of the cause that it was tried for.
        issue_type: the type of that cause.
        verdict: what it does.
        why: what the verdict rests on, in one sentence; for one that could not be tried, the reason.
        steps: how many steps each run had; 0 where it could not be tried.
        losses_without: loss by step and seed without the remedy, shape (steps, seeds).
        losses_with: the same with it.
        present: share of the seeds in which the issue is there without the remedy.
        gone: share of the seeds in which it is not there with the remedy.
        gain: how much lower the loss came out, mean over seeds, in [-1, 1]: see
            `gradflow.remedies.trials.verdict`.
        gain_spread: its standard error over seeds; 0 for one seed.
        new_issues: issues of severity MEDIUM and above that only the remedy's runs have, in words.
        seconds: that its runs took.
    """

    remedy: str
    words: str
    code: str
    layer: str
    issue_type: AnyIssueType
    verdict: TrialVerdict
    why: str = ""
    steps: int = 0
    losses_without: Floats = array_field(axes=2)
    losses_with: Floats = array_field(axes=2)
    present: float = float_field(NAN)
    gone: float = float_field(NAN)
    gain: float = float_field(NAN)
    gain_spread: float = float_field(NAN)
    new_issues: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    seconds: float = float_field(0.0)

    @property
    def seeds(self) -> int:
        """How many seeds it was tried with."""
        return self.losses_with.shape[1]

    @property
    def loss_without(self) -> float:
        """Median over seeds of what the loss came to without the remedy; NaN if it was not finite."""
        return _middle(final_losses(self.losses_without))

    @property
    def loss_with(self) -> float:
        """Median over seeds of what the loss came to with the remedy; NaN if it was not finite."""
        return _middle(final_losses(self.losses_with))

    @property
    def cause(self) -> tuple[str, str]:
        """Layer and type of the cause it was tried for."""
        return self.layer, self.issue_type.value


def final_losses(losses: Floats) -> Floats:
    """Return by seed what the loss came to: its mean over the last fifth of the steps.

    Args:
        losses: shape (steps, seeds).

    Returns:
        Shape (seeds,); NaN where one of them is not finite.

    >>> final_losses(np.array([[5.0, 5.0], [4.0, 4.0], [3.0, 3.0], [2.0, 2.0], [1.0, np.inf]]))
    array([ 1., nan])
    """
    if len(losses) == 0:
        return np.full(losses.shape[1], NAN)
    last = losses[-max(1, round(FINAL_SHARE * len(losses))) :]
    known = np.isfinite(last)
    return np.where(known.all(axis=0), np.where(known, last, 0.0).mean(axis=0), NAN)


def _middle(values: Floats) -> float:
    return float(np.median(values)) if len(values) else NAN


@attrs.frozen(kw_only=True)
class TrialsRecord:
    """All trials that `gradflow.try_remedies` made.

    Args:
        trials: one per remedy and cause, in the order in which they were made.
        steps: how many steps a run has.
        seeds: how many seeds a remedy is tried with.
        optimizer: what stepped the runs.
        num_batches: how many batches were drawn.
        seconds: that all of it took.
        notes: what a reader must know: what was left out, and why.
    """

    trials: tuple[TrialRecord, ...] = attrs.field(default=(), converter=to_tuple)
    steps: int = 0
    seeds: int = 0
    optimizer: str = ""
    num_batches: int = 0
    seconds: float = float_field(0.0)
    notes: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)

    def of(self, cause: Cause) -> tuple[TrialRecord, ...]:
        """Return the trials that were made for a cause, the best first."""
        found = [trial for trial in self.trials if trial.cause == (cause.layer, cause.issue_type.value)]
        return tuple(sorted(found, key=_place))

    def best(self, cause: Cause) -> TrialRecord | None:
        """Return the trial that came out best for a cause; None where none could be made."""
        found = [t for t in self.of(cause) if t.verdict is not TrialVerdict.NOT_APPLICABLE]
        return found[0] if found else None

    def confirmed(self, cause: Cause) -> bool | None:
        """Return whether trials bear a cause out; None where none could be made."""
        best = self.best(cause)
        return None if best is None else best.verdict.confirms


def _place(trial: TrialRecord) -> tuple[int, int, float]:
    """What does most first, of those alike what was tried with more seeds, then the lower loss."""
    loss = trial.loss_with
    return _RANKS[trial.verdict], -trial.seeds, loss if np.isfinite(loss) else np.inf
