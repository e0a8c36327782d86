"""Codes that are drowned by the noise that is added to them: a collapsed posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.knowledge import guesses, lowered
from gradflow.detect.parts.peers import type_of
from gradflow.detect.view import flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import DrawRecord, Evidence, Floats, FlowRecord, Issue, IssueSeverity, IssueType

_CHEAP = "A code that told something would pay: a fresh decoder may come to hear it."


def drowned_codes(
    share: float = 0.03, *, rise: float = 1.5, fall: float = 0.45
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of codes that a model draws, and whose means are nothing beside the noise.

    Measured, in the first step and the last: how much what a layer gives differs between samples, beside the
    random numbers that the model adds to it; and whether the outputs fit other samples as well as their own,
    and one output for all costs less.

    Why this is evidence: a code with a mean of a thirtieth of its noise tells at most ½ ln(1 + 1/900) nats,
    a two-thousandth, in each number. Whatever follows hears noise, learns to do without, and so hands back
    no gradient that would raise the mean: the posterior has collapsed to the prior (Bowman et al., 2016,
    arXiv:1511.06349; Lucas et al., 2019, arXiv:1911.02469). Means that the run itself takes there, to less
    than half of what they were and to twice that share, are on their way: the pull to the prior is stronger
    than the other, as that weighs a thirtieth of it, or as the decoder never hears the means: MEDIUM.

    Looks alike and is not: a mean that starts small and rises within the run, or stays small while a fresh
    decoder learns first what is common to all samples (LOW, where a code that tells two nats is cheap: the
    loss takes its mean by itself, and asks less for those than there is to gain, and the decoder hears it);
    single numbers of a code that are not used, beside others that are; a policy's actions, whose mean starts
    small beside its deviation; outputs that know their samples by another way; a loss that asks nothing of
    which sample an output is of.

    Args:
        share: of the noise, below which the means tell nothing. Fresh encoders have 0.1 and more.
        rise: by which factor the share rises where the model is about to use the code.
        fall: of what it was, to which a run takes it that loses the code. Where the terms are in balance it
            rises, or falls by a third at slow rates.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        known = record.knowledge
        if known is None or record.policy is not None or not record.provenance.optimizer:
            return
        if not guesses(record, 0.95) or not known.averaged < known.loss:
            return
        if math.isclose(known.shuffled, known.loss, rel_tol=1e-6):
            return
        for found in record.parts.draws:
            shares = found.signal / found.noise
            shares = shares[np.isfinite(shares)]
            if len(shares) < 2 or not 0 < shares[-1] < 2 * share:
                continue
            lost = shares.max() < share and shares[-1] <= rise * shares[0]
            if lost or shares[-1] <= fall * shares[0]:
                issue = _issue(record, found, shares, lost=lost)
                yield lowered(issue, _CHEAP) if _is_cheap(record, found.layer) else issue

    return detector


def _is_cheap(record: FlowRecord, layer: str, nats: float = 2.0) -> bool:
    """Whether a code that tells so much costs less than all that there is to gain, and what is behind hears
    it, so that it may still come to be used.

    A divergence from the prior costs half of its weight for each number of the mean that is as large as its
    deviation, which is what the loss rises by as noise of size one is added to the mean.
    """
    known, flow, node = record.knowledge, flow_of(record), node_name(layer)
    if known is None or not known.raised or node not in flow.layers:
        return False
    size = flow.layers[node].output_rms[-1]
    rises = [
        2 * nats * rise / math.prod(shape[1:])
        for rise, shape, scale in zip(known.raised, known.shapes, known.scales, strict=True)
        if math.isfinite(rise) and math.isclose(scale, size, rel_tol=1e-3)
    ]
    heard = any(flow.has_matrix(n) for n in flow.wiring.downstream(node) if n in flow.layers)
    return len(rises) == 1 and 0 < rises[0] < known.averaged and heard


def _issue(record: FlowRecord, found: DrawRecord, shares: Floats, *, lost: bool) -> Issue:
    known, share = record.knowledge, float(shares[-1])
    assert known is not None
    return Issue(
        layer=found.layer,
        layer_type=type_of(record, found.layer.partition("@")[0]),
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if lost else IssueSeverity.MEDIUM,
        description=f"Between samples its output differs by {share:.1e} of the random numbers that are added "
        f"to it, so the code tells nothing of a sample: at most {0.5 * math.log1p(share**2):.1e} nats in a "
        f"number. What follows hears noise, and the loss is {known.loss:.3g}, where one output for all "
        f"samples costs {known.averaged:.3g}. "
        + (
            "The posterior has collapsed to the prior."
            if lost
            else f"In the first step it was {shares[0]:.1e}: the posterior collapses to the prior."
        ),
        magnitude=share,
        recommended_actions=(
            "Reduce both terms of the loss in one way: sum over the features and take the mean over the "
            "samples of the reconstruction and of the KL term alike. A mean over features beside a sum "
            "weighs the KL term as many times too much as there are features.",
            "Raise the weight of the KL term from zero over the first epochs, or leave each number of the "
            "code some free nats: kl.clamp_min(0.1).",
            "Check that the decoder is given the mean with the noise, and hands its gradient back.",
            "Start the encoder anew, or with a small deviation (log variance at −4): a collapsed one hardly "
            "gets a gradient that would raise it.",
        ),
        metrics={"share": share, "loss": known.loss, "constant_loss": known.averaged},
        evidence=Evidence(),
    )
