"""What goes wrong along the depth of a transformer: positions that become one, branches that add nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.attention.attention import num_updates
from gradflow.detect.evidence import late
from gradflow.detect.flow.readings.same_keys import ROUNDING, reads_one
from gradflow.detect.knowledge import excused
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType


def collapsed_rank(
    alike: float = 0.01, *, fall: float = 10.0, severe: float = 1e-3, rounding: float = ROUNDING
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of token representations that become one, layer by layer.

    Measured: what enters each attention layer, and of it the residual ‖X − 1x̄ᵀ‖ / ‖X‖ over the positions of
    a sample, in the order of execution; at the end of the run. And of what it reads, whether positions can be
    told apart at all: the largest distance of a score from the mean of its row, where queries differ, and the
    gradients at queries and keys over that at the values; at every look.

    Why this is evidence: attention averages over positions, so without a way round it the residual falls
    doubly exponentially with depth (Dong, Cordonnier and Loukas, 2021). The residual is free of scale. It is
    taken within a sample: samples that differ from each other do not hide it. Where keys are all the same,
    every query scores them alike, and where values are too, the softmax hands nothing back to either: queries
    learn nothing, and all get the same, whatever they ask.

    Looks alike and is not: the *output* of one attention layer, which averages whenever its weights are near
    uniform, as at most initialisations, beside a skip connection that keeps what tells positions apart;
    sequences of one position, and rows that may see a single key; positions that are alike from the start
    (learned queries of a decoder); queries or keys that start at zero, by design.

    Args:
        alike: residual below which positions are alike: what tells them apart is a percent.
        fall: how many times as much there must have been before, at an earlier layer.
        severe: residual below which it is HIGH.
        rounding: distance of scores, and share of the gradient at the values, below which there is none but
            by rounding. Float32 leaves 1e-7 of either, the smallest usual initialisations 1e-3.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        yield from _entering_alike(record, alike, fall, severe)
        yield from _read_alike(record, fall * alike, rounding)

    return excused(detector)


def _entering_alike(record: FlowRecord, alike: float, fall: float, severe: float) -> Iterable[Issue]:
    """The first attention layer that all positions enter as one, after they differed before."""
    most, at = 0.0, ""
    for layer in record.transformer.attention:
        residual = late(layer.input_residual)
        if not math.isfinite(residual):
            continue
        if residual < alike and most >= fall * alike:
            yield Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.BOTTLENECK,
                severity=IssueSeverity.HIGH if residual < severe else IssueSeverity.MEDIUM,
                description=f"All positions have become one where they enter it: only {residual:.1e} of "
                f"them differs within a sample, after {most:.2g} at {at}. Attention averages, and "
                "nothing has kept what tells them apart.",
                magnitude=residual,
                recommended_actions=(
                    "Put a skip connection round every attention layer, and an MLP behind it.",
                    "Scale what skips up against what is added, or use fewer layers.",
                ),
                metrics={
                    "op": layer.op,
                    "residual": residual,
                    "residual_before": most,
                    "before": at,
                },
                evidence=Evidence(side_branch=math.isfinite(late(layer.branch_share))),
            )
            return
        if residual > most:
            most, at = residual, layer.name


def _read_alike(record: FlowRecord, apart: float, rounding: float) -> Iterable[Issue]:
    """The first attention layer whose queries differ, and to which all that it reads is one and the same."""
    same = [layer for layer in record.transformer.attention if reads_one(layer, apart, rounding)]
    if not same:
        return
    layer, others = same[0], [f"{other.name}" for other in same[1:]]
    keys, asked = late(layer.num_keys), late(layer.input_residual)
    yield Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"What it reads is the same at all of its {keys:.3g} positions: no query scores one of "
        f"them above another, though the queries of a sample do differ (by {asked:.0%} of their size). All "
        "get the same, and queries and keys get no gradient but rounding."
        + (f" So it is in {', '.join(others)}." if others else ""),
        magnitude=float(np.nanmax(layer.scores.logit_peak)),
        recommended_actions=(
            f"Hand {layer.name or 'the attention'} keys and values that differ by position: the features as "
            "they are before they are pooled (before a mean, max, expand or repeat), with their places "
            "added.",
            "To see where they become one: print what it takes its keys and values from at two positions "
            "of a sample, and go back from there.",
        ),
        metrics={
            "op": layer.op,
            "num_keys": keys,
            "logit_peak": float(np.nanmax(layer.scores.logit_peak)),
            "residual": asked,
            "others": tuple(others),
        },
    )


def idle_branches(
    share: float = 1e-4, *, min_updates: int = 3, growth: float = 2.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of residual branches that carry nothing.

    Measured: ‖branch‖ / ‖stream‖ at every sum that ends a residual branch, over the run.

    Why this is evidence: what is a ten-thousandth of what it is added to changes nothing behind it, and as
    long as it does not grow, training does nothing about it.

    Looks alike and is not: branches that start at zero or close to it by design (zero-initialised last
    layers, adaLN-zero, LayerScale, gates), which grow with the first steps: so only a branch that has not
    grown in a run with an optimizer is judged; without an optimizer it is INFO.

    Args:
        share: below which a branch carries nothing. Hugging Face's models start above 0.005.
        min_updates: steps of the optimizer from which a branch is judged: two may pass before a branch behind
            two zeros starts.
        growth: a branch that has grown by this factor since the first look is on its way.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        judged = num_updates(record) >= min_updates
        for branch in record.transformer.branches:
            known = branch.share[np.isfinite(branch.share)]
            if not len(known) or not late(branch.share) < share:
                continue
            end = float(known[-1])
            if judged and end > growth * float(known[0]):
                continue
            tell = "more steps tell" if record.provenance.optimizer else "pass optimizer= to see"
            why = "and it does not grow." if judged else f"and {tell} whether training wakes it."
            yield Issue(
                layer=branch.name,
                layer_type=branch.type,
                issue_type=IssueType.DEAD,
                severity=IssueSeverity.MEDIUM if judged else IssueSeverity.INFO,
                description=f"The residual branch that ends here adds {end:.1e} of its stream to it, {why}",
                magnitude=end,
                recommended_actions=(
                    "Look for a factor that scales the branch down: a gate, a LayerScale, a weight of zero.",
                    "If it is meant to start at zero, see that its last factor is trained, and at what rate.",
                ),
                metrics={"share": end, "first_steps": float(known[0])},
            )

    return excused(detector)
