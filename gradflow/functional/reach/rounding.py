"""Gradients that are rounding and nothing else: their parts cancel by mathematics, wherever that happens.

NOTE [The gradient of a multiple]
The gradient of c·L is c times that of L. In numbers it is so to rounding, which falls otherwise for another
c: of a gradient that is there, the direction stays to many digits, however small it is beside others; where
all that is there is what rounding has left of parts that cancel, another direction comes with every c. A walk
that labels zeros sees parts that cancel only where they meet, and next to nothing is left of them; this sees
all of them, wherever it happens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.functional.model.layers import owner
from gradflow.functional.reach.reasons import Blame
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.reverse import fused
from gradflow.functional.tap.probes import is_probe
from gradflow.records import Reason

USES = "sum of its calls"  # what cancels is what several calls of a layer hand back
SAMPLES = "sum over its samples"
_MULTIPLES = (1.37, 1.83, 0.71)  # no powers of two, which round alike
_ALIKE = 0.9  # cosine: below it for every multiple there is no direction; of what is there it is 1
_LEAST = 1e-30  # norm, above what a short exponent holds


def add_rounding(
    structure: Structure,
    leaves: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    blames: list[Blame | None],
) -> None:
    """Label the elements of matrices of whose gradient rounding is all that is left, but for exact zeros.

    Args:
        structure: the graph of a step, kept.
        leaves: those that are asked about, by name: with the faintest gradients.
        labels: of their elements; those without one, and those that cancel, get that of a new blame.
        blames: what the labels stand for.
    """
    held = {n: p for n, p in leaves.items() if p.dim() > 1 and p.dtype in (torch.float32, torch.float64)}
    for name, blame in lost_in_rounding(structure, held).items() if held else ():
        known = [0, *(i for i, b in enumerate(blames) if b and b.reason is Reason.BY_MATHEMATICS)]
        here = torch.isin(labels[name], torch.tensor(known, dtype=labels[name].dtype))
        labels[name][here] = len(blames)
        blames.append(blame)


def lost_in_rounding(structure: Structure, matrices: Mapping[str, Tensor]) -> dict[str, Blame]:
    """Return which leaves have a gradient of rounding alone, and as far as that is seen, by what.

    Args:
        structure: the graph of a step, kept.
        matrices: leaf tensors that are asked about, by name, in single or double precision.
    """
    called = {call.module: None for call in structure.calls if call.is_layer}
    layers = {name: owner(name, called) for name in matrices}
    assert structure.root is not None
    names, calls = list(matrices), _calls(structure, set(layers.values()))
    asked = [*matrices.values(), *(edge for _, _, edge in calls)]
    plain = fused(structure.root, asked, retain_graph=True)
    lost = [g is not None and _LEAST < float(g.norm()) < math.inf for g in plain]
    for multiple in _MULTIPLES:
        if not any(lost[: len(names)]):
            return {}
        again = fused(
            structure.root, asked, cotangent=torch.full_like(structure.root, multiple), retain_graph=True
        )
        lost = [known and _cosine(a, b) < _ALIKE for known, a, b in zip(lost, plain, again, strict=True)]
    found, arrives = {}, [call for call, gone in zip(calls, lost[len(names) :], strict=True) if not gone]
    for name, gone in zip(names, lost, strict=False):
        own, open_ = ([call for call in some if call[0] == layers[name]] for some in (calls, arrives))
        if gone:
            found[name] = _blame(len(own), [call for _, call, _ in open_])
    return found


def _blame(num_outputs: int, arrives: Sequence[str]) -> Blame:
    """Tell where a layer's gradient cancels.

    Args:
        num_outputs: of all its calls.
        arrives: its calls at whose output a gradient is there.
    """
    if num_outputs and not arrives:
        return Blame(Reason.BY_MATHEMATICS)
    if len(set(arrives)) < 2:  # over the samples of one call, which are all alike for it
        return Blame(Reason.BY_MATHEMATICS, op=SAMPLES)
    return Blame(Reason.BY_MATHEMATICS, at=arrives[0], layer_at=arrives[0], op=USES)


def _calls(structure: Structure, layers: set[str]) -> list[tuple[str, str, GradientEdge]]:
    """Return the outputs of the calls of some layers: the layer, the call, and the edge at it."""
    probes = {id(node.site): GradientEdge(node, 0) for node in structure.nodes if is_probe(node)}
    found = []
    for call in structure.calls:
        for site in call.sites if call.is_layer and call.module in layers else ():
            edge = site.edge if site.edge is not None else probes.get(id(site))
            if edge is not None:
                found.append((call.module, call.name, edge))
    return found


def _cosine(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 1.0
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if 0 < size < math.inf else 1.0
