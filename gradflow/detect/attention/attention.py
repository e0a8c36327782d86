"""Attention that has collapsed or saturated, and scores that grow: SATURATION and UNSTABLE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.evidence import early, late
from gradflow.detect.knowledge import excused, learns
from gradflow.records import (
    AttentionRecord,
    Bools,
    Evidence,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
)

RESTING = 0.5  # weight on the first key from which a head is taken to rest there


def collapsed_attention(
    share: float = 0.15, *, severe_share: float = 0.03
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of attention whose entropy has collapsed.

    Measured: for every attention layer and head the entropy of the weights, over its largest value ln n (n
    allowed keys), as a mean over the rows that have a choice; at the end of the run. A layer is reported
    where half of its heads are below `share`.

    Why this is evidence: the share says how many of the keys are used, whatever the length and the mask.
    Such a head passes on next to one value per query, and training with it is unstable (Zhai et al.,
    "Stabilizing transformer training by preventing attention entropy collapse", 2023).

    Looks alike and is not: rows with a single allowed key, such as the first under a causal mask, which do
    not count; windows, for the keys outside are not allowed; heads that rest on the first key (attention
    sinks), which are left out; attention that became sharp while the loss fell by a fifth, or the model
    `learns` (LOW). A high entropy is no illness: queries and keys that are still small give every key the
    same.

    Args:
        share: entropy share from which a head has collapsed. Scores of standard deviation 1, as at any usual
            initialisation, give 0.85 with 16 keys and more with more; 3 gives 0.4 to 0.5, and 8 gives 0.13 to
            0.15 with 16 to 1000 keys: fewer than three keys are then in use.
        severe_share: mean of the heads from which it is HIGH: a weight of 0.99 on one of 16 keys.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for layer in record.transformer.attention:
            heads = working_heads(layer)
            entropy = late_by_head(layer.entropy_share)[heads]
            known = entropy[np.isfinite(entropy)]
            if not len(known) or np.mean(known < share) < 0.5:
                continue
            mean, first = float(np.mean(known)), _first(layer.entropy_share, heads)
            learned = mean < 0.5 * first and (has_learned(record) or learns(record, most=0.7))
            severity = IssueSeverity.HIGH if mean < severe_share else IssueSeverity.MEDIUM
            yield Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.SATURATION,
                severity=IssueSeverity.LOW if learned else severity,
                description=f"Its attention has collapsed: the entropy is {mean:.1%} of what the allowed "
                f"keys would allow ({late_mean(layer.entropy, heads):.2g} nats), and in "
                f"{np.mean(known < share):.0%} of its heads it is below {share:.0%}."
                f"{_history(first, mean, learned)}",
                magnitude=mean,
                recommended_actions=_calmer(layer, record),
                metrics={
                    "op": layer.op,
                    "entropy_share": mean,
                    "entropy": late_mean(layer.entropy, heads),
                    "first_steps": first,
                    "max_attention": late_mean(layer.max_weight, heads),
                    "logit_std": late_mean(layer.scores.logit_std, heads),
                    "heads": tuple(int(h) for h in np.flatnonzero(late_by_head(layer.entropy_share) < share)),
                },
                evidence=Evidence(developed=mean < first - 0.2),
            )

    return excused(detector)


def saturated_attention(
    share: float = 0.5, *, severe_share: float = 0.8
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of attention whose softmax passes no gradient back to queries and keys.

    Measured: the share of query rows in which 1 − Σp², the trace of the softmax's Jacobian, is below 1
    percent of the largest value that it can have; at the end of the run. It is what `saturation` measures at
    a softmax written out, here for fused attention too, and for allowed keys only.

    Why this is evidence: all that queries and keys learn from comes through this Jacobian, row by row.

    Looks alike and is not: what `collapsed_attention` names.

    Args:
        share: share of rows from which it is MEDIUM: most queries then teach the scores nothing. A usual
            initialisation has none.
        severe_share: from which it is HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for layer in record.transformer.attention:
            heads = working_heads(layer)
            seen, first = (
                late_mean(layer.scores.saturated_share, heads),
                _first(layer.scores.saturated_share, heads),
            )
            if not seen >= share:
                continue
            learned = seen > first + 0.2 and has_learned(record)
            severity = IssueSeverity.HIGH if seen >= severe_share else IssueSeverity.MEDIUM
            largest = late_mean(layer.max_weight, heads)
            yield Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.SATURATION,
                severity=IssueSeverity.LOW if learned else severity,
                description=f"Its softmax passes less than 1% of the gradient that it can pass to queries "
                f"and keys in {seen:.0%} of the rows: one key has next to all of the weight (mean of the "
                f"largest {largest:.3g}).{_history(first, seen, learned)}",
                magnitude=seen,
                recommended_actions=_calmer(layer, record),
                metrics={
                    "op": layer.op,
                    "saturated_share": seen,
                    "first_steps": first,
                    "max_attention": largest,
                    "logit_std": late_mean(layer.scores.logit_std, heads),
                },
                evidence=Evidence(developed=seen > first + 0.2),
            )

    return excused(detector)


def growing_logits(
    std: float = 10.0, *, growth: float = 3.0, severe_std: float = 50.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of attention scores that training drives up.

    Measured, with an optimizer: the standard deviation of the scores of a row over its allowed keys, which no
    shift changes, at the first look and at the end of the run.

    Why this is evidence: scores enter an exponential, so their size has a meaning of its own, whatever the
    loss, the width or the dtype. Training that drives them up without end diverges (Dehghani et al.,
    "Scaling vision transformers to 22 billion parameters", 2023; Wortsman et al., "Small-scale proxies for
    large-scale transformer training instabilities", 2023).

    Looks alike and is not: scores that grow from a small start to a few units, which is learning; large
    scores that were there at the start (`saturated_attention`); growth while the loss fell by a fifth, up
    to `severe_std` (LOW).

    Args:
        std: standard deviation from which scores are too large: random scores of 10 leave a tenth of the
            entropy that equal weights have, whatever the number of keys.
        growth: by how much they must have grown in the run.
        severe_std: from which it is HIGH, and no fall of the loss excuses it: 2 percent are left.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if not record.provenance.optimizer:
            return
        for layer in record.transformer.attention:
            heads = working_heads(layer)
            at_end, first = late_mean(layer.scores.logit_std, heads), _first(layer.scores.logit_std, heads)
            if not (at_end >= std and at_end >= growth * first):
                continue
            severity = IssueSeverity.HIGH if at_end >= severe_std else IssueSeverity.MEDIUM
            learned = at_end < severe_std and has_learned(record)
            yield Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.UNSTABLE,
                severity=IssueSeverity.LOW if learned else severity,
                description=f"Its attention scores grow: their standard deviation over a row went from "
                f"{first:.2g} to {at_end:.3g}, and they enter an exponential.",
                magnitude=at_end,
                recommended_actions=_calmer(layer, record),
                metrics={
                    "op": layer.op,
                    "logit_std": at_end,
                    "first_steps": first,
                    "logit_peak": float(np.nanmax(late_by_head(layer.scores.logit_peak))),
                    "optimizer": record.provenance.optimizer,
                },
                evidence=Evidence(developed=True, growth=at_end / first if first > 0 else math.inf),
            )

    return detector


# ------------------------------------------------------------------------------ what they share


def late_by_head(values: Floats) -> Floats:
    """Return the median over the last third of the known looks, by head; NaN where there are none."""
    return np.array([late(values[:, head]) for head in range(values.shape[1])])


def late_mean(values: Floats, heads: Bools) -> float:
    """Return the mean over some heads of what the run came to; NaN if none is known."""
    found = late_by_head(values)[heads]
    known = found[np.isfinite(found)]
    return float(np.mean(known)) if len(known) else math.nan


def working_heads(layer: AttentionRecord) -> Bools:
    """Return which heads do more than to rest on the first key, as booleans."""
    return ~(late_by_head(layer.first_weight) > RESTING)


def has_learned(record: FlowRecord) -> bool:
    """Whether the loss fell by a fifth over the run, from its first value and from those that followed."""
    end = late(record.losses)
    start = min(early(record.losses), record.losses[0]) if record.steps else math.nan
    return bool(record.provenance.optimizer) and 0 <= end <= 0.8 * start


def num_updates(record: FlowRecord) -> int:
    """Return how many steps of an optimizer came before the last step."""
    return record.steps - 1 if record.provenance.optimizer else 0


def _first(values: Floats, heads: Bools) -> float:
    known = [row[np.isfinite(row)] for row in values[:, heads]]
    return next((float(np.mean(row)) for row in known if len(row)), math.nan)


def _history(first: float, now: float, learned: bool) -> str:
    if learned:
        return f" It was {first:.1%} at first, and the loss has fallen since: it may simply be sure."
    return f" It was {first:.1%} at first." if abs(first - now) > 0.05 else ""


def _calmer(layer: AttentionRecord, record: FlowRecord) -> tuple[str, ...]:
    """What makes attention less sharp, by whether it was so at first."""
    std = late_mean(layer.scores.logit_std, working_heads(layer))
    first = _first(layer.scores.logit_std, working_heads(layer))
    actions = []
    if first > 3.0 or not record.provenance.optimizer:
        actions.append(
            f"Scale the scores down (their standard deviation is {std:.3g}, about 1 is usual): divide by "
            "sqrt(head dimension), and initialise the projections of queries and keys smaller."
        )
    if std > 2.0 * first and record.provenance.optimizer:
        rate = max(record.provenance.learning_rates, default=math.nan)
        actions.append(
            f"Lower the learning rate ({rate:.3g}), or warm it up: the first large steps drive scores up."
        )
    actions.append(f"Normalise queries and keys in {layer.name or 'the model'} (a norm layer on each head).")
    return tuple(actions)
