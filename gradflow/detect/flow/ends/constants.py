"""Outputs that the loss depends on, and that are constants to whoever trains the model."""

from __future__ import annotations

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import heads
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, Role


def constant_outputs(flow: Flow, min_updates: int) -> list[Issue]:
    """The last layer of a model, some output of which no weight changes, or changes the loss by.

    Measured: an output without a graph at which the loss has a slope, while none of its slopes at others
    depends on it; and one with a graph that is exactly zero for every sample at the end of a run, in a loss
    that bends with it. Alike and not: targets, weights and baselines, which other slopes depend on; a
    volume that a flow keeps, in which the loss is linear; what starts at zero, before any steps.

    Args:
        flow: the record along its wiring.
        min_updates: steps of the optimizer after which a zero by design has ended.
    """
    known, ends = flow.record.knowledge, heads(flow)
    account = flow.record.reach
    if known is None or not ends or (account is not None and account.terms):  # a term is told with its reason
        return []
    updated = bool(flow.record.provenance.optimizer) and flow.record.steps > min_updates
    kinds = [text.partition(" ") for text in known.constants]
    told = [(shape, _added(shape)) for kind, _, shape in kinds if kind == "added"]
    told += [(shape, _zero(shape)) for kind, _, shape in kinds if kind == "zero" and updated]
    layer = flow.layers[ends[-1]]
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.DEAD,
            severity=IssueSeverity.HIGH,
            description=text,
            magnitude=1.0,
            recommended_actions=actions,
            metrics={"shape": shape},
            evidence=Evidence(roles=Role.CUT, origin=layer.name),
        )
        for shape, (text, actions) in told[:1]
    ]


def _added(shape: str) -> tuple[str, Actions]:
    return (
        f"An output of shape {shape} has no graph, and the loss adds up what it costs: no slope at another "
        "output depends on it, so that part of the loss is a constant to the optimizer.",
        (
            "Give out the tensor with its graph: leave out detach(), and pass create_graph=True to "
            "torch.autograd.grad where it is a derivative that the loss asks for.",
            "If it is meant for the log alone, leave it out of the loss.",
        ),
    )


def _zero(shape: str) -> tuple[str, Actions]:
    return (
        f"An output of shape {shape} is exactly zero for every sample, after all of the steps, and the loss "
        "bends with it: no weight moves it.",
        (
            "If it is a second derivative of the model, use a smooth activation (tanh, SiLU, softplus, a "
            "sine) in the place of the rectifier, whose second derivative is zero everywhere.",
            "If it is what a gate or a mask lets through, look at what closes it for every sample.",
        ),
    )
