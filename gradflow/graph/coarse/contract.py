"""Contracting operations: the graph of layers, with the flow of every contracted edge."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import attrs
import numpy as np

from gradflow.graph.data import G
from gradflow.graph.flow import edge_ratios, handed, ratio
from gradflow.graph.table import FlowTable, flow_table
from gradflow.records import EdgeRecord, Floats, GraphRecord

logger = logging.getLogger(__name__)

# NOTE [Norms of sums]
# When several cotangents meet at one tensor they add as vectors, and only their norms f_i and the norm g of
# the whole sum were measured. For a part of them we take every pair at the same angle, with the cosine ρ
# that makes the whole come out right: g² = Σ f_i² + ρ ((Σ f_i)² − Σ f_i²). The part's norm is then
# √(Σ f² + ρ ((Σ f)² − Σ f²)) over the part: exactly f for one member, exactly g for all of them, and between
# the difference and the sum for others. At different tensors cotangents are separate coordinates of one
# vector, and the root of the sum of squares is exact.


@np.errstate(invalid="ignore", over="ignore")
def common_cosine(table: FlowTable, node: int) -> Floats:
    """Return ρ: the cosine between cotangents at a node that explains ‖g‖ by the flows, shape (S,)."""
    flow = handed(table, table.out_edges[node])
    total = flow.sum(axis=0)
    squares = (ratio(flow, np.broadcast_to(total, flow.shape)) ** 2).sum(axis=0)  # as shares of the total:
    wanted = ratio(table.grad[node], total) ** 2 - squares  # nothing overflows or vanishes
    rho = np.divide(wanted, 1.0 - squares, out=np.zeros_like(total), where=1.0 - squares > 1e-12)
    return np.clip(rho, -1.0, 1.0)


@np.errstate(invalid="ignore", over="ignore")
def norm_of_sum(norms: Sequence[Floats], rho: Floats) -> Floats:
    """Return the norm of a sum of vectors that have these norms, pairwise at cosine `rho`, shape (S,)."""
    if len(norms) == 1:
        return norms[0]
    stacked = np.stack(norms)
    total = stacked.sum(axis=0)
    squares = (ratio(stacked, np.broadcast_to(total, stacked.shape)) ** 2).sum(axis=0)
    length = total * np.sqrt(np.maximum(squares + rho * (1.0 - squares), 0.0))
    return np.where(total == 0, 0.0, length)


def norm_of_parts(table: FlowTable, node: int, parts: Sequence[Floats]) -> Floats:
    """Return the norm of what several parts hand back to a node, shape (S,).

    A part that a step does not have adds nothing there; where a step has none of them, it is not known.
    """
    if len(parts) == 1:
        return parts[0]
    cosine, missing = common_cosine(table, node), np.isnan(parts)
    if not missing.any():
        return norm_of_sum(parts, cosine)
    missing &= np.isfinite(table.grad[node])
    total = norm_of_sum(list(np.where(missing, 0.0, parts)), cosine)
    return np.where(missing.all(axis=0), np.nan, total)


@attrs.frozen(eq=False)
class _Share:
    """What one kept node hands back to a node through operations alone."""

    flow: Floats
    live: bool
    reason: str


def layers(graph: G, *, max_edges: int = 100_000) -> G:
    """Return the graph of layers: operations contracted, an edge u→v wherever only operations lie between.

    The flow of the edge is ‖g_v‖ times what the paths through operations transmit: back from v, each
    operation w multiplies by r(u→w) = f(u→w) / ‖g_w‖. That is exact where every operation between has one
    consumer, and also at additions and other operations that scale every cotangent alike. Where an operation
    has several consumers, v's part is taken to shrink as the whole does. Several paths from u to the same v
    meet at u's tensor and add as vectors, with one cosine for all pairs that explains the measured ‖g_u‖;
    with v as u's only consumer the sum is exactly ‖g_u‖. Nodes keep their numbers.

    On a stream of residual additions every layer is read by all later ones, and the edges grow with the
    square of the depth. Above `max_edges` the operations that both join and fork stay as nodes of kind
    `op` (the additions of the stream), which keeps the graph linear.

    Args:
        max_edges: how many edges to make at most, those that operations hold meanwhile included; 100 000 are
            some 300 residual blocks and take about a second.

    Returns:
        A graph whose nodes are layers, inputs and the loss, with `level` "layers".

    Raises:
        GraphUnavailableError: if operations form a cycle among themselves.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"fc1": 0.3, "relu": 0.6, "fc2": 2.0, "loss": 1.0},
    ...     {("fc1", "relu"): 0.3, ("relu", "fc2"): 0.6, ("fc2", "loss"): 2.0}, ops=("relu",))
    >>> list(graph.layers())
    ['fc1', 'fc2', 'loss']
    >>> round(graph.layers().edge("fc1", "fc2").flow, 6)
    0.3
    """
    return graph.coarser(contracted(graph.record, max_edges=max_edges), "layers")


def contracted(record: GraphRecord, *, max_edges: int) -> GraphRecord:
    """Return the record without its operations (but see `layers` for `max_edges`)."""
    table = flow_table(record)
    is_op = [node.kind == "op" for node in record.nodes]
    order = _op_order(table, is_op)
    if _is_beyond(table, is_op, order, max_edges):
        junctions = [i for i in order if len(table.out_edges[i]) > 1 and len(table.in_edges[i]) > 1]
        for node in junctions:
            is_op[node] = False
        order = [i for i in order if is_op[i]]
        logger.info("layer graph: over %d edges, %d junctions kept as nodes", max_edges, len(junctions))
    shares = _shares(table, is_op, order)
    kept = [i for i in range(len(record.nodes)) if not is_op[i]]
    edges = [_edge(table, node, head, share) for node in kept for head, share in shares[node].items()]
    return GraphRecord(nodes=[record.nodes[i] for i in kept], edges=edges, steps=record.steps)


def _op_order(table: FlowTable, is_op: list[bool]) -> list[int]:
    """Return the operations so that each comes before those that read it, by Kahn's algorithm."""
    waiting = [
        sum(is_op[int(table.source[e])] for e in edges) if is_op[i] else -1
        for i, edges in enumerate(table.in_edges)
    ]
    order = [i for i, count in enumerate(waiting) if count == 0]
    for node in order:  # grows while it is walked
        for edge in table.out_edges[node]:
            head = int(table.target[edge])
            if is_op[head]:
                waiting[head] -= 1
                if waiting[head] == 0:
                    order.append(head)
    if len(order) != sum(is_op):
        table.order("graph.layers")  # says what a cycle means
    return order


def _is_beyond(table: FlowTable, is_op: list[bool], order: list[int], limit: int) -> bool:
    """Return whether contraction has to hold more than `limit` edges."""
    heads: list[set[int]] = [set() for _ in is_op]
    count = 0
    for node in [*reversed(order), *(i for i, op in enumerate(is_op) if not op)]:
        for edge in table.out_edges[node]:
            head = int(table.target[edge])
            heads[node] |= heads[head] if is_op[head] else {head}
        count += len(heads[node])
        if count > limit:
            return True
    return False


@np.errstate(invalid="ignore", over="ignore")
def _shares(table: FlowTable, is_op: list[bool], order: list[int]) -> list[dict[int, _Share]]:
    """Return for every node what each kept node hands back to it, through operations or directly."""
    kept = edge_ratios(table)
    shares: list[dict[int, _Share]] = [{} for _ in is_op]
    for node in [*reversed(order), *(i for i, op in enumerate(is_op) if not op)]:
        parts: dict[int, list[_Share]] = {}
        for edge in table.out_edges[node]:
            head, live = int(table.target[edge]), not table.severed[edge]
            reason = table.edges[edge].reason
            if not is_op[head]:
                parts.setdefault(head, []).append(_Share(table.flow[edge], live, reason))
                continue
            for far, share in shares[head].items():
                part = _Share(kept[edge] * share.flow, live and share.live, reason or share.reason)
                parts.setdefault(far, []).append(part)
        for far, some in parts.items():
            shares[node][far] = some[0] if len(some) == 1 else _joined(table, node, some)
    return shares


def _joined(table: FlowTable, node: int, parts: list[_Share]) -> _Share:
    live = [part for part in parts if part.live]
    if not live:
        reasons = [part.reason for part in parts if part.reason]
        return _Share(parts[0].flow, False, reasons[0] if reasons else "")
    return _Share(norm_of_parts(table, node, [part.flow for part in live]), True, "")


def _edge(table: FlowTable, node: int, head: int, share: _Share) -> EdgeRecord:
    flow = share.flow if share.live else np.zeros(len(table.steps))
    return EdgeRecord(
        source=table.name(node),
        target=table.name(head),
        flow=flow,
        severed=not share.live,
        reason="" if share.live else share.reason,
    )
