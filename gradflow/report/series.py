"""What is drawn of a record, whoever draws it: grids of layers × steps, of layers × heads, and curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import attrs
import numpy as np

from gradflow.detect.evidence import kept_at_least, shares
from gradflow.detect.view import flow_of
from gradflow.records import ActionDistribution, AttentionRecord, Floats, FlowRecord, RecurrenceRecord
from gradflow.records.recurrent import mean_profile

Rows = Sequence[tuple[str, Floats]]


@attrs.frozen(eq=False)
class Grid:
    """Numbers of layers (or parameters, or activations) over steps.

    Args:
        title: what they are.
        rows: (name, values of shape (steps,)), in the order of execution.
        told: what the colour tells, in words.
        scale: `share` for numbers in [0, 1]; `ratio` for those whose logarithm counts.
        usual: with `ratio`, the power of ten that is neither much nor little.
        reach: with `ratio`, how many powers of ten to both sides are told apart.
    """

    title: str
    rows: Rows
    told: str
    scale: Literal["share", "ratio"]
    usual: float = 0.0
    reach: float = 3.0


def gradient_grid(record: FlowRecord) -> Grid:
    """Return the rms of every layer's output gradient, against the median of all."""
    rows = [(layer.name, layer.grad_rms) for layer in record.layers]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.log10(values) for _, values in rows]
    known = finite(np.concatenate(logs)) if logs else np.empty(0)
    usual = float(np.median(known)) if len(known) else 0.0
    return Grid(
        "Gradient rms", rows, "colour: powers of ten over or under the median of all", "ratio", usual, 6.0
    )


def share_grid(record: FlowRecord) -> Grid:
    """Return how much arrives at every layer of what should, by its place in the network."""
    rows: list[tuple[str, Floats]] = []
    if record.layers and record.steps:
        flow = flow_of(record)
        found = shares(flow, kept_at_least(flow)).share
        rows = [(layer.name, found[name]) for name, layer in flow.layers.items() if name in found]
    return Grid("Share of expected", rows, "grey: as much as should arrive, or more; blue: less", "ratio")


def activity_grid(record: FlowRecord) -> Grid:
    """Return the share of every activation's elements that fire, or are not saturated."""
    rows = [
        (a.name, a.fired_share if a.kind == "rectifier" else 1.0 - a.saturated_share)
        for a in record.activations
    ]
    return Grid("Activity", rows, "share of elements that fire, or are not saturated", "share")


def update_grid(record: FlowRecord) -> Grid:
    """Return the size of every parameter's update over that of the parameter, where an optimizer stepped."""
    rows = [(p.name, p.ratio) for p in record.updates.parameters] if record.updates is not None else []
    return Grid("Update ratio", rows, "update over weight; grey: 1e-3, a usual one", "ratio", -3.0)


GRIDS: Mapping[str, Callable[[FlowRecord], Grid]] = {
    "gradient": gradient_grid,
    "share": share_grid,
    "activity": activity_grid,
    "updates": update_grid,
}


@attrs.frozen(eq=False)
class HeadNumber:
    """A number of attention heads in [0, 1]: what it is called, how to get it, and whether of the largest."""

    title: str
    pick: Callable[[AttentionRecord], Floats]
    relative: bool = False

    def grid(self, layers: Sequence[AttentionRecord]) -> list[list[float]]:
        """Return the number of each layer's heads, the median over the steps."""
        return [[finite_middle(column) for column in self.pick(layer).T] for layer in layers]


HEAD_NUMBERS: Mapping[str, HeadNumber] = {
    "entropy": HeadNumber("Entropy, as a share of its maximum", lambda a: a.entropy_share),
    "first": HeadNumber("Weight on the first key", lambda a: a.first_weight),
    "gradient": HeadNumber("Gradient at the head, as a share of the largest", lambda a: a.head_grad, True),
}


def time_curves(layer: RecurrenceRecord) -> list[tuple[str, Floats]]:
    """Return the gradient of a layer's levels through time, of the whole loss and of what it reads last."""
    return [
        (name, profile)
        for level in layer.levels
        for name, profile in (
            (f"{level.level}: whole loss", mean_profile(level.gradient_profile)),
            (f"{level.level}: last step read", mean_profile(level.readout_profile)),
        )
        if len(profile) and np.nanmax(profile, initial=0.0) > 0
    ]


def action_curves(actions: ActionDistribution) -> list[tuple[str, Floats]]:
    """Return how sure a policy's actions are over its looks, or how wide where they are continuous."""
    if actions.discrete:
        return [
            ("entropy, share of its maximum", actions.entropy_share),
            ("largest probability", actions.max_prob),
            ("samples that are as good as decided", actions.deterministic_share),
        ]
    deviation = actions.deviation
    return [
        ("smallest deviation", deviation.std_min), ("mean deviation", deviation.std_mean),
        ("largest deviation", deviation.std_max), ("size of the mean action", deviation.mean_rms),
    ]  # fmt: skip


def finite(values: Floats) -> Floats:
    """Return what is finite of some numbers."""
    return values[np.isfinite(values)]


def finite_middle(values: Floats) -> float:
    """Return the median of the finite values; NaN if there are none."""
    known = finite(values)
    return float(np.median(known)) if len(known) else math.nan
