"""UNSTABLE: updates that overshoot, since the rate is too high for the curvature, or the moments are cold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

from gradflow.detect.evidence import late, total_gradient
from gradflow.detect.updates.rate import Misfit
from gradflow.detect.updates.readings import has_flattened, has_stranded, has_undone, largest, layer_of
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType, Role


def overshooting(record: FlowRecord, misfit: Misfit) -> Issue:
    """Return the issue of a run whose updates make things worse, where nothing else was told of it."""
    name, _ = largest(record)
    layer, kind = layer_of(record, name)
    first, last = float(record.losses[0]), float(record.losses[-1])
    undone, stranded, flattened = has_undone(record), has_stranded(record), has_flattened(record)
    far = not np.isfinite(record.losses).all() or last >= 10 * first or undone or stranded or flattened
    told = f"The updates make things worse: the loss goes from {first:.3g} to {last:.3g}"
    if undone:
        told += f", over {record.losses.max():.3g}, and all samples get the same answer"
    elif stranded:
        ended = late(total_gradient(record)) / float(np.max(total_gradient(record)))
        told = (
            "The updates carry the model to where its loss is flat: it guesses, the gradient is "
            f"{ended:.1e} of what it was on the way, and the loss, which was {record.losses.min():.3g}, "
            f"stays at {last:.3g}"
        )
    elif flattened and record.knowledge is not None:
        told = (
            "The updates throw the model to where it gives all samples much the same answer: the loss goes "
            f"from {first:.3g} to {last:.3g}, and to know nothing costs {record.knowledge.ignorance:.3g}"
        )
    return with_rate(
        Issue(
            layer=layer,
            layer_type=kind,
            issue_type=IssueType.UNSTABLE,
            severity=IssueSeverity.HIGH if far else IssueSeverity.MEDIUM,
            description=f"{told}.",
            magnitude=misfit.ratio if math.isfinite(misfit.ratio) else 0.0,
            evidence=Evidence(roles=Role.JUMPING),
        ),
        misfit,
        record,
    )


def without_rates(actions: Sequence[str]) -> tuple[str, ...]:
    """Return actions without those that guess at a rate, where it was measured."""
    return tuple(action for action in actions if not action.startswith("Lower the learning rate"))


def with_rate(issue: Issue, misfit: Misfit, record: FlowRecord) -> Issue:
    """Return an issue of an unstable run with what the updates tell of the rate."""
    optimizer, curve = record.provenance.optimizer, misfit.curve
    text, actions = "", list[str]()
    metrics: dict[str, float] = {"update_ratio": misfit.ratio, "rate": misfit.rate}
    if math.isfinite(misfit.factor):
        lower = misfit.rate / misfit.factor
        metrics["rate_factor"] = misfit.factor
        text += (
            f" The learning rate, {misfit.rate:.3g}, is too high by a factor of about {misfit.factor:.1g}: "
            f"one update is as large as {misfit.ratio:.2g} of the weights."
        )
        actions.append(f"Lower the learning rate of {optimizer}: {misfit.rate:.3g} to about {lower:.1g}.")
        issue = attrs.evolve(issue, recommended_actions=without_rates(issue.recommended_actions))
    if curve is not None:
        metrics |= {"sharpness": curve.sharpness, "best": curve.best, "actual": curve.actual}
        text += (
            f" The update of step {curve.step} changes the loss of its own batch by {curve.actual:+.3g}; to "
            f"first order it would be {curve.slope:+.3g}."
        )
        if math.isfinite(curve.sharpness):
            text += f" Curvature along it over slope is {curve.sharpness:.3g}, where 2 is the edge."
    if misfit.cold:
        text += " The optimizer's state is new, while the model came with what it knows."
        actions.append(
            "Load the optimizer's state with the model's, or warm the rate up: without it, the first steps "
            "have the full rate in every number."
        )
    return attrs.evolve(
        issue,
        description=issue.description + text,
        recommended_actions=(*actions, *issue.recommended_actions),
        metrics={**issue.metrics, **metrics},
    )
