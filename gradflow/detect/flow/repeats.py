"""Growth from one repetition of a block to the next, in whatever the state between them is made of."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gradflow.detect.evidence import late, total_gradient
from gradflow.detect.knowledge import calm, has_learned
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType, LayerRecord

_FEWEST = 3
_EACH = 0.5  # of what the one before had, each must have at least


def growing_repeats(flow: Flow, least: float) -> list[Issue]:
    """Blocks of one kind, each of which is handed more than the one before, and hands back a larger gradient.

    A state that repeated blocks pass on need not go through a layer (coordinates that are moved, a residual
    stream, a solver's steps), so no path of layers shows its growth; but the same layer of each block sees
    it, in what enters it and in its gradient. One of both alone has healthy reasons: a stream that many
    blocks add to grows, and a norm layer before each of them takes that out of the gradient.

    Args:
        flow: the record along its wiring.
        least: how many times larger both must be at one end than at the other, in the first step.
    """
    found = []
    for calls in _repeated(flow):
        if _shared_growth(calls) >= least**2 * len(calls):
            found.append((_shared_growth(calls), 1.0, calls))
            continue
        entering = [float(call.input_rms[0]) if len(call.input_rms) else 0.0 for call in calls]
        returning = [float(call.grad_norm[0]) if len(call.grad_norm) else 0.0 for call in calls][::-1]
        if _grows(entering, least) and _grows(returning, least) and _is_steady(entering, least):
            found.append((returning[-1] / returning[0], entering[-1] / entering[0], calls))
    if not found:
        return []
    backward, forward, calls = max(found, key=lambda each: each[0] * each[1])
    first = calls[0]
    rate = backward ** (1.0 / (len(calls) - 1))
    return [
        Issue(
            layer=first.name,
            layer_type=first.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
            description=_told(calls, forward, backward),
            magnitude=backward,
            recommended_actions=(
                f"Bound what each block adds to what it passes on: a tanh, a clamp or a norm on the update, "
                f"or an update divided by the number of blocks ({len(calls)}) or of the terms that it sums.",
                "Start the last layer of each block's update at zero or next to it "
                "(nn.init.zeros_, or a factor of 1e-3), so that the blocks begin as identities.",
            ),
            metrics={
                "growth": backward,
                "forward_growth": forward,
                "per_block": rate,
                "num_blocks": len(calls),
            },
            evidence=Evidence(growth=backward),
        )
    ]


def bursting_calls(flow: Flow, least: float, jump: float = 30.0) -> list[Issue]:
    """A module that is called again and again, over whose calls the gradient multiplies in some batches.

    Descent that is unrolled, or a solver's loop, may hold for one batch and overshoot more at each turn for
    the next. No median over steps shows it, and the gradient that jumps is not thrown by the optimizer: in
    those very steps it grows on its way back, while in others between them it does not.

    Alike and not: a last call that hands back next to nothing in some steps (the whole gradient does not jump
    there); a loop that the steps have blown up, and which stays so; a single batch.

    Args:
        flow: the record along its wiring.
        least: how many times larger the gradient must be at one call than at the last ones, in two steps.
        jump: how many times that of the run's median the gradient of all parameters must be in those steps.
    """
    total = np.nan_to_num(total_gradient(flow.record), posinf=np.inf)
    usual = float(np.median(total[total > 0])) if (total > 0).any() else math.inf
    jumps = total >= jump * usual
    if jumps.sum() < 2 or has_learned(flow.record) or calm(flow.record):
        return []
    found = [
        (_bursts(flow, calls), calls) for calls in _repeated(flow) if len({c.module for c in calls}) == 1
    ]
    grown = [(np.where(jumps, growth, 0.0), growth, calls) for growth, calls in found]
    grown = [
        (burst, growth, calls) for burst, growth, calls in grown if _come_and_go(burst, growth, least, jump)
    ]
    if not grown:
        return []
    burst, growth, calls = max(grown, key=lambda each: float(each[0].max()))
    first, at, most = calls[0], int(burst.argmax()), float(burst.max())
    number, usual = int((burst >= least).sum()), float(np.median(growth))
    return [
        Issue(
            layer=first.name,
            layer_type=first.type,
            issue_type=IssueType.EXPLODING,
            severity=IssueSeverity.HIGH,
            description=f"On its way back through {len(calls)} calls the gradient grows {most:.3g} times in "
            f"step {at}, and in {number} of {flow.record.steps} steps by {least:.0f} or more, where it "
            f"usually grows {usual:.2g} times: what is repeated overshoots for some batches.",
            magnitude=most,
            recommended_actions=(
                "Bound what each turn of the loop adds: a smaller inner step, a clipped inner gradient, "
                "or a norm on the state.",
                "Or bring what enters to a scale of one (targets of an inner loss too), or take fewer turns.",
            ),
            metrics={"growth": most, "usual_growth": usual, "num_steps": number, "num_calls": len(calls)},
            evidence=Evidence(growth=most, num_calls=len(calls)),
        )
    ]


def _bursts(flow: Flow, calls: Sequence[LayerRecord]) -> Floats:
    """By step, the largest gradient at a call of a module over the largest at those that no other follows."""
    nodes = {node for node, layer in flow.layers.items() if any(layer is call for call in calls)}
    last = [n for n in nodes if not nodes & flow.wiring.downstream(n) - {n}]
    if len(last) == len(nodes):
        return np.zeros(flow.record.steps)
    with np.errstate(all="ignore"):
        most, end = (np.fmax.reduce([flow.grad[n] for n in some]) for some in (list(nodes), last))
        return np.where(end > 0, most / end, 0.0)


def _come_and_go(burst: Floats, growth: Floats, least: float, jump: float) -> bool:
    """Whether a gradient grows so in several steps, and far less in one that follows the first of them."""
    at = np.flatnonzero(burst >= least)
    return len(at) >= 2 and bool((growth[at[0] :] <= burst.max() / jump).any())


def _told(calls: Sequence[LayerRecord], forward: float, backward: float) -> str:
    rate = backward ** (1.0 / (len(calls) - 1))
    each = f"about {rate:.2g} times from one to the next, in the first step."
    if forward == 1.0:
        return f"On its way back through {len(calls)} calls the gradient grows {backward:.3g} times: {each}"
    return (
        f"From {calls[0].name} to {calls[-1].name}, the same layer of {len(calls)} blocks, what enters grows "
        f"{forward:.3g} times, and on the way back the gradient {backward:.3g} times: {each}"
    )


def _shared_growth(calls: Sequence[LayerRecord]) -> float:
    """By how much the gradient grows on its way back through the calls of one module; 1 for several modules.

    The same weights are applied each time, so nothing but the state between them can make it grow. It must do
    so in each quarter of the calls.
    """
    norms = np.array([float(call.grad_norm[0]) if len(call.grad_norm) else math.nan for call in calls])
    if len({call.module for call in calls}) > 1 or len(norms) < 8 or not (norms > 0).all():
        return 1.0
    quarters = [float(np.exp(np.log(part).mean())) for part in np.array_split(norms, 4)]
    return quarters[0] / quarters[-1] if all(a > 2 * b for a, b in itertools.pairwise(quarters)) else 1.0


def _grows(values: Sequence[float], least: float) -> bool:
    return values[0] > 0 and values[-1] >= least * values[0] and all(
        b >= _EACH * a for a, b in itertools.pairwise(values)
    )  # fmt: skip


def _is_steady(values: Sequence[float], least: float) -> bool:
    """Whether they grow at more than one place: without the largest rise, by the root of what is asked still.

    The first block of several may be another one by what it is fed, and the rest alike.
    """
    rises = sorted(b / a for a, b in itertools.pairwise(values))
    return math.prod(rises[:-1]) >= math.sqrt(least)


def _repeated(flow: Flow) -> Iterator[list[LayerRecord]]:
    """Yield the calls of like layers in numbered blocks, and further calls of one layer, in their order."""
    groups: dict[tuple[object, ...], list[tuple[int, LayerRecord]]] = {}
    for node, layer in flow.layers.items():
        if layer.composite or not flow.has_matrix(node):
            continue
        shapes = tuple(p.shape for p in flow.parameters_of(node))
        places = list(re.finditer(r"\d+", layer.name))
        for place in places:
            start, end = place.span()
            key = (layer.name[:start], layer.name[end:], layer.type, shapes)
            groups.setdefault(key, []).append((int(place.group()), layer))
        if layer.call == 0 and "@" not in layer.name:
            groups.setdefault((f"{layer.name}@", "", layer.type, shapes), []).append((0, layer))
    for members in groups.values():
        calls = [layer for _, layer in sorted(members, key=lambda each: each[0])]
        if len(calls) >= _FEWEST and _in_order(calls):
            yield calls


def _in_order(calls: Sequence[LayerRecord]) -> bool:
    return all(a.order < b.order for a, b in itertools.pairwise(calls))


LEVELS = "Over the earlier half of its calls it hardly grows: it adds up, and does not multiply."
_MANY_CALLS = 8


def levels_off(flow: Flow, issue: Issue, total: float) -> bool:
    """Whether the gradient at the many calls of a module grows over the last of them alone.

    What a loop over time multiplies at every step grows as much over its first half as over its second. What
    it adds up, such as the cost of all later positions of a body that a force moves, grows as a power of the
    number of steps: fast at the end, where next to nothing follows, and then less and less.
    """
    module = issue.layer.partition("@")[0]
    calls = sorted(
        (n for n in flow.grad if flow.layers[n].module == module), key=lambda n: flow.layers[n].order
    )
    norms = [late(flow.grad[n]) for n in calls]
    middle_call = norms[len(norms) // 2] if len(norms) >= _MANY_CALLS else math.nan
    return 0 < norms[0] < total**0.25 * middle_call
