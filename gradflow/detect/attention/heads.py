"""Heads that do nothing or all the same, and queries, keys and values that learn at different rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.attention.attention import late_by_head, late_mean
from gradflow.detect.evidence import early, late
from gradflow.detect.knowledge import excused
from gradflow.records import (
    AttentionRecord,
    Evidence,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
)


def redundant_heads(
    dead: float = 1e-6, *, alike: float = 0.01, some: float = 0.5, sharp: float = 0.1
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of dead and of duplicate heads.

    Measured, at the end of the run: for every head the norm of what it gives to the output projection, and
    the norm of the gradient that comes back to it, over the largest of the layer's heads (DEAD where either
    is nothing); and its Jensen–Shannon distance to the head that is most like it (BOTTLENECK where that is
    nothing), over what two independent heads with scores of this spread would have, s/2 for a standard
    deviation s that is small.

    Why this is evidence: other heads of the same layer, with the same input and the same loss behind them, do
    give and get. And heads whose scores differ by their own spread cannot be alike by chance.

    Looks alike and is not: an output projection that starts at zero, where *all* heads get nothing; attention
    that is all but uniform, whose heads are alike because their scores are small; heads that all look at one
    place (collapsed, or resting on the first key).

    Args:
        dead: share of the strongest head below which a head is dead. At the end of a float32's digits.
        alike: share of the distance of independent heads below which two are duplicates. Heads that share
            a bias by position have the share that content has in their scores, usually above a tenth.
        some: share of dead or duplicate heads from which it is MEDIUM; below, the layer works with the rest.
        sharp: entropy share below which heads are not compared.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for layer in record.transformer.attention:
            if layer.num_heads > 1:
                yield from _dead_heads(layer, dead, some)
                yield from _duplicates(layer, alike, some, sharp)

    return excused(detector)


def _dead_heads(layer: AttentionRecord, dead: float, some: float) -> Iterable[Issue]:
    given, got = _relative(layer.head_output), _relative(layer.head_grad)
    silent = (given < dead) | (got < dead)
    if not silent.any() or silent.all():
        return
    what = "gives to the output" if (given < dead).any() else "gets as a gradient"
    yield Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.MEDIUM if silent.mean() >= some else IssueSeverity.LOW,
        description=f"{int(silent.sum())} of its {layer.num_heads} heads are dead: what each of them {what} "
        f"is below {dead:.0e} of the strongest head's.",
        magnitude=float(silent.mean()),
        recommended_actions=(
            "Initialise the value and output weights of these heads anew, or remove the heads.",
            "If they are masked or pruned on purpose, nothing is wrong.",
        ),
        metrics={
            "op": layer.op,
            "heads": tuple(int(h) for h in np.flatnonzero(silent)),
            "output_share": tuple(float(v) for v in given),
            "gradient_share": tuple(float(v) for v in got),
        },
    )


def _relative(values: Floats) -> Floats:
    """Norms by head over the largest one; NaN where all are zero or unknown."""
    found = late_by_head(values)
    largest = np.nanmax(found) if np.isfinite(found).any() else math.nan
    return found / largest if largest > 0 else np.full(len(found), math.nan)


def _duplicates(layer: AttentionRecord, alike: float, some: float, sharp: float) -> Iterable[Issue]:
    spread = late_by_head(layer.scores.logit_std)
    independent = np.minimum(spread / 2.0, math.sqrt(math.log(2.0)))
    distance = late_by_head(layer.nearest_head)
    judged = (spread >= 0.1) & (late_by_head(layer.entropy_share) >= sharp)
    twins = judged & (distance < alike * independent)
    if not twins.any():
        return
    yield Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.MEDIUM if twins.mean() >= some else IssueSeverity.LOW,
        description=f"{int(twins.sum())} of its {layer.num_heads} heads attend exactly like another one: the "
        f"largest distance to it is {float(distance[twins].max()):.1e}, where heads of their own would have "
        f"about {float(independent[twins].min()):.1g}.",
        magnitude=float(distance[twins].max()),
        recommended_actions=(
            "Initialise queries and keys of each head at random and independently.",
            "If heads were copied to make the layer wider, add noise to the copies, or use fewer heads.",
        ),
        metrics={
            "op": layer.op,
            "heads": tuple(int(h) for h in np.flatnonzero(twins)),
            "head_diversity": late(layer.head_diversity),
            "logit_std": late_mean(layer.scores.logit_std, np.ones(layer.num_heads, dtype=bool)),
        },
    )


def unbalanced_attention(
    ratio: float = 100.0,
    *,
    starved: float = 1e4,
    merged: float = 0.05,
    spread: float = 0.5,
    severe: float = 10.0,
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of queries, keys and values that get gradients of very different size.

    Measured: the norms of the gradient at queries, keys and values (inside `nn.MultiheadAttention`, at the
    weights that make them), at the end of the run.

    Why this is evidence: scores depend on the products of queries and keys alone, so Σ q·∂L/∂q = Σ k·∂L/∂k
    always, and the two gradients differ in norm about as keys and queries do, the other way round. One that
    is a hundred times the other means weights a hundred times apart, for which no one learning rate fits.
    Values are another matter: the gradient of queries and keys is smaller by as much as the scores are
    small, or the softmax sharp.

    Looks alike and is not: positions that have become one, whose keys are all the same, so that no query
    gets a gradient (`collapsed_rank`); queries and keys whose gradient is far below that of the values
    because they start small, which is usual (BERT and GPT-2 have a factor of 100 at their initialisation):
    LOW at most, and only where the scores are of ordinary size and the softmax is not saturated, which has
    a detector of its own.

    Args:
        ratio: between queries and keys, from which it is MEDIUM. Healthy layers have 1 to 4.
        starved: between values and the larger of the other two, from which it is LOW.
        merged: residual of the input's positions below which they are not judged.
        spread: standard deviation from which scores are of ordinary size.
        severe: by how much more than `ratio` makes it HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for layer in record.transformer.attention:
            q, k, v = (
                late(layer.gradients.query_grad),
                late(layer.gradients.key_grad),
                late(layer.gradients.value_grad),
            )
            if not (q > 0 and k > 0 and v > 0) or late(layer.input_residual) < merged:
                continue
            between = max(q / k, k / q)
            if between >= ratio:
                small, large = ("queries", "keys") if q < k else ("keys", "queries")
                severity = IssueSeverity.HIGH if between >= severe * ratio else IssueSeverity.MEDIUM
                brought_about = bool(record.provenance.optimizer) and _apart_at_first(layer) < ratio
                yield _imbalance(layer, severity, small, large, between, (q, k, v), developed=brought_about)
                continue
            scores = late_mean(layer.scores.logit_std, np.ones(layer.num_heads, dtype=bool))
            slope = late_mean(layer.scores.slope, np.ones(layer.num_heads, dtype=bool))
            others = max(q, k)
            apart = max(v / others, others / v)
            if apart >= starved and scores >= spread and slope >= 0.1:
                small, large = ("values", "queries") if v < others else ("queries", "values")
                yield _imbalance(layer, IssueSeverity.LOW, small, large, apart, (q, k, v))

    return excused(detector)


def _apart_at_first(layer: AttentionRecord) -> float:
    """How many times the gradient at queries was that at keys in the first steps, or the other way round."""
    q, k = early(layer.gradients.query_grad), early(layer.gradients.key_grad)
    return max(q / k, k / q) if q > 0 and k > 0 else math.inf


def _imbalance(
    layer: AttentionRecord,
    severity: IssueSeverity,
    small: str,
    large: str,
    ratio: float,
    norms: tuple[float, float, float],
    *,
    developed: bool = False,
) -> Issue:
    where = "the weights that make its" if layer.gradients.at == "weights" else "its"
    sizes = {
        "queries": layer.gradients.query_norm,
        "keys": layer.gradients.key_norm,
        "values": layer.gradients.value_norm,
    }
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.VANISHING,
        severity=severity,
        description=f"The gradient at {where} {small} is {ratio:.1e} times smaller than at its {large}; in "
        f"size they are {late(sizes[small]):.2g} and {late(sizes[large]):.2g}.",
        magnitude=1.0 / ratio,
        recommended_actions=(
            f"Bring {small} and {large} of {layer.name or 'the model'} to one scale: the same initialisation "
            "for both projections, or a norm layer on each head's queries and keys.",
            "Where their scale must differ, give them learning rates of their own.",
        ),
        metrics={
            "op": layer.op,
            "query_grad": norms[0],
            "key_grad": norms[1],
            "value_grad": norms[2],
            "ratio": ratio,
        },
        evidence=Evidence(developed=developed),
    )
