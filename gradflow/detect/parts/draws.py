"""Codes that are drowned by the noise that is added to them: a collapsed posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.knowledge import guesses, lowered
from gradflow.detect.parts.peers import type_of
from gradflow.detect.view import flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import (
    DrawRecord,
    Evidence,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    KnowledgeRecord,
)

# Cosines of the gradient at the means with the means, from which the pull to the prior is nearly all of it
# (0.4 where it is balanced), and from which it is most.
_PRESSED, _HALF = 0.7, 0.5
_PRIOR = (0.7, 1.4)  # sizes of noise as that of a prior of size one

_CHEAP = "A code that told something would pay: a fresh decoder may come to hear it."


def drowned_codes(
    share: float = 0.03, *, rise: float = 1.5, fall: float = 0.45
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of codes that a model draws, and whose means are nothing beside the noise.

    Measured, in the first step and the last: how much what a layer gives differs between samples, beside the
    random numbers that are added to it; whether the gradient at the means does little but shrink them (see
    `DrawRecord.pull`); and whether the outputs fit other samples as well as their own, and one output for all
    costs less.

    Why this is evidence: a code with a mean of a thirtieth of its noise tells at most ½ ln(1 + 1/900) nats,
    a two-thousandth, in each number. Whatever follows hears noise, learns to do without, and so hands back
    no gradient that would raise the mean: the posterior has collapsed to the prior (Bowman et al., 2016,
    arXiv:1511.06349; Lucas et al., 2019, arXiv:1911.02469). Means that the run itself takes there, to less
    than half of what they were and to twice that share, are on their way: the pull to the prior is stronger
    than the other, as that weighs a thirtieth of it, or as the decoder never hears the means: MEDIUM.
    Where a model knows its samples by another way, or noise of size one comes with the batch, the pull must
    be nearly all that comes to the means of all codes, so that the steps take them further yet: MEDIUM.

    Looks alike and is not: a mean that starts small and rises within the run, or stays small while a fresh
    decoder learns first what is common to all samples (LOW, where a code that tells two nats is cheap: the
    loss takes its mean by itself, and asks less for those than there is to gain, and the decoder hears it);
    single numbers of a code that are not used, beside others that are; a policy's actions, whose mean starts
    small beside its deviation; a loss that asks nothing of which sample an output is of; small means of a
    fresh encoder, whose pull is outweighed by what asks for more of them; what is scaled and shifted, as in a
    flow.

    Args:
        share: of the noise, below which the means tell nothing. Fresh encoders have 0.1 and more.
        rise: by which factor the share rises where the model is about to use the code.
        fall: of what it was, to which a run takes it that loses the code. Where the terms are in balance it
            rises, or falls by a third at slow rates.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        known = record.knowledge
        if record.policy is not None or not record.provenance.optimizer:
            return
        unheard = known is not None and _is_unheard(record, known)
        all_pressed = all(map(_is_pressed, record.parts.draws))
        for found in record.parts.draws:
            shares = found.signal[found.noise > 0] / found.noise[found.noise > 0]
            shares = shares[np.isfinite(shares)]
            if len(shares) < 2:
                continue
            fell = bool(shares[-1] <= fall * shares[0])
            plain = unheard and not found.given and (fell or not _is_outweighed(found))
            if not (plain or all_pressed) or not 0 < shares[-1] < (3 if all_pressed else 2) * share:
                continue
            lost = bool(shares.max() < share and shares[-1] <= rise * shares[0])
            if lost or fell:
                issue = _issue(record, found, shares, lost=lost, unheard=plain)
                yield lowered(issue, _CHEAP) if plain and _is_cheap(record, found.layer) else issue

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


def _is_unheard(record: FlowRecord, known: KnowledgeRecord) -> bool:
    """Whether outputs fit other samples as well, one for all costs less, and the loss asks whose they are."""
    if not guesses(record, 0.95) or not known.averaged < known.loss:
        return False
    return not math.isclose(known.shuffled, known.loss, rel_tol=1e-6)


def _is_pressed(found: DrawRecord) -> bool:
    """Whether the gradient at the means does little but shrink them, beside noise of the size of a prior."""
    if not len(found.pull) or not _PRIOR[0] <= found.noise[-1] <= _PRIOR[1]:
        return False
    return bool(found.pull[-1] >= _PRESSED)


def _is_outweighed(found: DrawRecord) -> bool:
    """Whether the gradient at the means holds a pull to a prior, and more of what else comes to them.

    So it tells of means that start small; of those that a run has taken down, noise is most that is left."""
    return len(found.pull) > 0 and bool(found.pull[-1] < _HALF)


def _issue(record: FlowRecord, found: DrawRecord, shares: Floats, *, lost: bool, unheard: bool) -> Issue:
    known, share = record.knowledge, float(shares[-1])
    loss, constant = (known.loss, known.averaged) if known is not None else (math.nan, math.nan)
    if unheard:
        why = f"What follows hears noise, and the loss is {loss:.3g}, where one output for all samples costs "
        why += f"{constant:.3g}. "
    else:
        why = "The gradient that comes to it does little but shrink it (a cosine of "
        why += f"{found.pull[-1]:.2f} with itself), so nothing asks for more of it. "
    return Issue(
        layer=found.layer,
        layer_type=type_of(record, found.layer.partition("@")[0]),
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if lost and unheard else IssueSeverity.MEDIUM,
        description=f"Between samples its output differs by {share:.1e} of the random numbers that are added "
        f"to it, so the code tells nothing of a sample: at most {0.5 * math.log1p(share**2):.1e} nats in a "
        f"number. {why}"
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
        metrics={"share": share, "loss": loss, "constant_loss": constant},
        evidence=Evidence(),
    )
