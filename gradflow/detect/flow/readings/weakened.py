"""Stacks whose layers apply less of their weights than they hold, so that signal and gradient fade."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradflow.detect.evidence import early, late, row_gain
from gradflow.detect.knowledge import differing, falls, guesses
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType, Role

_KEPT = 0.5  # of what a layer's weights promise: independent weights give it whole, whatever enters
_FEWEST = 3  # layers one behind the other
_FADED = 1e-2  # of the signal, and of the gradient, that passes all of them
_ALIKE = 1e-2  # of the outputs: where no more differs, they tell no samples apart


def weakened(flow: Flow, arriving: Mapping[str, Floats]) -> list[Issue]:
    """The first layer of a stack in which each gives much less than its weights, at their size, would make.

    Measured: rms of what leaves a layer over rms of what enters, beside ‖W‖_F / √rows, which is what a matrix
    of independent entries makes of any input (see `row_gain`); signal and gradient over the stack, in the
    first steps and the last.

    Why this is evidence: what is drawn at a size for all inputs of a unit and then applied to a few (a mask,
    a pruned net), or times a factor, is too small in every layer. Signal and gradient fall alike, and a model
    that gives the same for all samples, whose loss stands still, has lost both.

    Alike and not: weights that a factor brings to the size they should have; a norm behind each layer; a
    stack of few layers, or one whose steps come up with it, which learns; small weights themselves, which
    other readings tell.

    Args:
        flow: the record along its wiring.
        arriving: by node, the gradient over that at the loss, in every step.
    """
    record = flow.record
    if record.knowledge is None or not record.provenance.optimizer or not guesses(record) or falls(record):
        return []
    if not differing(record.knowledge) <= _ALIKE:
        return []
    kept = {node: _kept(flow, node) for node in arriving if _is_plain(flow, node)}
    weak = sorted((n for n, part in kept.items() if 0 < part < _KEPT), key=lambda n: flow.layers[n].order)
    chain = [n for n in weak if n == weak[-1] or n in flow.wiring.upstream(weak[-1])]
    if len(chain) < _FEWEST:
        return []
    first, last = flow.layers[chain[0]], flow.layers[chain[-1]]
    entering = min(early(first.input_rms), late(first.input_rms))
    signal = max(early(last.output_rms), late(last.output_rms)) / entering if entering > 0 else math.nan
    gradient = max(float(at(arriving[chain[0]])) for at in (early, late))
    if not (0 < signal <= _FADED and 0 < gradient <= _FADED):
        return []
    usual = math.exp(sum(math.log(kept[n]) for n in chain) / len(chain))
    return [
        Issue(
            layer=first.name,
            layer_type=first.type,
            issue_type=IssueType.VANISHING,
            severity=IssueSeverity.MEDIUM,
            description=f"From here to {last.name}, each of {len(chain)} layers gives {usual:.2g} of what "
            f"its weights, at their size, would make of what enters: {signal:.1e} of the signal passes them "
            f"all, and {gradient:.1e} of the gradient comes back to here. The outputs are the same for all "
            "samples, and the loss stands still.",
            magnitude=gradient,
            recommended_actions=(
                "Look for what makes the weights smaller than they were drawn (a mask, a factor), and draw "
                f"them about {1 / usual:.2g} times as large: where a mask leaves few inputs of many, at "
                "sqrt(2 / those that are left).",
                "Or put a norm behind each of these layers.",
            ),
            metrics={"applied": usual, "num_layers": len(chain), "signal": signal, "arriving": gradient},
            evidence=Evidence(roles=Role.STARVED),
        )
    ]


def _is_plain(flow: Flow, node: str) -> bool:
    """Whether a layer owns one weight matrix or kernel, that is trained, and at most a vector beside it."""
    ranks = sorted(len(p.shape) for p in flow.parameters_of(node))
    return flow.has_matrix(node) and bool(flow.trainable(node)) and ranks[:-1] in ([], [1])


def _kept(flow: Flow, node: str) -> float:
    """Return what a layer gives in the first steps over what its weights promise; NaN where not known."""
    layer = flow.layers[node]
    promised = row_gain(flow, node, early) * early(layer.input_rms)
    return early(layer.output_rms) / promised if promised > 0 else math.nan
