"""Modules that stand beside each other for one choice, such as experts, and which of them still learn."""

from __future__ import annotations

import math
import re

import numpy as np

from gradflow.detect.reach.unreached import sole_reason
from gradflow.detect.view import Flow
from gradflow.records import Floats, Reason

FEWEST = 3  # alternatives in all: of two, one that nobody takes is half of them


def is_resting(flow: Flow, node: str) -> bool:
    """Whether a layer that gets no gradient at the end of a run did get some in it, or is left out by the
    model's own choice, while most of its alternatives get some.

    A router that learns drops one of its experts for some steps, and takes it up again as the balance of its
    loss asks for it. Where half of the alternatives are dropped, it has collapsed.
    """
    part = sole_reason(flow, [p.name for p in flow.trainable(node)])
    left_out = part is not None and part.reason is Reason.UNCHOSEN_BY_MODEL
    if not (left_out or any(np.any(p.grad_norm > 0) for p in flow.trainable(node))):
        return False
    for family in families(flow, node):
        alive = sum(gets_some(flow, other) for other in family)
        if len(family) + 1 >= FEWEST and 2 * alive > len(family) + 1:
            return True
    return False


def gets_some(flow: Flow, node: str) -> bool:
    """Whether a layer gets any gradient in the last third of the steps; one that does not run gets none."""
    return node in flow.grad and bool(np.any(last_third(np.nan_to_num(flow.grad[node])) > 0))


def last_third(values: Floats) -> Floats:
    """Return the last third of what is known by step."""
    return values[-max(1, math.ceil(len(values) / 3)) :]


def families(flow: Flow, node: str) -> list[list[str]]:
    """The layers that a layer is an alternative to, by every number in its name that may count them: of one
    type and shape of weights, and neither before it nor behind it."""
    own = flow.layers[node]
    apart = {node} | flow.wiring.upstream(node) | flow.wiring.downstream(node)
    alike = [
        other
        for other, layer in flow.layers.items()
        if other not in apart and layer.type == own.type and layer.call == own.call
        and [p.shape for p in flow.parameters_of(other)] == [p.shape for p in flow.parameters_of(node)]
    ]  # fmt: skip
    found = []
    for at in re.finditer(r"(?<![^.])\d+(?![^.])", own.module):
        pattern = re.escape(own.module[: at.start()]) + r"\d+" + re.escape(own.module[at.end() :])
        found.append([other for other in alike if re.fullmatch(pattern, flow.layers[other].module)])
    return found
