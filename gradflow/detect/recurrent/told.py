"""What the loss asks for is told at steps that teach a recurrent layer nothing."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.flow.readings.recurrent_weights import late_profile
from gradflow.detect.knowledge import guesses
from gradflow.detect.recurrent.actions import fading_actions
from gradflow.records import (
    Evidence,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    RecurrenceRecord,
    RecurrentLevelRecord,
    Role,
    depth,
)

_TOLD = 4.5  # standard deviations above chance, of two looks together
_SILENT = 2.0  # the same, below which nothing is told; and by how much less than at the others it must be


def told_too_early(record: FlowRecord, r: RecurrenceRecord) -> Issue | None:
    """Return the verdict on a layer of a model that guesses, whose inputs tell what is asked for at steps
    that next to no gradient comes to, and nowhere else; None if that is not so.

    Measured, at both ends of the run: how far inputs go with ∂L/∂y, sample by sample, at steps that get at
    least 1e-5 of the gradient and at the others, in standard deviations above chance (see
    `RecurrenceRecord.told_faint`).

    Why this is evidence: that a memory is short is no illness where the task asks for no longer one, and the
    gradient alone cannot tell. The data can: what is told only at steps of a hundred-thousandth of the
    gradient is learned from in as many updates. (LSTM, GRU and plain layers whose class was told at steps of
    less than 1e-5 had learned nothing after 300; of 1e-4, some had.)

    Looks alike and is not: what is told at late steps, too, also where each tells little and those that are
    heard are few, so that what they tell together is not above chance; what no step tells by itself.

    Args:
        record: the record.
        r: the layer.
    """
    if not record.provenance.optimizer or not guesses(record):
        return None
    faint, heard = _together(r.told_faint), _together(r.told_heard)
    share = float(np.mean(r.told_share))
    alike = faint * math.sqrt(share / max(1.0 - share, 1e-9))  # what heard steps would have, told no less
    if not (faint >= _TOLD and heard < min(_SILENT, alike - _SILENT)):
        return None
    steps, reach, level = int(r.num_steps[-1]), *min(((_reach(v), v) for v in r.levels), key=lambda p: p[0])
    return Issue(
        layer=r.name,
        layer_type=r.type,
        issue_type=IssueType.VANISHING,
        severity=IssueSeverity.HIGH,
        description=f"What the loss asks for is told at steps that teach it nothing: going back in time the "
        f"gradient falls to 1e-5 within {reach} of {steps} steps; inputs before that go with the errors of "
        f"their samples ({faint:.1f} standard deviations above chance), and those after it do not "
        f"({heard:.1f}). The model guesses.",
        magnitude=faint,
        recommended_actions=fading_actions(r, level, steps),
        metrics={"told_faint": faint, "told_heard": heard, "num_steps": steps, "steps_to_faint": reach},
        evidence=Evidence(roles=Role.ABSORBING),
    )


def _reach(level: RecurrentLevelRecord) -> int:
    """Within how many steps back the gradient falls to a hundred-thousandth."""
    return depth(late_profile(level.readout_profile), 1e-5)


def _together(looks: Floats) -> float:
    """Return independent deviations together, by their sum over the root of their number; NaN for fewer than
    two, and where any is not known."""
    return float(np.sum(looks) / math.sqrt(len(looks))) if len(looks) > 1 else math.nan
