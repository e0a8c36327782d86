"""VANISHING along a sequence: layers and loops that forget what came first, and stacks of such layers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradflow.detect.actions import forgetful_actions
from gradflow.detect.evidence import early, late, middle
from gradflow.detect.flow.readings.recurrent_weights import memory
from gradflow.detect.knowledge import differing, guesses
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, ParameterRecord, Role, ScanRecord


def forgetful(flow: Flow, threshold: float) -> list[Issue]:
    """Plain recurrent layers whose weights keep next to nothing from the last step to the first."""
    issues = []
    for node, layer in flow.layers.items():
        kept = memory(flow, node)
        if kept is None or kept.kept >= threshold or not flow.trainable(node):
            continue
        issues.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.VANISHING,
                severity=IssueSeverity.MEDIUM if kept.kept >= threshold**2 else IssueSeverity.HIGH,
                description=f"Over {kept.steps} steps back in time it keeps at most {kept.kept:.1e} of the "
                f"gradient: only its last step is read, and its recurrent weights keep {kept.rate:.2g} a "
                f"step.",
                magnitude=kept.kept,
                recommended_actions=forgetful_actions(layer.name, kept.rate),
                metrics={"kept_per_step": kept.rate, "num_steps": kept.steps},
                evidence=Evidence(roles=Role.ABSORBING),
            )
        )
    return issues


def fading(flow: Flow, most: float) -> list[Issue]:
    """Loops of operations, from whose later steps next to no gradient comes back to the earlier ones, in a
    model that knows nothing yet: where it does, a memory that fades may be what the task asks for."""
    if not guesses(flow.record):
        return []
    worst: dict[str, ScanRecord] = {}
    for scan in flow.record.parts.scans:
        if scan.faded_share >= most and scan.faded_share > getattr(worst.get(scan.name), "faded_share", 0.0):
            worst[scan.name] = scan
    return [
        Issue(
            layer=scan.name,
            layer_type="Module" if scan.name else flow.record.provenance.model,
            issue_type=IssueType.VANISHING,
            severity=IssueSeverity.MEDIUM,
            description=f"Its loop over {scan.num_steps} steps forgets: at {scan.faded_share:.0%} of them, "
            "the farthest from what is read, the gradient is less than a millionth of what it is at the "
            "others, so they might as well not be there. What each step keeps of its state is too little for "
            "so many.",
            magnitude=1.0 - scan.faded_share,
            recommended_actions=(
                f"Start what {scan.name or 'the model'} multiplies its state by nearer to one: small step "
                "sizes (in a state space layer between 0.001 and 0.1, by the inverse of their softplus), a "
                "bias of 1 or more at a forget gate. See that no later initialisation overwrites it.",
                "Or read more of the steps than the last: their mean, or a target for each.",
            ),
            metrics={"faded_share": scan.faded_share, "num_steps": scan.num_steps},
            evidence=Evidence(roles=Role.ABSORBING),
        )
        for scan in worst.values()
    ]


def deep(flow: Flow, fall: float = 12.0, *, few: int = 4, alike: float = 0.06) -> list[Issue]:
    """A stack of recurrent layers that does not learn: signal and gradient fall together from layer to layer.

    Each gate halves what passes, so a stack of usual initialisation hands on a third a layer, both ways. That
    alone steps may make up for. Where the first layer gets next to nothing of what the last one gets, the
    outputs hardly differ between samples, and the loss stays where it was, they do not.

    Args:
        flow: the record along its wiring.
        fall: by how much the gradient of the weights falls from the last layer to the first.
        few: fewer layers than that are no stack.
        alike: part of the outputs that differs between samples, below which they tell none apart.
    """
    record, known = flow.record, flow.record.knowledge
    if known is None or not record.provenance.optimizer or not guesses(record, 0.98):
        return []
    if not late(record.losses) >= 0.97 * early(record.losses) > 0:
        return []
    levels, varied = list(_levels(flow)), differing(known)
    if not varied <= alike or len(levels) < few:
        return []
    (first, lowest), (last, highest) = levels[0], levels[-1]
    if first != last and first not in flow.wiring.upstream(last):
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        fallen = middle(highest.grad_norm / lowest.grad_norm)
    if not fallen >= fall:
        return []
    layer = flow.layers[first]
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.VANISHING,
            severity=IssueSeverity.MEDIUM,
            description=f"It is the first of {len(levels)} recurrent layers, and gets {1 / fallen:.1e} of "
            f"the gradient that the last one gets; only {varied:.1e} of the outputs differs between "
            "samples, and the loss stays where it was. Each layer hands on but a part of both.",
            magnitude=1.0 / fallen,
            recommended_actions=(
                "Use one or two layers: more seldom help.",
                "Or give each layer a way past it (x = x + layer(x)) and a norm layer before it.",
            ),
            metrics={"num_layers": len(levels), "share_of_last": 1.0 / fallen, "variation": varied},
            evidence=Evidence(roles=Role.ABSORBING),
        )
    ]


def _levels(flow: Flow) -> Iterator[tuple[str, ParameterRecord]]:
    """Yield the input weights of recurrent layers, one after the other, and the first call of each layer."""
    seen = set[str]()
    for node in sorted(flow.layers, key=lambda n: flow.layers[n].order):
        for p in () if flow.layers[node].composite else flow.trainable(node):
            short = p.name.rpartition(".")[2]
            if "weight_ih" in short and not short.endswith("_reverse") and p.name not in seen:
                seen.add(p.name)
                yield node, p
