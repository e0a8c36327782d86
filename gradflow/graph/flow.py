"""The numbers of the flow, from the norms of the record: gain, divergence, coherence, ω; and means.

Everything here is elementwise on arrays of shape (nodes, steps) and (edges, steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import numpy as np

from gradflow.graph.table import FlowTable
from gradflow.records import NAN, Bools, Floats


@attrs.frozen(eq=False, kw_only=True, repr=False)
class FlowNumbers:
    """The numbers of docs/graph.md, per step and averaged, aligned with `names` and `edges`.

    NaN where a number is undefined or was not measured; arrays are read-only.

    Args:
        names: node names, N of them, in the order of execution.
        edges: (u, v) pairs, E of them.
        steps: the measured steps, S of them.
        grad_norm: ‖g_v‖, shape (N, S); 1 at the loss.
        gain: ‖c_v‖ / ‖g_v‖, shape (N, S).
        divergence: tanh(ln gain), shape (N, S).
        coherence: ‖g_u‖ / Σ f(u→v), shape (N, S); 1 with one live consumer, NaN where nothing flows.
        effective_rank: of g_v, shape (N, S).
        flow: f(u→v), shape (E, S).
        omega: ω(u→v) = ln f(u→v) − ln ‖g_v‖, shape (E, S); NaN where the edge carries nothing.
        mean_grad_norm: geometric mean over the steps (see `geometric_mean`), shape (N,).
        mean_gain: geometric mean, shape (N,).
        mean_divergence: tanh(ln mean_gain), shape (N,), so that the identity holds for means too.
        mean_coherence: arithmetic mean, as coherence is a share in [0, 1], shape (N,).
        mean_effective_rank: arithmetic mean, shape (N,).
        mean_flow: geometric mean, shape (E,); 0 if severed.
        mean_omega: arithmetic mean of ω, which is a logarithm, shape (E,).
    """

    names: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    steps: tuple[int, ...]
    grad_norm: Floats
    gain: Floats
    divergence: Floats
    coherence: Floats
    effective_rank: Floats
    flow: Floats
    omega: Floats
    mean_grad_norm: Floats
    mean_gain: Floats
    mean_divergence: Floats
    mean_coherence: Floats
    mean_effective_rank: Floats
    mean_flow: Floats
    mean_omega: Floats

    def __repr__(self) -> str:
        return f"FlowNumbers({len(self.names)} nodes, {len(self.edges)} edges, {len(self.steps)} steps)"


def flow_numbers(table: FlowTable) -> FlowNumbers:
    """Return every number of the flow on a graph.

    Args:
        table: the indexed graph record.

    Returns:
        The numbers; shapes (N, S) and (E, S) per step, (N,) and (E,) averaged over the measured steps.

    Raises:
        GraphUnavailableError: if only the topology was taken.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"a": 0.5, "b": 2.0, "loss": 1.0}, {("a", "b"): 0.5, ("b", "loss"): 2.0})
    >>> graph.numbers.mean_gain.tolist()   # of a (no input), b and the loss
    [nan, 0.25, 2.0]
    """
    table.check_measured("graph.numbers")
    gain = node_gain(table)
    omega = edge_omega(table)
    coherence = node_coherence(table)
    mean_gain = geometric_mean(gain)
    numbers = FlowNumbers(
        names=tuple(node.name for node in table.nodes),
        edges=tuple((edge.source, edge.target) for edge in table.edges),
        steps=table.steps,
        grad_norm=table.grad,
        gain=gain,
        divergence=divergence_of(gain),
        coherence=coherence,
        effective_rank=table.rank,
        flow=table.flow,
        omega=omega,
        mean_grad_norm=geometric_mean(table.grad),
        mean_gain=mean_gain,
        mean_divergence=divergence_of(mean_gain),
        mean_coherence=arithmetic_mean(coherence),
        mean_effective_rank=arithmetic_mean(table.rank),
        mean_flow=geometric_mean(table.flow),
        mean_omega=arithmetic_mean(omega),
    )
    for value in attrs.astuple(numbers, recurse=False):
        if isinstance(value, np.ndarray):
            value.setflags(write=False)
    return numbers


@np.errstate(over="ignore", under="ignore")
def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Return numerator / denominator; NaN where the denominator is zero or either is not finite."""
    sound = np.isfinite(numerator) & np.isfinite(denominator) & (denominator > 0)
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=sound)


def divergence_of(gain: Floats) -> Floats:
    """Return tanh(ln gain) = (gain² − 1) / (gain² + 1); −1 for a gain of exactly zero, NaN for NaN."""
    with np.errstate(divide="ignore"):
        return np.tanh(np.log(gain))


@np.errstate(over="ignore", invalid="ignore")
def node_gain(table: FlowTable) -> Floats:
    """Return ‖c_v‖ / ‖g_v‖, shape (N, S).

    Where ‖c_v‖ itself was not measured it is the root of the sum of squares of the flows on v's in-edges,
    which it equals by definition: c_v is all of v's input cotangents together. A node whose in-edges are
    all cut, or that has none, hands nothing back and has no gain.
    """
    squares = np.zeros_like(table.grad)
    np.add.at(squares, table.target, ratio(table.flow, table.grad[table.target]) ** 2)
    measured = ratio(table.input_grad, table.grad)
    gain = np.where(np.isnan(table.input_grad), np.sqrt(squares), measured)
    has_inputs = np.array([any(not table.cut[e] for e in edges) for edges in table.in_edges], dtype=bool)
    return np.where(has_inputs[:, None] | (table.input_grad > 0), gain, np.nan)


def node_coherence(table: FlowTable) -> Floats:
    """Return ‖g_u‖ / Σ f(u→v) over u's consumers, in [0, 1], shape (N, S)."""
    live = np.zeros_like(table.grad)
    np.add.at(live, table.source, (table.flow > 0).astype(np.float64))
    shares = np.minimum(ratio(table.grad, outflow(table)), 1.0)
    return np.where((live == 1) & np.isfinite(shares), 1.0, shares)


@np.errstate(over="ignore")
def outflow(table: FlowTable) -> Floats:
    """Return Σ f(u→v) over the consumers of every node, shape (N, S)."""
    total = np.zeros_like(table.grad)
    np.add.at(total, table.source, handed(table))
    return total


def handed(table: FlowTable, edges: Sequence[int] | slice = slice(None)) -> Floats:
    """Return what edges add to the gradient at their u, shape (E, S): their flow, 0 at steps that lack it."""
    return np.where(absent(table, edges), 0.0, table.flow[edges])


def absent(table: FlowTable, edges: Sequence[int] | slice = slice(None)) -> Bools:
    """Return at which steps an edge is missing that other steps have, shape (E, S).

    There its flow is NaN, but the gradient norm at u finite: a flow that was measured as NaN would have made
    that norm NaN too.
    """
    return np.isnan(table.flow[edges]) & np.isfinite(table.grad[table.source[edges]])


def edge_omega(table: FlowTable) -> Floats:
    """Return ω(u→v) = ln f(u→v) − ln ‖g_v‖, shape (E, S); NaN on severed edges and where nothing flows."""
    return log_of(table.flow) - log_of(table.grad[table.target])


def edge_ratios(table: FlowTable) -> Floats:
    """Return r(u→v) = f(u→v) / ‖g_v‖, shape (E, S); 0 where nothing flows, NaN where not measured."""
    return np.where(table.flow == 0, 0.0, ratio(table.flow, table.grad[table.target]))


def log_of(values: Floats) -> Floats:
    """Return ln; NaN where a value is zero or not finite."""
    sound = np.isfinite(values) & (values > 0)
    return np.log(values, out=np.full(values.shape, np.nan), where=sound)


def number_field() -> Any:
    """Return an attrs field for a float in which NaN equals NaN, so that records compare."""
    return attrs.field(converter=lambda x: NAN if x != x else float(x), eq=lambda x: (x,))


def known_numbers(values: Iterable[float]) -> tuple[float, ...]:
    """Return the numbers as a tuple with one NaN that equals itself, so that records compare."""
    return tuple(NAN if value != value else value for value in values)


def exponential(nats: float) -> float:
    """Return e^nats; infinite where that overflows."""
    return math.exp(nats) if nats < 709.0 else math.inf


def arithmetic_mean(values: Floats) -> Floats:
    """Return the mean over the last axis of what is finite; NaN if nothing is."""
    sound = np.isfinite(values)
    count = sound.sum(axis=-1)
    total = np.where(sound, values, 0.0).sum(axis=-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def geometric_mean(values: Floats) -> Floats:
    """Return exp of the mean logarithm over the last axis.

    The natural average of norms and ratios: the mean of a product is the product of the means. Steps with
    exactly zero have no logarithm and are left out; if every finite value is zero the mean is zero.
    """
    mean = np.exp(arithmetic_mean(log_of(values)))
    finite = np.isfinite(values)
    all_zero = finite.any(axis=-1) & ~(finite & (values != 0)).any(axis=-1)
    return np.where(all_zero, 0.0, mean)
