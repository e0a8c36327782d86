"""Statistics of attention weights: entropy, sharpness, how heads differ, how alike positions are.

All are pure functions of tensors. A row is what one query gives to all keys; weights of masked keys are zero
and do not count as alternatives.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.trees import wide_dtype
from gradflow.functional.tap.watch import SATURATED

_SMALL = 2**20  # elements up to which the sums are taken in double precision
_PAIRED = 2**21  # elements of weights that are compared head by head


@attrs.frozen(kw_only=True, eq=False)
class HeadStatistics:
    """Statistics by head, tensors of shape (heads,); see `attention_statistics`.

    Args:
        num_keys: mean number of allowed keys of a row.
        entropy: mean of −Σ p ln p over rows with an allowed key, in nats.
        entropy_share: mean of the entropy over ln n, n the number of allowed keys, over rows with two.
        max_weight: mean of the largest weight of a row, over rows with two allowed keys.
        first_weight: mean of the weight on the first key, over the same rows.
        slope: mean of (1 − Σp²) / (1 − 1/n) over rows with two allowed keys: the trace of the softmax's
            Jacobian diag(p) − ppᵀ, over its largest value.
        saturated_share: share of the rows with two allowed keys whose slope is below 1 percent.
        logit_std: root mean square over rows of the standard deviation of the scores of allowed keys.
        logit_peak: largest distance of a score from the mean of its row.
    """

    num_keys: Tensor
    entropy: Tensor
    entropy_share: Tensor
    max_weight: Tensor
    first_weight: Tensor
    slope: Tensor
    saturated_share: Tensor
    logit_std: Tensor
    logit_peak: Tensor


def attention_entropy(weights: Tensor) -> Tensor:
    """Return the entropy −Σ p ln p of every row, in nats.

    ln T for equal weights on T keys, 0 where one key has all.

    Args:
        weights: non-negative, shape (..., keys), each row summing to one.

    Returns:
        Shape (...,).

    >>> attention_entropy(torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    return torch.special.entr(weights).sum(-1)


def position_residual(x: Tensor) -> Tensor:
    """Return ‖X − 1x̄ᵀ‖_F / ‖X‖_F over the positions of each sample, x̄ being their mean.

    What is left of a representation when the part that all positions share is taken away: 0 where all
    positions are alike, 1 where they have no mean. (The residual of Dong, Cordonnier and Loukas, "Attention
    is not all you need: pure attention loses rank doubly exponentially with depth", 2021, by the Frobenius
    norm, of which the mean is the minimum.) Squares are summed over samples first, so that a sample of small
    norm counts for little.

    Args:
        x: shape (..., positions, features).

    Returns:
        A scalar; NaN with a single position, or where x is zero.

    >>> position_residual(torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]))
    tensor(0.)
    """
    if x.shape[-2] < 2:
        return x.new_full((), math.nan)
    x = x.double() if x.numel() <= _SMALL and x.device.type != "mps" else x.float()
    whole = x.square().sum()
    rest = (x - x.mean(-2, keepdim=True)).square().sum()
    return (rest / whole).sqrt().to(torch.float32)


def attention_statistics(
    weights: Tensor, *, allowed: Tensor | None = None, logits: Tensor | None = None
) -> HeadStatistics:
    """Return the statistics of attention weights by head.

    Args:
        weights: probabilities, shape (batch, heads, queries, keys).
        allowed: which keys a query may attend to, boolean, broadcastable to the weights; by default all.
        logits: scores before the softmax, up to a shift of each row; by default ln p, where p is above zero.

    Returns:
        Tensors of shape (heads,); NaN where no row counts.

    >>> causal = torch.ones(4, 4, dtype=torch.bool).tril()
    >>> uniform = causal / causal.sum(-1, keepdim=True)
    >>> found = attention_statistics(uniform[None, None], allowed=causal)
    >>> found.entropy, found.entropy_share  # (0 + ln 2 + ln 3 + ln 4) / 4
    (tensor([0.7945], dtype=torch.float64), tensor([1.0000], dtype=torch.float64))
    """
    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=weights.device)
    return finish(row_sums(weights, allowed.expand(weights.shape), logits))


@attrs.frozen(eq=False)
class RowSums:
    """Sums over rows by head, which add up over parts of a batch.

    Args:
        sums: shape (10, heads).
        peak: largest distance of a score from its row's mean, shape (heads,).
    """

    sums: Tensor
    peak: Tensor

    def __add__(self, other: RowSums) -> RowSums:
        return RowSums(self.sums + other.sums, torch.maximum(self.peak, other.peak))


def row_sums(weights: Tensor, allowed: Tensor, logits: Tensor | None) -> RowSums:
    """Return the sums behind `HeadStatistics`, for weights of shape (batch, heads, queries, keys)."""
    wide = _wide(weights)
    p = weights.detach().to(wide).masked_fill(~allowed, 0.0)
    n = allowed.sum(-1).to(wide)
    choice, some = n >= 2, n >= 1
    entropy = attention_entropy(p)
    slope = (1.0 - p.square().sum(-1)) / (1.0 - 1.0 / n.clamp(min=2.0))
    scores = p.log() if logits is None else logits.detach().to(wide)
    known = allowed & torch.isfinite(scores)
    count = known.sum(-1).to(wide).clamp(min=1.0)
    scores = scores.masked_fill(~known, 0.0)
    distance = (scores - (scores.sum(-1) / count)[..., None]).masked_fill(~known, 0.0)
    variance = distance.square().sum(-1) / count
    rows = [
        some, n * some, entropy * some, choice, (entropy / n.clamp(min=2.0).log()) * choice,
        p.amax(-1) * choice, p[..., 0] * choice, slope * choice, choice & (slope < SATURATED),
        variance * choice,
    ]  # fmt: skip
    peak = (distance.abs().amax(-1) * choice).amax((0, 2)) if p.numel() else p.new_zeros(p.shape[1])
    sums = torch.stack([r.to(wide).sum((0, 2)) for r in rows])
    double = wide_dtype(p.device)
    return RowSums(sums.to(double), peak.to(double))


def finish(found: RowSums) -> HeadStatistics:
    """Return the statistics that sums over all rows give."""
    some, keys, entropy, choice, share, largest, first, slope, saturated, variance = found.sums
    return HeadStatistics(
        num_keys=keys / some,
        entropy=entropy / some,
        entropy_share=share / choice,
        max_weight=largest / choice,
        first_weight=first / choice,
        slope=slope / choice,
        saturated_share=saturated / choice,
        logit_std=(variance / choice).sqrt(),
        logit_peak=found.peak.masked_fill(choice == 0, math.nan),
    )


def head_distances(weights: Tensor) -> Tensor:
    """Return the mean Jensen–Shannon distance of every two heads, shape (heads, heads), in √nats.

    The distance of two rows is √(H(m) − (H(p) + H(q)) / 2), m = (p + q) / 2: a metric (Endres and Schindelin,
    "A new metric for probability distributions", 2003), 0 for equal rows and √ln 2 for rows that share no
    key. The mean is over rows, those that are zero throughout left out.

    Args:
        weights: probabilities, shape (batch, heads, queries, keys).

    >>> two = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    >>> head_distances(two)
    tensor([[0.0000, 0.8326],
            [0.8326, 0.0000]], dtype=torch.float64)
    """
    p = weights.detach().to(wide_dtype(weights.device))
    rows = p.transpose(0, 1).flatten(1, 2)  # heads, rows, keys
    own = attention_entropy(rows)
    real = rows.sum(-1) > 0
    distances = rows.new_zeros(len(rows), len(rows))
    for i in range(len(rows) - 1):
        others = rows[i + 1 :]
        divergence = attention_entropy((rows[i] + others) / 2) - (own[i] + own[i + 1 :]) / 2
        counts = real[i] & real[i + 1 :]
        mean = (divergence.clamp(min=0.0).sqrt() * counts).sum(-1) / counts.sum(-1)
        distances[i, i + 1 :] = distances[i + 1 :, i] = mean
    return distances


def sampled_rows(batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """Return in which of the batch × queries rows heads are compared: evenly spaced ones, or all if few."""
    number = max(1, _PAIRED // max(heads * keys, 1))
    rows = batch * queries
    if rows <= number:
        return torch.arange(rows)
    return torch.linspace(0, rows - 1, number, dtype=torch.float64).round().long()


def _wide(x: Tensor) -> torch.dtype:
    if x.device.type == "mps":
        return torch.float32
    return torch.float64 if x.dtype == torch.float64 or x.numel() <= _SMALL else torch.float32
