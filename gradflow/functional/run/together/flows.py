"""The flow on every edge of a step on several processes: what must be combined before it is a number.

Norms of gradients at parts of the batch are combined with all others at the end of the run. Those of outputs
that do not come from the batch are kept whole, and averaged here; so are Gram matrices, of which the
effective ranks of the joined batch's gradients are taken.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from gradflow.functional.processes.line import Line
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.ranks import effective_rank, rank_of_packed
from gradflow.functional.reverse.reverse import Flows
from gradflow.functional.tap.sums import as_norm, magnitude


def combined_flows(line: Line, flows: Flows | None, structure: Structure | None) -> Flows | None:
    """Return the flows of a step with what can be no number before it is combined; None where there are none.

    Args:
        line: to the other processes.
        flows: of this one.
        structure: of the step.
    """
    if flows is None or structure is None:
        return flows
    kept = {key: parts for key, parts in flows.kept.items() if key[0] != "probe"}
    shapes = [(*key, [tuple(part.shape) for part in parts]) for key, parts in kept.items()]
    shapes += [("gram", name, tuple(gram.shape)) for name, gram in flows.grams.items()]
    if line.agreed(shapes) is not None:  # processes that have run other layers: each keeps its own
        mine = {name: rank_of_packed(gram) for name, gram in flows.grams.items()}
        return attrs.evolve(flows, ranks={**flows.ranks, **mine}, grams={}, kept={})
    found = [*(part for parts in kept.values() for part in parts), *flows.grams.values()]
    for axis in line.processes.batch_axes:
        found = line.mean(found, axis)
    means = iter(found)
    edges, groups, ranks = dict(flows.edges), dict(flows.groups), dict(flows.ranks)
    for (kind, *of), parts in kept.items():
        wholes = [next(means) for _ in parts]
        norm = _norm(wholes)
        if kind == "edge":
            edges[of[0], of[1]] = norm
        else:
            groups[of[0]] = norm
            if of[0] in flows.grams:
                ranks[of[0]] = effective_rank(wholes[0], structure.groups[of[0]].type)
    for name in flows.grams:
        gram, call = next(means), structure.groups[name].call
        # Of features that are split over processes, each has a matrix of its own.
        ranks.setdefault(name, math.nan if call is not None and call.split else rank_of_packed(gram))
    return attrs.evolve(flows, edges=edges, groups=groups, ranks=ranks, grams={}, kept={})


def _norm(parts: list[Tensor]) -> Tensor:
    norms = torch.stack([as_norm(magnitude(part, exact=True)).cpu() for part in parts])
    return torch.linalg.vector_norm(norms)
