"""VANISHING along a sequence: layers and loops of operations that forget what came first."""

from __future__ import annotations

from gradflow.detect.actions import forgetful_actions
from gradflow.detect.flow.readings.recurrent_weights import memory
from gradflow.detect.knowledge import guesses
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, Role, ScanRecord


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
