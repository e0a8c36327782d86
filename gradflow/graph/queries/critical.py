"""Critical points of the flow: sources, sinks, vortices and saddles."""

from __future__ import annotations

import math

import attrs

from gradflow.graph.data import GraphData
from gradflow.graph.flow import number_field


@attrs.frozen(kw_only=True)
class CriticalPoint:
    """A node where the flow is not merely handed on; means over the measured steps.

    Args:
        name: the node.
        kind: `source`, `sink`, `vortex` or `saddle`.
        divergence: tanh(ln gain), in [−1, 1].
        gain: ‖c_v‖ / ‖g_v‖.
        curl: root mean square of the cyclic part of ω over its edges, in nats.
        strength: by how much it passes its threshold: the larger of |divergence| / threshold and
            curl / threshold, of those that pass.
        reason: a sentence with the numbers.
    """

    name: str
    kind: str
    divergence: float = number_field()
    gain: float = number_field()
    curl: float = number_field()
    strength: float = number_field()
    reason: str


def critical_points(
    graph: GraphData, *, divergence: float = 0.8, curl: float = math.log(2)
) -> tuple[CriticalPoint, ...]:
    """Return the nodes where the flow is amplified or absorbed, or circulates.

    | | curl below its threshold | curl above |
    | --- | --- | --- |
    | divergence above +threshold | source: it amplifies the gradient | saddle |
    | divergence below −threshold | sink: it absorbs the gradient | saddle |
    | between | | vortex: parallel ways past it carry unlike shares |

    A saddle does both: it changes the size of the gradient, and the ways round it disagree. The loss,
    inputs, and operations with a single element (a mean over the batch, say) are left out: there the
    gradient of one number is spread over many, which is no property of the network.

    Args:
        divergence: threshold on |divergence|, in (0, 1). 0.8 = tanh(ln 3): a gain above 3 or below 1/3,
            for a linear layer at PyTorch's initialisation has √(1/3) = 0.58, or 0.41 where it halves a width.
        curl: threshold on the curl, in nats. ln 2: on average over its edges, what the gradient keeps is
            off by a factor of 2 from what a potential could explain. A circulation c round a lone cycle
            of n edges shares out as c/n each.

    Returns:
        The points, strongest first; equally strong ones (to nine digits) in the order of execution.

    Raises:
        ValueError: if a threshold is out of range.
        GraphUnavailableError: if only the topology was taken.

    >>> from gradflow.graph import LayerGraph
    >>> graph = LayerGraph.from_flows(
    ...     {"a": 0.001, "b": 1.0, "loss": 1.0}, {("a", "b"): 0.001, ("b", "loss"): 1.0})
    >>> [(point.name, point.kind) for point in graph.critical_points()]
    [('b', 'sink')]
    """
    if not 0 < divergence < 1 or not curl > 0:
        raise ValueError(
            "graph.critical_points: expected 0 < divergence < 1 and curl > 0, got "
            f"divergence={divergence!r}, curl={curl!r}."
        )
    table = graph.table
    table.check_measured("graph.critical_points")
    numbers, curls = graph.numbers, graph.hodge.curl.tolist()
    points, scalars = [], table.scalars()
    for i, node in enumerate(table.nodes):
        if node.kind in ("loss", "input") or i in scalars:
            continue
        div, gain, turn = float(numbers.mean_divergence[i]), float(numbers.mean_gain[i]), curls[i]
        spreads, turns = abs(div) >= divergence, turn >= curl  # False for NaN
        if spreads or turns:
            kind = ("saddle" if turns else "source" if div > 0 else "sink") if spreads else "vortex"
            strength = max(abs(div) / divergence if spreads else 0.0, turn / curl if turns else 0.0)
            points.append(
                CriticalPoint(name=node.name, kind=kind, divergence=div, gain=gain, curl=turn,
                              strength=strength, reason=_reason(node.name, kind, gain, div, turn))
            )  # fmt: skip
    # Rounding must not decide between points of one cycle, which are equally strong by construction.
    return tuple(sorted(points, key=lambda p: -float(f"{p.strength:.9g}")))


def _reason(name: str, kind: str, gain: float, divergence: float, curl: float) -> str:
    verb = "amplifies" if divergence > 0 else "absorbs"
    change = f"{name} {verb} the gradient (gain {gain:.3g}, divergence {divergence:+.2f})"
    turn = f"the ways round {name} keep unlike shares of the gradient (curl {curl:.2f} nats)"
    return {"vortex": turn, "saddle": f"{change}, and {turn}"}.get(kind, change) + "."
