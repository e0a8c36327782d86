"""Parameters on which a clamp, a grid or a threshold has slope zero: all of one, or those at its bounds."""

from __future__ import annotations

from gradflow.detect.actions import Actions
from gradflow.records import IssueSeverity, ReachRecord

_MOST = 0.5  # of a matrix: what is left is the smaller part
_LARGER = 2.0  # times the others, in the mean: a threshold between them leaves 3 and more, chance leaves 1
_FEWEST = 16  # elements of which that can be said

Verdict = tuple[IssueSeverity, str, Actions]


def off_for_all(part: ReachRecord) -> Verdict:
    """Return how severe it is where nothing of a parameter is reached, why, and what to do."""
    if part.op.endswith("_backward"):
        name = "ReLU" if part.op == "threshold_backward" else part.op.removesuffix("_backward")
        return (
            IssueSeverity.HIGH,
            f"the loss takes derivatives of the model, and the slope of a {name} has none of its own",
            (f"Put what bends in the place of every {name}: nn.Tanh(), nn.SiLU(), nn.Softplus(), a sine.",),
        )
    return (
        IssueSeverity.HIGH,
        f"{part.op} at {part.at or part.layer_at} has slope zero there for every sample",
        (
            f"Bring what enters {part.op} into its range, or put a smooth bound (tanh, softplus) there.",
            "Start the bias in the middle of the range.",
        ),
    )


def at_bounds(part: ReachRecord, share: float) -> Verdict | None:
    """Return the same where most of a matrix is off, and those are its large elements; else None.

    A clamp or a grid that the weights themselves go through has no slope at its bounds and beyond: what lies
    there counts with its full size, and no step brings it back. Of what a threshold cuts off as small, the
    others are the larger ones: that is sparsity, as it is wanted. Few that lie beyond the bounds are usual.

    Args:
        part: some of the elements.
        share: of the parameter, of all that are off there.
    """
    if share < _MOST or len(part.shape) < 2 or part.size < _FEWEST or not part.larger >= _LARGER:
        return None
    return (
        IssueSeverity.MEDIUM,
        f"{part.op} at {part.at or part.layer_at} has slope zero there. In all, {share:.0%} of "
        f"{part.parameter} are off in it, and these are {part.larger:.2g} times as large as the others: they "
        "lie at its bounds or beyond, and no step brings them back",
        (
            f"Let the gradient pass at the bounds of {part.op}: ask in its backward pass whether what enters "
            "lies within them, bounds included (<= and not <), not whether the rounded value does.",
            "Widen its range (a larger step of the grid, wider bounds), so that few weights lie at its ends.",
        ),
    )
