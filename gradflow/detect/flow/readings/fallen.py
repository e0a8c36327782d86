"""Units of rectifiers that fired, and fire no more: what steps that are too large make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gradflow.detect.actions import rectifier_actions
from gradflow.detect.evidence import early, late
from gradflow.detect.knowledge import came_knowing
from gradflow.detect.updates.readings import whole_ratio
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ActivationRecord, Evidence, Issue, IssueSeverity, IssueType, Role, num_last

_DENSE = 0.1  # share of elements that fire at first: units that fire seldom are silent for a while by chance
_SILENCES = ("fell_silent", "never_fired")
_DEVIATIONS = 4.0  # of as many coins as there are units
_BY_CHANCE = 0.05  # probability that a unit that fires as often as at first is silent for so many samples
_STEP = 0.1  # of the weights, in some step: smaller ones turn units off and on as the data ask


def fallen_silent(
    flow: Flow, rectifiers: Iterable[Sequence[ActivationRecord]], threshold: float
) -> Iterator[Issue]:
    """Yield an issue for every rectifier most of whose units the run has driven below zero for good.

    Measured: the share of its units that have fired, and in no batch of the last quarter of the run. They get
    no gradient there, so that only steps of what feeds them, by others' gradients, can bring them back. Alike
    and not: half of the units and what chance adds, for which all samples may ask (an offset of the targets
    switches off those that push the other way); codes that are sparse from the start, of which each fires
    seldom; so few samples in a batch that no unit need fire in the last of them; steps that are small beside
    the weights; a model that came knowing; units fed by frozen layers.

    Args:
        flow: the record along its wiring.
        rectifiers: the calls of every rectifier whose units can be judged.
        threshold: share of silent units from which it is HIGH.
    """
    if not flow.record.provenance.optimizer or came_knowing(flow.record):
        return
    steps = whole_ratio(flow.record)
    if np.isfinite(steps).any() and np.nanmax(steps) < _STEP:
        return
    for uses in rectifiers:
        gone, never = (float(np.min([getattr(u, name) for u in uses])) for name in _SILENCES)
        silent, units = gone + never, max(uses[0].num_units, 1)
        by_chance = 0.5 + _DEVIATIONS * 0.5 / math.sqrt(units)
        fired = max(early(u.fired_share) for u in uses)
        if not (gone >= 0.5 and silent > by_chance and fired >= _DENSE):
            continue
        if (1 - min(fired, 1.0)) ** _samples(flow, uses[0]) < _BY_CHANCE:
            yield _issue(flow, uses[0], gone, silent, threshold)


def _samples(flow: Flow, activation: ActivationRecord) -> int:
    """How many samples the last steps have shown to a rectifier."""
    layer = flow.layers.get(node_name(activation.layer))
    batch = layer.shape[0] if layer is not None and len(layer.shape) > 1 else 1
    return batch * num_last(flow.record.steps)


def _issue(flow: Flow, activation: ActivationRecord, gone: float, silent: float, threshold: float) -> Issue:
    layer = flow.layers.get(node_name(activation.layer))
    *others, rate = rectifier_actions(flow, activation, gone)
    return Issue(
        layer=activation.layer,
        layer_type=layer.type if layer else activation.op,
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.HIGH if silent >= threshold else IssueSeverity.MEDIUM,
        description=f"{gone:.0%} of the {activation.num_units} units of its {activation.op} have fired, and "
        "do in none of the last batches: the steps have driven them below zero for every sample, where no "
        f"gradient comes to them. At first {early(activation.fired_share):.0%} of its elements fired, at the "
        f"end {late(activation.fired_share):.0%}.",
        magnitude=gone,
        recommended_actions=(rate, *others[1:]),
        metrics={"fell_silent": gone, "num_units": activation.num_units, "op": activation.op},
        evidence=Evidence(roles=Role.PARTLY_SILENT, developed=True),
    )
