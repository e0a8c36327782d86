"""Whether the rows of a layer's output become alike in the course of a run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gradflow.detect.view import Flow


def become_alike(flow: Flow, nodes: Iterable[str], times: float, *, steady: bool = True) -> bool:
    """Whether what differs between the rows of each call has become so many times less, and less than at any
    look before; if it should be steady, from each look to the next, but for noise."""
    for node in nodes:
        seen = flow.layers[node].output_variation
        seen = seen[np.isfinite(seen)]
        if len(seen) < 3 or not seen[-1] <= seen[0] / times or not seen[-1] <= 1.03 * seen.min():
            return False
        if steady and np.any(np.diff(seen) > 0.03 * seen[0]):
            return False
    return True


def come_nearer(flow: Flow, node: str, times: float) -> bool:
    """Whether what differs between the rows of a call has become so many times less in size; or operations
    behind it look at directions alone, where a mean that grows makes rows alike too."""
    layer = flow.layers[node]
    apart = layer.output_variation * layer.output_rms[: len(layer.output_variation)]
    apart = apart[np.isfinite(apart)]
    directions = any("norm" in op.lower() or "cosine" in op.lower() for op in flow.wiring.ops_after(node))
    return directions or bool(apart[-1] <= apart[0] / times)
