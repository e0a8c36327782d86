"""VANISHING: a recurrent layer that is read behind padding, by when it has forgotten what came before."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect.evidence import late
from gradflow.detect.flow.readings.recurrent_weights import late_profile
from gradflow.detect.knowledge import fell_by_learning
from gradflow.records import (
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    RecurrenceRecord,
    Role,
    depth,
)

_READ = 0.5  # of the steps, above which each has a gradient of its own
_LITTLE, _LOST = 1e-4, 1e-6  # of what is at the last step: next to nothing, and lost to rounding


_FORGOTTEN, _DROWNED = 1e-3, 0.03  # of the largest, what steps before the padding get at first, and ever


def _heard_before(r: RecurrenceRecord, padding: int) -> list[float]:
    """The largest gradient before the padding over the largest of all, by look, of the level with most."""
    known = [np.nan_to_num(level.readout_profile) for level in r.levels]
    known = [p for p in known if p.ndim == 2 and p.shape[1] > padding]
    shares = [p[:, :-padding].max(1) / np.maximum(p.max(1), 1e-300) for p in known]
    return list(np.max(shares, axis=0)) if shares and len({len(x) for x in shares}) == 1 else []


def behind_padding(record: FlowRecord, r: RecurrenceRecord) -> Issue | None:
    """Return an issue where a layer is read behind padding that is longer than what it remembers; else None.

    Measured: at how many steps up to the last one that is read the input is the same, for most samples and
    the same for all; and within how many steps the gradient falls to 1e-4 of what is read (MEDIUM) and to
    1e-6 (HIGH). Where that is within the padding, nothing but padding teaches the layer, and no answer holds
    more. Next to nothing else does where padding is at least half of the steps, and what comes before it
    starts with a thousandth of the gradient and never gets more than 3 percent of it (MEDIUM).

    Looks alike and is not: a few steps of padding; packed sequences and outputs that are taken at each
    sample's own last step, where padding is not read; a layer that reads the other way as well; inputs that
    are the same throughout, as those of a decoder that is given its state; a run whose loss has fallen by
    half, and below what one answer for all costs (LOW).

    Args:
        record: the record.
        r: one of its recurrences.
    """
    padding = math.floor(late(r.still_end)) if math.isfinite(late(r.still_end)) else 0
    steps = late(r.num_steps.astype(float))
    if padding < 2 or padding >= steps or late(r.read_share) > _READ:
        return None
    if any("reverse" in level.level for level in r.levels):
        return None
    little, lost = (
        max(depth(late_profile(v.readout_profile), x) for v in r.levels) for x in (_LITTLE, _LOST)
    )
    heard = _heard_before(r, padding)
    drowned = bool(heard) and heard[0] <= _FORGOTTEN and max(heard) <= _DROWNED and 2 * padding >= steps
    if little > padding and not drowned:
        return None
    severity = IssueSeverity.HIGH if lost <= padding else IssueSeverity.MEDIUM
    if fell_by_learning(record):
        severity = IssueSeverity.LOW
    within = (
        f"less than 1e-6, lost to rounding, within {lost}" if lost <= padding else f"1e-4 within {little}"
    )
    if little > padding:
        within = f"{max(heard):.2g} before the padding, and to {heard[0]:.2g} at first"
    return Issue(
        layer=r.name,
        layer_type=r.type,
        issue_type=IssueType.VANISHING,
        severity=severity,
        description=f"It is read behind padding: the last {padding} of its {steps:.0f} steps get the same "
        "input in most samples, and going back from the last step the gradient falls to "
        f"{within}. What the samples differ in comes before that: it is forgotten by the time the output is "
        "taken, and nothing teaches it.",
        magnitude=padding / steps,
        recommended_actions=(
            "Take the output at each sample's own last step (out[torch.arange(len(out)), lengths - 1]), or "
            "pack the sequences: nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False).",
            "Or pad at the front, or average over the steps that are no padding.",
        ),
        metrics={
            "padding": padding,
            "num_steps": int(steps),
            "steps_to_little": little,
            "steps_to_rounding": lost,
        },
        evidence=Evidence(roles=Role.ABSORBING),
    )
