"""A network that is given two kinds of input, of scales far apart."""

from __future__ import annotations

import math

from gradflow.detect.evidence import early, heads, late
from gradflow.detect.knowledge import learns
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, Role

_LARGE = 30.0  # rms: standardised inputs have 1, and counts or pixels of some tens train all the same


def uneven_inputs(flow: Flow, times: float = 30.0) -> list[Issue]:
    """The first layers of a network that is called on several inputs, one of which is off scale.

    A critic that is given real pictures of 0 to 255 and made ones of -1 to 1 tells them apart by nothing but
    their size, and the gradient of its weights is that of the large ones, which is as many times as large.

    Measured: what enters the calls of one module from outside of the model, at the start and at the end, and
    what the last layers give that each call leads to. Alike and not: inputs that are all large, or all
    small; zeros; a norm or a bounded activation on the way, which undoes the size; the inside and the edge
    of an equation's domain, as slopes of the former come from all of its layers; a model that learns.

    Args:
        flow: the record along its wiring.
        times: how far apart inputs must be, and what comes of them.
    """
    if not flow.wiring.known or learns(flow.record):
        return []
    first = (n for n in flow.layers if flow.wiring.is_first(n) and flow.trainable(n) and flow.has_matrix(n))
    return [
        issue
        for module, nodes in flow.by_module(first).items()
        if len(nodes) > 1 and not flow.is_table(nodes[0])
        for issue in _uneven(flow, module, nodes, times)
    ]


def _uneven(flow: Flow, module: str, nodes: list[str], times: float) -> list[Issue]:
    sizes = {n: min(early(flow.layers[n].input_rms), late(flow.layers[n].input_rms)) for n in nodes}
    sizes = {n: size for n, size in sizes.items() if size > 0 and math.isfinite(size) and _given(flow, n)}
    if len(sizes) < 2:
        return []
    large, small = max(sizes, key=lambda n: sizes[n]), min(sizes, key=lambda n: sizes[n])
    ratio = sizes[large] / sizes[small]
    given, other = _given(flow, large), _given(flow, small)
    if not (sizes[large] >= _LARGE and ratio >= times and given.keys() == other.keys()):
        return []
    last = next(iter(given))
    if not given[last] >= times * other[last] > 0:
        return []
    layer = flow.layers[large]
    return [
        Issue(
            layer=module,
            layer_type=layer.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
            description=f"It is called on inputs of scales far apart: of rms {sizes[large]:.3g} in one call, "
            f"and {sizes[small]:.3g} in another. What comes of them has rms {given[last]:.3g} and "
            f"{other[last]:.3g}, and the gradient of its weights is that of the large ones.",
            magnitude=ratio,
            recommended_actions=(
                "Bring all that it is given to one scale: pictures of 0 to 255 to that of what a tanh makes, "
                "x / 127.5 - 1, and features by the same mean and deviation.",
            ),
            metrics={"largest_input": sizes[large], "smallest_input": sizes[small], "ratio": ratio},
            evidence=Evidence(roles=Role.OFF_SCALE, num_calls=len(nodes), growth=ratio),
        )
    ]


def _given(flow: Flow, node: str) -> dict[str, float]:
    """By module the rms of what the last layers give that a call leads to, at the start, the last first."""
    behind = {node, *flow.wiring.downstream(node)}
    ends = sorted((flow.layers[n] for n in heads(flow) if n in behind), key=lambda layer: -layer.order)
    return {layer.module: early(layer.output_rms) for layer in ends}
