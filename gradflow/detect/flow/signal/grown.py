"""Where a signal that is too loud for the loss has begun to grow, before the head that hands it on."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import at_look, heads
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType


@attrs.frozen
class _Place:
    """Where a signal grows: the layer, whether what makes it grow stands in front of it, and the sizes."""

    node: str
    operations: bool
    before: float
    behind: float


def begun_before(flow: Flow, loud: Iterable[Issue], times: float = 3.0, least: float = 30.0) -> list[Issue]:
    """The places where the signal of loud heads begins to grow, for heads that only hand on what enters.

    A head of usual weights that is given numbers of rms 1000 is loud, and has no part in it. Looked for in
    the order of execution: the first layer upstream of it whose output is so many times what enters it, or
    that is given so many times what the layers give that feed it (a loop, a product, a sum between them), and
    beyond all that enters the model. Of the layers that feed such operations the one that the loss is
    steepest in, for a change of its output as large as that.

    Alike and not: a norm layer, which lifts a small embedding to one; growth that is taken back before the
    head.

    Args:
        flow: the record along its wiring.
        loud: the verdicts on heads that are too loud from the first step on.
        times: how many times larger the signal must become at one place, and a head less than that.
        least: how many times what enters the model the head must be given.
    """
    found: dict[str, Issue] = {}
    for issue in loud:
        head = node_name(issue.layer)
        if issue.severity.is_serious and head in heads(flow):
            place = _place(flow, head, times, least)
            if place is not None:
                found.setdefault(place.node, _issue(flow, place, head, issue))
    return list(found.values())


def _place(flow: Flow, head: str, times: float, least: float) -> _Place | None:
    entering, given = _entering(flow, head), at_look(flow.layers[head].input_rms, 0)
    if not given >= least * entering or at_look(flow.layers[head].output_rms, 0) >= times * given:
        return None
    upstream = flow.wiring.upstream(head)
    for node in sorted(
        (n for n in flow.layers if n in upstream or n == head), key=lambda n: flow.layers[n].order
    ):
        layer = flow.layers[node]
        enters, gives = at_look(layer.input_rms, 0), at_look(layer.output_rms, 0)
        feeding = [n for n in flow.wiring.before(node) if n in flow.layers and not flow.layers[n].composite]
        fed = max((at_look(flow.layers[n].output_rms, 0) for n in feeding), default=math.nan)
        if layer.composite:
            continue
        if enters >= times * max(fed, entering):
            return _Place(max(feeding, key=lambda n: _steepness(flow, n)), True, fed, enters)
        if node != head and gives >= times * max(enters, entering):
            return _Place(node, False, enters, gives)
    return None


def _entering(flow: Flow, head: str) -> float:
    """The rms of what enters the model, or of what its tables give, and no less than the usual one."""
    upstream = flow.wiring.upstream(head)
    firsts = [flow.layers[n] for n in flow.layers if n in upstream and flow.wiring.is_first(n)]
    sizes = [at_look(x.output_rms if "mbedding" in x.type else x.input_rms, 0) for x in firsts]
    return max([1.0, *(size for size in sizes if math.isfinite(size))])


def _steepness(flow: Flow, node: str) -> float:
    slope = at_look(flow.grad[node], 0) * at_look(flow.layers[node].output_rms, 0)
    slope *= math.sqrt(max(int(flow.layers[node].num_elements[0]), 1))
    return slope if math.isfinite(slope) else -1.0


def _issue(flow: Flow, place: _Place, head: str, loud: Issue) -> Issue:
    layer, last = flow.layers[place.node], flow.layers[head]
    given = at_look(last.input_rms, 0)
    where = "in the operations that take its output" if place.operations else "here"
    growth = place.behind / place.before if place.before > 0 else math.inf
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.EXPLODING,
        severity=max(loud.severity, IssueSeverity.MEDIUM),
        description=f"In the first step the signal begins to grow {where}, from rms {place.before:.3g} to "
        f"{place.behind:.3g}, and {last.name or 'the last layer'} is given rms {given:.3g}. "
        "It is of usual size itself, and its outputs are as loud as what it is given.",
        magnitude=growth,
        recommended_actions=_actions(flow, place, growth),
        metrics={"growth": growth, "head": last.name, "head_input_rms": given},
        evidence=Evidence(growth=max(growth, loud.evidence.growth)),
    )


def _actions(flow: Flow, place: _Place, growth: float) -> Actions:
    name, more = flow.layers[place.node].name, "Or put a norm layer behind it."
    if place.operations:
        return (
            "Bring back to a scale of one what grows there: keys and states of unit length, a mean in the "
            "place of a sum, a step that is no larger than one over the squared size of its input.",
            more,
        )
    if flow.has_matrix(place.node):
        return (
            f"Draw (or scale) the weights of {name} by the root of their fan-in, sqrt(2 / fan_in) in "
            "front of a ReLU: each layer then gives as much as it gets.",
            more,
        )
    return (
        f"Look at what {name} computes: it makes its input {growth:.3g} times as large. A norm multiplies by "
        "the reciprocal root of the mean square, x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).",
        more,
    )
