"""What is measured at attention layers and residual branches of a transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import numpy as np

from gradflow.records.fields import NAN, Floats, array_field, by_name, float_field, to_tuple


@attrs.frozen(kw_only=True)
class AttentionStats:
    """One attention layer in plain numbers: the medians over the last third of the looks.

    Over query rows with at least two allowed keys, but for `mean_entropy`, which counts those with one too
    (their entropy is 0); means over rows, samples and heads. A number that could not be measured is NaN.

    Args:
        num_heads: number of heads; 1 where batch and heads are merged in one axis.
        mean_entropy: −Σ p ln p of a query row, in nats; ln T where T keys get the same weight.
        entropy_share: entropy over its largest value, ln of the number of allowed keys.
        max_attention: the largest weight of a row.
        head_diversity: mean Jensen–Shannon distance between two heads, in √nats: 0 where all heads attend
            alike, √ln 2 = 0.83 where they share no key; NaN with one head.
        rank_collapse: residual ‖X − 1x̄ᵀ‖ / ‖X‖ of the layer's output over the positions of a sample: 0 where
            all positions are equal.
        input_residual: the same of what enters the layer.
        slope: trace 1 − Σp² of the softmax's Jacobian, over its largest value 1 − 1/n.
        saturated_share: share of rows whose slope is below 1 percent.
        logit_std: standard deviation of the scores of a row (root mean square over rows).
        logit_peak: the largest distance of a score from the mean of its row.
        query_grad_norm: norm of the gradient at the queries; see `AttentionGradients.at`.
        key_grad_norm: at the keys.
        value_grad_norm: at the values.
        output_grad_norm: at the layer's output.
        branch_share: ‖branch‖ / ‖stream‖ at the sum that ends the residual branch with this layer in it.
    """

    num_heads: int
    mean_entropy: float = float_field()
    entropy_share: float = float_field()
    max_attention: float = float_field()
    head_diversity: float = float_field()
    rank_collapse: float = float_field()
    input_residual: float = float_field()
    slope: float = float_field()
    saturated_share: float = float_field()
    logit_std: float = float_field()
    logit_peak: float = float_field()
    query_grad_norm: float = float_field()
    key_grad_norm: float = float_field()
    value_grad_norm: float = float_field()
    output_grad_norm: float = float_field()
    branch_share: float = float_field()


@attrs.frozen(kw_only=True)
class AttentionScores:
    """What the scores of an attention layer look like, by head: arrays of shape (looks, heads).

    For the meaning of each see `AttentionStats`.

    Args:
        logit_std: standard deviation of the scores of a row (root mean square over rows).
        logit_peak: the largest distance of a score from the mean of its row.
        slope: trace of the softmax's Jacobian, over its largest value.
        saturated_share: share of rows whose slope is below 1 percent.
    """

    logit_std: Floats = array_field(axes=2)
    logit_peak: Floats = array_field(axes=2)
    slope: Floats = array_field(axes=2)
    saturated_share: Floats = array_field(axes=2)


@attrs.frozen(kw_only=True)
class AttentionGradients:
    """The gradients at an attention layer's queries, keys, values and output: arrays of shape (looks,).

    Args:
        at: where those of queries, keys and values were taken: `tensors`, or `weights` (the rows of the input
            projection: inside `multi_head_attention_forward` there is no other place), or "" where there
            were none.
        query_norm, key_norm, value_norm: norms of the tensors or weights behind the gradients.
        query_grad, key_grad, value_grad, output_grad: norms of the gradients.
    """

    at: str = ""
    query_norm: Floats = array_field()
    key_norm: Floats = array_field()
    value_norm: Floats = array_field()
    query_grad: Floats = array_field()
    key_grad: Floats = array_field()
    value_grad: Floats = array_field()
    output_grad: Floats = array_field()


@attrs.frozen(kw_only=True)
class AttentionRecord:
    """What was measured at one attention layer, in the steps that were looked at.

    The first axis of every array is that of `TransformerRecord.steps`; arrays by head have shape
    (looks, heads). A number that could not be measured is NaN. For those that `AttentionStats` has too, see
    there; here they are by head.

    Args:
        name: qualified name of the module that holds it; `@1`, `@2`, ... for its later attentions in a step.
        module: qualified name of the module.
        type: class name of the module.
        op: what was seen: `scaled_dot_product_attention`, `multi_head_attention_forward`, or `softmax` for a
            softmax that is multiplied with values.
        num_heads: number of heads.
        num_queries: number of query positions at the last look.
        num_keys: mean number of allowed keys of a row, shape (looks,).
        entropy, entropy_share, max_weight: by head.
        first_weight: mean weight on the first key, by head: an idle head puts most there (an attention sink).
        head_output: ‖context of the head‖₂, by head: what it hands to the output projection.
        head_grad: norm of the gradient at that context, by head (of the head's value weights, where
            `gradients.at` is `weights`).
        nearest_head: mean Jensen–Shannon distance to the head that is most alike, by head.
        head_diversity, input_residual, output_residual: shape (looks,).
        branch_share: shape (looks,).
        scores: what the scores look like, by head.
        gradients: at queries, keys, values and output.
    """

    name: str
    module: str
    type: str
    op: str
    num_heads: int
    num_queries: int
    num_keys: Floats = array_field()
    entropy: Floats = array_field(axes=2)
    entropy_share: Floats = array_field(axes=2)
    max_weight: Floats = array_field(axes=2)
    first_weight: Floats = array_field(axes=2)
    head_output: Floats = array_field(axes=2)
    head_grad: Floats = array_field(axes=2)
    nearest_head: Floats = array_field(axes=2)
    head_diversity: Floats = array_field()
    input_residual: Floats = array_field()
    output_residual: Floats = array_field()
    branch_share: Floats = array_field()
    scores: AttentionScores
    gradients: AttentionGradients

    def stats(self) -> AttentionStats:
        """Return the layer in plain numbers."""
        return AttentionStats(
            num_heads=self.num_heads,
            mean_entropy=_late(self.entropy),
            entropy_share=_late(self.entropy_share),
            max_attention=_late(self.max_weight),
            head_diversity=_late(self.head_diversity),
            rank_collapse=_late(self.output_residual),
            input_residual=_late(self.input_residual),
            slope=_late(self.scores.slope),
            saturated_share=_late(self.scores.saturated_share),
            logit_std=_late(np.square(self.scores.logit_std)) ** 0.5,
            logit_peak=_late(self.scores.logit_peak, np.max),
            query_grad_norm=_late(self.gradients.query_grad),
            key_grad_norm=_late(self.gradients.key_grad),
            value_grad_norm=_late(self.gradients.value_grad),
            output_grad_norm=_late(self.gradients.output_grad),
            branch_share=_late(self.branch_share),
        )


def _late(values: Floats, over_heads: Callable[[Floats], float] = np.mean) -> float:
    """Return the median over the last third of the known looks, of the mean over the heads that are known."""
    known = [row[np.isfinite(row)] for row in (values if values.ndim == 2 else values[:, None])]
    seen = [over_heads(row) for row in known if len(row)]
    return float(np.median(seen[-max(1, -(-len(seen) // 3)) :])) if seen else float("nan")


@attrs.frozen(kw_only=True)
class BranchRecord:
    """A residual branch: what is added to a stream that it was computed from.

    Args:
        name: name of the module call whose output is added.
        type: class name of that module.
        share: ‖branch‖₂ / ‖stream‖₂ at the sum, at each look; NaN where it was not seen.
    """

    name: str
    type: str
    share: Floats = array_field()


@attrs.frozen(kw_only=True)
class TransformerRecord:
    """What the measurement `attention()` saw: empty without it.

    Args:
        steps: the steps that were looked at: the first axis of every array below.
        attention: one record per attention layer, in the order of execution.
        branches: one record per residual branch, in the order of execution.
        loss_share: the loss at the last look over what it costs to answer every sample alike, by the loss
            functions of PyTorch that were called: near 1 the model guesses, near 0 it knows. NaN where the
            loss is another.

    >>> TransformerRecord().attention
    ()
    """

    steps: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    attention: tuple[AttentionRecord, ...] = attrs.field(default=(), converter=to_tuple)
    branches: tuple[BranchRecord, ...] = attrs.field(default=(), converter=to_tuple)
    loss_share: float = float_field(NAN)

    def __getitem__(self, name: str) -> AttentionRecord:
        """Return the attention layer of that name.

        Raises:
            UnknownLayerError: if there is none; the message lists the nearest names.
        """
        return by_name(self.attention, name)

    @property
    def stats(self) -> Mapping[str, AttentionStats]:
        """Every attention layer in plain numbers, by name."""
        return {record.name: record.stats() for record in self.attention}
