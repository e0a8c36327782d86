"""Steps of the optimizer that the model's own forward pass takes back."""

from __future__ import annotations

import numpy as np

from gradflow.detect.updates.readings import held, layer_of
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType, UpdateRecord

_GRID = 0.5  # different values per entry, below which they lie on a grid
_PART = 0.5  # of the numbers that train


def taken_back(record: FlowRecord, least: float) -> Issue | None:
    """Return an issue where the forward pass takes back what the steps did to the parameters.

    Entries that were put back to the bit, although the step had changed them, of parameters that the model's
    own code writes to, in every step that was looked at. Zeros do not count: a mask laid on the weights keeps
    them at zero by design. Bounds and norms that are written so move what is inside of them or along them.

    Args:
        record: the record.
        least: share of the entries that were changed, from which a parameter is stuck.
    """
    pairs = held(record)
    stuck = [(u, p) for u, p in pairs if _share(u) >= least]
    if not stuck:
        return None
    number, of_all = sum(p.num_elements for _, p in stuck), sum(p.num_elements for _, p in pairs)
    layer, kind = layer_of(record, stuck[0][0].name)
    share = min(_share(u) for u, _ in stuck)
    grid = all(u.levels <= _GRID for u, _ in stuck)
    names = ", ".join(u.name for u, _ in stuck[:3]) + (f" and {len(stuck) - 3} more" if stuck[3:] else "")
    why = "each is rounded away" if grid else "each is written over"
    told = "all" if share == 1 else f"{share:.0%} or more"
    keep = (
        "Keep the weights in full precision, and round what the forward pass computes with: w + (w.round() - "
        "w).detach() in the place of w, with the grid of your own."
        if grid
        else "Compute what is to be used from the parameter, and leave the parameter as it is: nothing but "
        "the optimizer may write to it (copy_, .data, in-place operations)."
    )
    return Issue(
        layer=layer,
        layer_type=kind,
        issue_type=IssueType.NUMERICAL if grid else IssueType.DEAD,
        severity=IssueSeverity.HIGH if number >= _PART * of_all else IssueSeverity.MEDIUM,
        description=f"{names}: the forward pass writes over its own weights, and takes back what the "
        f"optimizer did to them. Of the entries that a step changed, {told} are to the bit what they were "
        f"once the next batch has run: {why}, so {number:,} numbers never move.",
        magnitude=share,
        recommended_actions=(
            keep,
            "If they are meant to be set by the code alone, keep them in a buffer, or freeze them: "
            "requires_grad_(False).",
        ),
        metrics={"parameters": tuple(u.name for u, _ in stuck), "undone": share, "elements": number},
    )


def _share(update: UpdateRecord) -> float:
    """Return the least share of an update that was put back, of all that are known; 0 where none is."""
    known = update.undone[np.isfinite(update.undone) & (update.rms[: len(update.undone)] > 0)]
    return float(known.min()) if len(known) else 0.0
