"""A record in plain numbers by name: the columns of a history, and what trackers plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from gradflow.records.fields import NAN, Floats
from gradflow.records.flow import FlowRecord

# The worst of the layers of a kind is the largest of these, and the smallest of all others.
_LARGE_IS_WORSE = frozenset({
    "always_saturated", "attention_logit_peak", "attention_max_weight", "gradient_zero_share", "never_fired",
    "output_rms", "output_zero_share", "policy_max_prob", "saturated_share", "update_ratio", "weight_rms",
})  # fmt: skip


def every_scalar(record: FlowRecord) -> dict[str, float]:
    """Return all numbers of a record's last look, by name: `quantity/where`, or the quantity of the whole.

    Of the whole: `loss`, `gradient_norm` and `weight_norm` (of all parameters together), `loss_share_left`
    (`KnowledgeRecord.share_left`, or `TransformerRecord.loss_share` where that is not known). By layer call:
    `gradient_rms`, `output_rms`, `output_zero_share`, `output_variation`. By activation: `fired_share`,
    `saturated_share`, `never_fired`, `always_saturated`. By parameter: `weight_rms`, `weight_gradient_rms`,
    `gradient_zero_share`. By attention: those of `AttentionStats`, after `attention_`. By recurrent level:
    `spectral_radius`, `lyapunov`. By distribution of actions: `policy_entropy`, `policy_entropy_share`,
    `policy_max_prob`, `policy_mixture_share`.

    Args:
        record: any record. What it does not know is left out.

    >>> from gradflow.records import FlowRecord
    >>> every_scalar(FlowRecord(steps=2, losses=[2.0, 1.5], layers=(), parameters=()))
    {'loss': 1.5}
    """
    return {name: value for name, (_, value) in _known(record).items()}


def few_scalars(record: FlowRecord) -> dict[str, float]:
    """Return the numbers of the whole, and of each quantity the median and the worst per kind of layer.

    However many layers a model has, these are as many as it has kinds of layers: what a tracker can plot
    without drowning in plots. Names are `quantity/kind/median` and `quantity/kind/worst`; the worst is the
    largest share of zeros, the smallest gradient, and so on.

    Args:
        record: any record.
    """
    groups = defaultdict(list)
    few: dict[str, float] = {}
    for name, (kind, value) in _known(record).items():
        quantity, _, where = name.partition("/")
        if where:
            groups[f"{quantity}/{kind}"].append(value)
        else:
            few[name] = value
    for name, values in groups.items():
        quantity = name.partition("/")[0]
        few[f"{name}/median"] = float(np.median(values))
        few[f"{name}/worst"] = max(values) if quantity in _LARGE_IS_WORSE else min(values)
    return few


def last(values: Floats) -> float:
    """Return the last number of a series that is known, NaN if none is."""
    for value in reversed(values.tolist()):
        if value == value:
            return value
    return NAN


def _known(record: FlowRecord) -> dict[str, tuple[str, float]]:
    """Return the numbers that are known, by name, each after the kind of what it is about."""
    return {name: (kind, float(value)) for name, kind, value in _numbers(record) if value == value}


def _numbers(record: FlowRecord) -> Iterator[tuple[str, str, float]]:
    """Yield names, kinds of what they are about (a layer's class name, an activation's name), and numbers."""
    for name, value in (*_of_the_whole(record), *_special(record)):
        yield name, "all", value
    for layer in record.layers:
        kind = layer.type
        yield f"gradient_rms/{layer.name}", kind, last(layer.grad_rms)
        yield f"output_rms/{layer.name}", kind, last(layer.output_rms)
        yield f"output_zero_share/{layer.name}", kind, last(layer.output_zero_share)
        yield f"output_variation/{layer.name}", kind, last(layer.output_variation)
    for used in record.activations:
        kind = used.op
        yield f"fired_share/{used.name}", kind, last(used.fired_share)
        yield f"saturated_share/{used.name}", kind, last(used.saturated_share)
        yield f"never_fired/{used.name}", kind, used.never_fired
        yield f"always_saturated/{used.name}", kind, used.always_saturated
    types = {layer.module: layer.type for layer in record.layers}
    for parameter in record.parameters:
        kind = f"{types.get(parameter.layer, 'parameters')}.{parameter.name.rpartition('.')[2]}"
        root = math.sqrt(max(parameter.num_elements, 1))
        yield f"weight_rms/{parameter.name}", kind, last(parameter.norm) / root
        yield f"weight_gradient_rms/{parameter.name}", kind, last(parameter.grad_norm) / root
        yield f"gradient_zero_share/{parameter.name}", kind, last(parameter.grad_zero_share)


def _of_the_whole(record: FlowRecord) -> Iterator[tuple[str, float]]:
    yield "loss", last(record.losses)
    trained = [last(p.grad_norm) for p in record.parameters if p.trainable and p.reached.any()]
    if trained:
        yield "gradient_norm", float(np.sqrt(np.nansum(np.square(trained))))
    if record.parameters:
        yield "weight_norm", float(np.sqrt(np.nansum(np.square([last(p.norm) for p in record.parameters]))))
    known = NAN if record.knowledge is None else record.knowledge.share_left
    yield "loss_share_left", record.transformer.loss_share if np.isnan(known) else known


def _special(record: FlowRecord) -> Iterator[tuple[str, float]]:
    for name, stats in record.transformer.stats.items():
        for quantity in _ATTENTION:
            yield f"attention_{_ATTENTION[quantity]}/{name}", getattr(stats, quantity)
    for recurrence in record.recurrences:
        for level in recurrence.levels:
            where = f"{recurrence.name}.{level.level}".lstrip(".")
            yield f"spectral_radius/{where}", last(level.spectral_radius)
            yield f"lyapunov/{where}", last(level.lyapunov)
    for number, actions in enumerate(() if record.policy is None else record.policy.distributions):
        where = ",".join(actions.heads) or str(number)
        yield f"policy_entropy/{where}", last(actions.entropy)
        yield f"policy_entropy_share/{where}", last(actions.entropy_share)
        yield f"policy_max_prob/{where}", last(actions.max_prob)
        yield f"policy_mixture_share/{where}", last(actions.mixture_share)


_ATTENTION: Mapping[str, str] = {
    "entropy_share": "entropy_share",
    "max_attention": "max_weight",
    "head_diversity": "head_diversity",
    "rank_collapse": "residual",
    "slope": "slope",
    "logit_std": "logit_std",
    "logit_peak": "logit_peak",
    "branch_share": "branch_share",
}
