"""Outputs that an exponential makes of what the last layer gives, in a run that they blow up."""

from __future__ import annotations

import numpy as np

from gradflow.detect.evidence import heads
from gradflow.detect.flow.ends.loud import over_silence
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType

_EXPONENTIALS = frozenset({"exp", "expm1", "exp2", "sinh", "cosh"})
# What bounds such a number again, or takes it back: a ratio of exponentials is a softmax written out.
_BOUNDS = (
    "sigmoid",
    "tanh",
    "clamp",
    "clip",
    "softmax",
    "log",
    "div",
    "reciprocal",
    "minimum",
    "where",
    "erf",
)


def exponentials(flow: Flow, above: float) -> list[Issue]:
    """Heads whose outputs go to the loss through an exponential that nothing bounds, in a run that blows up.

    The slope of an exponential is its own value: what is large is made larger by a factor, and the gradient
    with it, so a step that is as long as the gradient overshoots the more the further off the outputs are.
    Where the first loss is already far above what zeros cost, the growth was there before a step was made,
    and begins behind the last layer, where no path of layers shows it. Alike and not: one whose
    logarithm, ratio or clamp comes next; one that the steps cope with.

    Args:
        flow: the record along its wiring.
        above: how many times the cost of zeros the first loss must be.
    """
    losses, over = flow.record.losses, over_silence(flow)
    if not flow.record.provenance.optimizer or not above <= over < np.inf:
        return []
    known = losses[np.isfinite(losses)]
    if len(known) == len(losses) and not known.max() >= 1e3 * losses[0]:
        return []
    return [_issue(flow, node, over) for node in heads(flow) if _unbounded(flow, node)]


def _unbounded(flow: Flow, head: str) -> bool:
    """Whether a way from a layer to the loss leads through an exponential, with no bound before or behind."""
    wires, seen, todo = flow.wiring, set[tuple[str, bool]](), [(head, False)]
    while todo:
        node, raised = todo.pop()
        if (node, raised) in seen:
            continue
        seen.add((node, raised))
        for after in wires.succs[node]:
            if after == wires.loss and raised:
                return True
            kind = wires.kind_of(after)
            if after not in flow.layers and not any(bound in kind for bound in _BOUNDS):
                todo.append((after, raised or kind in _EXPONENTIALS))
    return False


def _issue(flow: Flow, node: str, over: float) -> Issue:
    layer, losses = flow.layers[node], flow.record.losses
    end = np.nanmax(np.where(np.isfinite(losses), losses, np.nan))
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.EXPLODING,
        severity=IssueSeverity.HIGH,
        description="What it gives goes to the loss through an exponential that nothing bounds, whose slope "
        f"is its own value: the first loss is {over:.3g} times what zeros cost, and the steps, which grow "
        f"with the gradient, take it from {losses[0]:.3g} to {end:.3g} and beyond.",
        magnitude=over,
        recommended_actions=(
            f"Bound what {layer.name or 'the model'} gives before the exponential (clamp it, or a scaled "
            "tanh), or take a form that is bounded itself: a scaled sigmoid, a softplus.",
            "Or compare logarithms: give the loss the exponent, and the logarithm of the target.",
            f"Or start the weights of {layer.name or 'the model'} at a hundredth of their size, so that the "
            "exponential begins at one, and clip the gradient.",
        ),
        metrics={"over_silence": over, "op": "exp"},
        evidence=Evidence(growth=over, op="exp"),
    )
