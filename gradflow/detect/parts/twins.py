"""Units that are copies of one another, and rows that a model gives one answer for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.detect.evidence import total_gradient
from gradflow.detect.knowledge import guesses
from gradflow.detect.parts.peers import type_of
from gradflow.detect.view import flow_of
from gradflow.records import (
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    ParameterRecord,
    RowsRecord,
    TwinsRecord,
)


def copied_units(alike: float = 1e-4, *, severe: float = 0.25) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of units that start as copies and stay copies.

    Measured: rows and columns of every trainable parameter that are equal to the bit in the first step, where
    they are at least half; and how far the gradients of equal ones are apart.

    Why this is evidence: units with the same weights and the same gradient take the same step, and are the
    same unit for ever. That is told by the first step, whatever the optimizer: what shows later is rounding,
    which an adaptive optimizer blows up to something that only looks like learning.

    Looks alike and is not: copies whose gradients differ, since what reads them tells them apart: one step
    ends that, so it is not told, but for a table by which all inputs come in, where steps are next to
    nothing beside the one row that all are; slices of zeros, and those that no gradient reaches in the first
    step, but for a layer whose slices are copies nearly all, and to which none ever comes: a norm layer
    behind it gives zeros.

    Args:
        alike: distance of two gradients over the larger, below which they are the same but for rounding.
        severe: share of different slices below which it is HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        by_name = {p.name: p for p in record.parameters}
        told: set[str] = set()
        for twins in sorted(record.parts.twins, key=lambda t: t.axis):
            parameter = by_name.get(twins.name)
            if parameter is None or parameter.layer in told:
                continue
            starved = twins.num_different <= severe * twins.num_slices and _gets_rounding(record, parameter)
            if not (twins.gradient_apart <= alike or starved):
                if parameter.layer and _is_one_word(record, parameter, twins):
                    yield _table_issue(record, parameter, twins)
                continue
            if parameter.trainable and parameter.optimized:
                told.add(parameter.layer)
                yield _issue(parameter, twins, type_of(record, parameter.layer), severe)

    return detector


def _gets_rounding(record: FlowRecord, parameter: ParameterRecord, most: float = 1e-6) -> bool:
    """Whether no more than rounding reaches a parameter, in any step: a norm layer over units that are all
    copies gives zeros, and hands nothing back that could tell them apart."""
    own, whole = parameter.grad_norm, total_gradient(record)
    known = np.isfinite(own) & np.isfinite(whole) & (whole > 0)
    return bool(known.any()) and bool(np.all(own[known] <= most * whole[known]))


def _is_one_word(
    record: FlowRecord, parameter: ParameterRecord, twins: TwinsRecord, moved: float = 0.25
) -> bool:
    """Whether a table by which all inputs come in has one row alone, and keeps it: steps move it by next to
    nothing of its size, and the model guesses. Rows of ones are gains, which are to begin alike."""
    flow = flow_of(record)
    tables = [n for n, layer in flow.layers.items() if layer.module == parameter.layer]
    if not ("Embedding" in type_of(record, parameter.layer) and twins.axis == 0 and twins.num_different == 1):
        return False
    if not (tables and all(map(flow.wiring.is_first, tables)) and guesses(record)) or record.updates is None:
        return False
    steps = [
        u.rms / u.weight_rms for u in record.updates.parameters if u.name == parameter.name and len(u.rms)
    ]
    ones = math.isclose(parameter.norm[0], math.sqrt(parameter.num_elements), rel_tol=1e-4)
    return not ones and all(np.nanmax(each) * record.steps <= moved for each in steps)


def _table_issue(record: FlowRecord, parameter: ParameterRecord, twins: TwinsRecord) -> Issue:
    return Issue(
        layer=parameter.layer,
        layer_type=type_of(record, parameter.layer),
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"Its {twins.num_slices} rows start as one, equal to the bit, and tell no input from "
        "another. Gradients part them, each step by next to nothing of their size, and the model guesses.",
        magnitude=1.0 / twins.num_slices,
        recommended_actions=(
            f"Draw its rows at random: nn.init.normal_({parameter.layer}.weight, std=0.02).",
            "If they were loaded, look for one row that was copied to all.",
        ),
        metrics={"parameter": parameter.name, "slices": twins.num_slices, "different": twins.num_different},
        evidence=Evidence(origin=parameter.layer),
    )


def _issue(parameter: ParameterRecord, twins: TwinsRecord, kind: str, severe: float) -> Issue:
    share = twins.num_different / twins.num_slices
    slices = "rows" if twins.axis == 0 else "columns"
    short = parameter.name.rpartition(".")[2]
    gets = (
        f"their gradients are the same to {twins.gradient_apart:.0e}"
        if twins.gradient_apart == twins.gradient_apart
        else "no gradient but rounding comes to them"
    )
    return Issue(
        layer=parameter.layer,
        layer_type=kind,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH if share <= severe else IssueSeverity.MEDIUM,
        description=f"Of the {twins.num_slices} {slices} of its {short} only {twins.num_different} "
        f"differ: the others are copies, equal to the bit, and {gets}. Every step leaves them copies, "
        f"and they do the work of {twins.num_different}.",
        magnitude=share,
        recommended_actions=(
            f"Draw {parameter.name} at random (nn.init.xavier_uniform_, kaiming_normal_): constant or "
            "repeated values give units that can never differ.",
            "If units were copied to make the layer wider, add noise to the copies.",
        ),
        metrics={
            "parameter": parameter.name,
            "axis": twins.axis,
            "slices": twins.num_slices,
            "different": twins.num_different,
        },
        evidence=Evidence(origin=parameter.layer),
    )


def copied_rows(torn: float = 0.3) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of rows that a model gives one answer for, and the loss pulls apart.

    Measured, at the end of a run: rows of a sample (nodes, cells, positions, queries) that the last layer
    gives the same for, but for rounding, where at least half are copies; and the part of the gradient that
    cancels between equal rows.

    Why this is evidence: what is the same for different inputs has not been told them apart by: no
    position, no features of their own come to it. The loss asks for different answers, which no weights give.

    Where no layer that gives as many rows gives different ones, as with queries that start as copies, the
    first of these layers is told.

    Looks alike and is not: rows of which the inputs are equal too, as repeated tokens are; rows that are to
    get one answer; heads that start at zero, which the first step ends.

    Args:
        torn: part of the gradient, in squares, that cancels between equal rows.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for rows in record.parts.rows:
            if rows.torn_share >= torn and record.provenance.optimizer:
                yield _rows_issue(record, rows)

    return detector


def _rows_issue(record: FlowRecord, rows: RowsRecord) -> Issue:
    start = rows.since if rows.from_the_start and rows.since != rows.layer else ""
    at = start or rows.layer
    where = f"the output of {rows.layer}" if start else "its output"
    since = f" They are equal from {start} on, the first layer that gives as many." if start else ""
    return Issue(
        layer=at,
        layer_type=type_of(record, at.partition("@")[0]),
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.MEDIUM,
        description=f"Of the {rows.num_rows} rows of a sample only {rows.num_different:.3g} differ in "
        f"{where}, but for rounding, though what enters the model differs in all.{since} The loss "
        f"pulls equal rows apart: {rows.torn_share:.0%} of its gradient cancels between them, and no "
        "weights can follow it.",
        magnitude=rows.num_different / rows.num_rows,
        recommended_actions=(
            f"Give what comes to {at or 'the last layer'} what tells the rows apart: their own "
            "features (a skip connection from the encoder), a position, queries that are drawn, not zeros.",
        ),
        metrics={
            "last": rows.layer,
            "rows": rows.num_rows,
            "different": rows.num_different,
            "torn": rows.torn_share,
        },
    )
