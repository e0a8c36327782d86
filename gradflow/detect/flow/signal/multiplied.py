"""Where the operations between layers make a signal larger again and again, from the first step on."""

from __future__ import annotations

import math
from collections.abc import Iterable

import attrs

from gradflow.detect.evidence import at_look, heads
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType

_PLACES = 2  # from which it multiplies: one operation may bring a small signal to its size


@attrs.frozen(kw_only=True)
class _Place:
    """A layer whose output operations enlarge, and the sizes before and behind them."""

    node: str
    before: float
    behind: float


def multiplied_signal(flow: Flow, over: float, above: float, times: float = 3.0) -> list[Issue]:
    """Layers whose outputs are made larger on the way to the next layer, one after the other, until the loss
    is far above that of zeros before a step is made.

    Measured, in the first step: what a layer with a matrix is given, over what all the layers that feed it
    give together. A sum of them is no larger than that; a sum over many neighbours, a product with a matrix
    or with what is not of size one is.

    Args:
        flow: the record along its wiring.
        over: how many times what zeros cost the first loss is.
        above: how many times it must be.
        times: how many times larger the signal must become at a place.
    """
    found: dict[str, list[_Place]] = {}
    for head in heads(flow) if above <= over < math.inf else ():
        before = flow.wiring.upstream(head)
        here = (n for n in flow.layers if (n in before or n == head) and flow.has_matrix(n))
        found[head] = _places(flow, here, times)
    longest = max(found.values(), key=len, default=[])
    return [_issue(flow, place, longest, over) for place in longest] if len(longest) >= _PLACES else []


def _places(flow: Flow, nodes: Iterable[str], times: float) -> list[_Place]:
    """Return where operations enlarge what layers are given, once for each layer that feeds them."""
    found: dict[str, _Place] = {}
    for node in sorted(nodes, key=lambda n: flow.layers[n].order):
        given = at_look(flow.layers[node].input_rms, 0)
        feeding = [n for n in flow.wiring.before(node) if not flow.layers[n].composite]
        sizes = {n: at_look(flow.layers[n].output_rms, 0) for n in feeding}
        if feeding and given >= times * sum(sizes.values()) > 0:
            largest = max(sizes, key=lambda n: (sizes[n], n))
            found.setdefault(largest, _Place(node=largest, before=sizes[largest], behind=given))
    return list(found.values())


def _issue(flow: Flow, place: _Place, places: list[_Place], over: float) -> Issue:
    layer, growth = flow.layers[place.node], place.behind / place.before
    whole = math.prod(p.behind / p.before for p in places)
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.EXPLODING,
        severity=IssueSeverity.HIGH,
        description=f"In the first step the operations that take its output make the signal {growth:.3g} "
        f"times as large, from rms {place.before:.3g} to {place.behind:.3g}. {len(places)} such places, one "
        f"behind the other, multiply it by {whole:.3g}: the first loss is {over:.3g} times what it costs "
        "to know nothing.",
        magnitude=growth,
        recommended_actions=(
            "Bring back to a scale of one what grows there: a mean over neighbours in the place of their sum "
            "(or the sum over the root of their number), a factor that keeps the size of what it multiplies.",
            f"Or put a norm layer behind {layer.name or 'it'}, and behind the others likewise.",
        ),
        metrics={"over_silence": over, "growth": growth, "signal_growth": whole, "num_places": len(places)},
        evidence=Evidence(growth=whole),
    )
