"""Losses that are given what they do not take, or that look at less than the outputs."""

from __future__ import annotations

import itertools
import math

from gradflow.detect.actions import Actions
from gradflow.detect.evidence import heads, last_layers, late
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Issue, IssueSeverity, IssueType, KnowledgeRecord, LayerRecord, Role


def blind_losses(flow: Flow) -> list[Issue]:
    """The last layer of a model whose loss holds no sample against its own target.

    Measured: an operation of the loss in which an output and as many numbers that do not come of it, (N, 1)
    and (N,), are set against each other crosswise, each against all, while the loss is the same to rounding
    where samples get one another's outputs. Or a loss that sees nothing but the mean of outputs that differ.
    Either is met by one answer for all samples.

    Alike and not: losses that compare distributions, or pairs of outputs (both sides come of the outputs); a
    critic's, linear in what it gives; outputs against a table of another length.

    Args:
        flow: the record along its wiring.
    """
    known, ends = flow.record.knowledge, heads(flow)
    if known is None or not ends:
        return []
    if known.crossed and math.isclose(known.shuffled, known.loss, rel_tol=1e-4):
        return [_issue(flow, ends[-1], known, _crossed(known), _crossed_actions(known))]
    if known.by_mean and not pooled_before_squashed(flow):
        text = (
            "Of the outputs, the loss sees nothing but their mean over the samples: the mean for all of them "
            f"costs the same {known.averaged:.3g}."
        )
        return [_issue(flow, ends[-1], known, text, _mean_actions())]
    return []


def _issue(flow: Flow, node: str, known: KnowledgeRecord, text: str, actions: Actions) -> Issue:
    layer = flow.layers[node]
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description=f"{text} Each sample given another one's output, it is {known.shuffled:.4g}, where it is "
        f"{known.loss:.4g}: no sample is held against its own target, and one answer for all is learned.",
        magnitude=1.0,
        recommended_actions=actions,
        metrics={"loss": known.loss, "shuffled": known.shuffled, "averaged": known.averaged},
    )


def _crossed(known: KnowledgeRecord) -> str:
    output, other = known.crossed
    return (
        f"The loss sets an output of shape {output} against {other}, which broadcasts: each number of the "
        "one against every number of the other."
    )


def _crossed_actions(known: KnowledgeRecord) -> Actions:
    output, other = known.crossed
    return (
        f"Bring both to one shape before they are compared: target.view_as(output), or output.squeeze(-1); "
        f"{output} and {other} are as many numbers, and another shape.",
        "Let warnings through: PyTorch's own losses warn of it.",
    )


def _mean_actions() -> Actions:
    return (
        "Take the error of each sample first, and the mean over the samples of that: "
        "(output - target).square().mean(), not (output.mean() - target.mean()).square().",
    )


_SAID = {
    "probabilities as scores": (
        IssueType.SATURATION,
        "A cross entropy is given probabilities: it makes some of scores itself, and these lie no further "
        "apart than 1, so it cannot fall to zero, and what the first softmax hands back is small.",
        "Give it the scores as they are: leave out the softmax at the end of the model (or use log_softmax "
        "there, and nll_loss).",
    ),
    "probabilities as logarithms": (
        IssueType.SATURATION,
        "What takes logarithms of probabilities (nll_loss, kl_div, ctc_loss) is given probabilities: what it "
        "asks for is not what they should be, and a right answer is worth no more than 1.",
        "Use log_softmax in the place of softmax at the end of the model.",
    ),
    "scores as logarithms": (
        IssueType.EXPLODING,
        "What takes logarithms of probabilities (nll_loss, kl_div, ctc_loss) is given numbers above zero, "
        "which are no such logarithms: the loss has no lower bound, and the scores run away with it.",
        "Put a log_softmax over the classes at the end of the model; cross_entropy has one of its own.",
    ),
    "an error with a minus": (
        IssueType.UNSTABLE,
        "The loss is an error (a cross entropy, a squared error) with a minus before it: it is the lower the "
        "more wrong the outputs are, and has no lower bound.",
        "Take the minus away: what an optimizer makes small is the error itself. Of nll_loss the minus is "
        "in it already.",
    ),
    "probabilities over samples": (
        IssueType.BOTTLENECK,
        "The softmax runs over the samples of the batch: the probabilities of one class add up to one over "
        "the samples, and not those of one sample over the classes. Samples compete with one another, and a "
        "right answer for all is out of reach.",
        "Take it over the classes: softmax(dim=-1), log_softmax(dim=-1); cross_entropy has one of its own.",
    ),
}


def misgiven_losses(flow: Flow, kind: IssueType) -> list[Issue]:
    """The last layer of a model whose loss is given what it does not take by its meaning.

    Where a softmax too many is a module of its own, that module: it is what has to go.

    Args:
        flow: the record along its wiring.
        kind: of issue.
    """
    known, ends = flow.record.knowledge, heads(flow)
    if known is None or not ends:
        return []
    head, softmax = flow.layers[ends[-1]], _softmax_of(flow, ends[-1])
    return [
        Issue(
            layer=(layer := softmax if name.startswith("probabilities") else head).name,
            layer_type=layer.type,
            issue_type=kind,
            severity=IssueSeverity.HIGH if kind in _WITHOUT_END else IssueSeverity.MEDIUM,
            description=f"{text} The loss is {known.loss:.3g}; zeros cost {known.silent:.3g}.",
            magnitude=1.0,
            recommended_actions=(action,),
            metrics={"misgiven": name, "loss": known.loss},
            evidence=Evidence(roles=Role.OFF_SCALE if kind is IssueType.EXPLODING else ()),
        )
        for name, (of, text, action) in _SAID.items()
        if name in known.misgiven and of is kind
    ]


_NO_CHOICE = "scores masked but for one"


def has_no_choice(flow: Flow) -> bool:
    """Whether masks leave the softmaxes of a loss one alternative each, and the loss has come to zero."""
    known = flow.record.knowledge
    return known is not None and _NO_CHOICE in known.misgiven and late(flow.record.losses) == 0


def choiceless(flow: Flow, kind: IssueType, alike: float = 0.3) -> list[Issue]:
    """The last layer of a model of whose scores masks leave but one, the right one, to choose among.

    A contrastive loss that leaves out what is too like the right answer leaves out every wrong one where all
    are alike: the loss is zero, whatever the scores are, and nothing brings them apart. That is a BOTTLENECK,
    at the layer whose rows are alike. Where none is, the mask itself is at fault: DEAD, at the last layer.
    Alike and not: a model whose scores are right by a wide margin; masks that leave a few rows no choice.

    Args:
        flow: the record along its wiring.
        kind: of issue.
        alike: variation of a layer's output below which its rows are alike: of rows whose cosines are c it is
            the root of 1 - c, and masks leave out cosines above 0.9 and more.
    """
    if not has_no_choice(flow):
        return []
    seen = {node: late(flow.layers[node].output_variation) for node in last_layers(flow)}
    same = [node for node, value in seen.items() if value < alike]
    if not seen or bool(same) is not (kind is IssueType.BOTTLENECK):
        return []
    node = min(same, key=lambda n: seen[n]) if same else max(seen, key=lambda n: flow.layers[n].order)
    layer = flow.layers[node]
    why = (
        f" What this layer gives is much the same for all samples ({seen[node]:.1%} of it differs), so that "
        "a mask of what is too like the right answer leaves out every wrong one."
    )
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=kind,
            severity=IssueSeverity.HIGH,
            description="Masks leave the softmax of the loss nothing but the right alternative, so the loss "
            "is exactly zero whatever the scores are, and no gradient comes back." + (why if same else ""),
            magnitude=1.0,
            recommended_actions=_choice_actions(layer.name) if same else _mask_actions(),
            metrics={"variation": seen[node], "loss": late(flow.record.losses)},
            evidence=Evidence(roles=Role.BLOCKING),
        )
    ]


def _choice_actions(layer: str) -> Actions:
    """For vectors so alike that a mask of likeness takes all of them."""
    return (
        f"Take away what all samples have in common in {layer}: subtract the mean of what enters it over the "
        "samples, or put a norm over the batch behind it.",
        "Mask by identity (the same item, the same label) and not by likeness, or raise the likeness from "
        "which it masks until most of the wrong alternatives stay.",
    )


def _mask_actions() -> Actions:
    """For scores that a mask takes but for one."""
    return (
        "Print the mask of one batch: how many alternatives it leaves each row. Look for one that is the "
        "wrong way round, or that masks by a label which all samples of a batch share.",
    )


def _softmax_of(flow: Flow, node: str) -> LayerRecord:
    """The softmax that takes what the last layer gives, where it is a module; else that layer."""
    behind = [flow.layers[n] for n in flow.wiring.after(node) if n in flow.layers]
    return next((layer for layer in behind if "softmax" in layer.type.lower()), flow.layers[node])


_WITHOUT_END = (IssueType.EXPLODING, IssueType.UNSTABLE)
_RANGES = {
    "sigmoid": "0 to 1",
    "hardsigmoid": "0 to 1",
    "tanh": "-1 to 1",
    "hardtanh": "-1 to 1",
    "relu": "above 0",
    "softplus": "above 0",
    "exp": "above 0",
    "clamp": "as clamped",
}


def out_of_reach(flow: Flow, kind: IssueType, left: float = 0.15, met: float = 0.03) -> list[Issue]:
    """The last layer of a model that ends in an activation within whose range the loss cannot be met.

    Measured: the lowest loss of any outputs, and of those within the range of the activation, found by moving
    outputs themselves downhill: no weights come into it.

    Args:
        flow: the record along its wiring.
        kind: of issue: what a rectifier cannot give leaves it off, DEAD; of others it is a SATURATION.
        left: of what guesses cost, the least that outputs within the range must leave.
        met: of the same, the most that free outputs may leave; above it, targets are at odds with each other.
    """
    known, ends = flow.record.knowledge, heads(flow)
    if known is None or not ends or not known.floors or not known.ignorance > 0:
        return []
    layer, end = flow.layers[ends[-1]], _end_of(flow, ends[-1])
    if math.prod(layer.shape) not in map(math.prod, known.shapes):  # the model gives what is made of it
        return []
    within, free = known.floors.get(_RANGES.get(end, "?"), math.nan), known.floors.get("", math.nan)
    if kind is not (IssueType.DEAD if end == "relu" else IssueType.SATURATION):
        return []
    if not (within >= left * known.ignorance and -1e-6 * known.ignorance <= free <= met * known.ignorance):
        return []
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=kind,
            severity=IssueSeverity.HIGH if within >= 2 * left * known.ignorance else IssueSeverity.MEDIUM,
            description=f"The {end} at the end of the model gives numbers {_RANGES[end]}, and no outputs "
            f"within that range bring the loss below {within:.3g}; free ones would bring it to {free:.2g}, "
            f"and to know nothing costs {known.ignorance:.3g}. What is asked for is out of its reach.",
            magnitude=within / known.ignorance,
            recommended_actions=(
                f"Leave out the {end} behind {layer.name}: a cross entropy takes scores as they are, and a "
                "regression whatever its targets are.",
                "Or bring the targets into its range.",
            ),
            metrics={"floor": within, "free_floor": free, "ignorance": known.ignorance, "op": end},
        )
    ]


def pooled_before_squashed(flow: Flow, wrong: float = 0.1, slope: float = 0.01) -> list[Issue]:
    """The last layer of a model whose loss squashes the sum of all samples, not each of them.

    A log-sigmoid of the sum of all gaps is flat once the sum is large, and lets nothing back for the samples
    whose own gap has the wrong sign. Alike and not: a squashed sum in which all samples agree; one that is
    flat beside another term that still teaches.

    Args:
        flow: the record along its wiring.
        wrong: the least share of samples whose own part has the other sign.
        slope: of the loss, or what zeros cost, the most that it could change by all that the outputs are.
    """
    known, ends = flow.record.knowledge, heads(flow)
    if known is None or not ends or not known.against >= wrong:
        return []
    layer = flow.layers[ends[-1]]
    size = float(layer.output_rms[-1]) * math.sqrt(max(layer.num_elements[-1], 1))
    if not float(flow.grad[ends[-1]][-1]) * size <= slope * max(abs(known.silent), abs(known.loss)):
        return []
    return [
        Issue(
            layer=layer.name,
            layer_type=layer.type,
            issue_type=IssueType.SATURATION,
            severity=IssueSeverity.HIGH,
            description="The loss adds its outputs up over all samples before it squashes them, and sits at "
            f"the flat end of what it squashes with: {known.against:.0%} of the samples are on the other "
            f"side, and are taught nothing (gradient {flow.grad[ends[-1]][-1]:.2g}).",
            magnitude=known.against,
            recommended_actions=(
                "Squash each sample's number first, and take the mean of that: F.logsigmoid(gap).mean(), not "
                "F.logsigmoid(gap.sum()).",
            ),
            metrics={"against": known.against, "loss": known.loss},
        )
    ]


def _end_of(flow: Flow, node: str) -> str:
    """The function that takes what the last layer gives: an operation, or a module without parameters."""
    ops = itertools.dropwhile(lambda op: op in ("mul", "div"), flow.wiring.ops_after(node))
    behind = [flow.layers[n] for n in flow.wiring.after(node) if n in flow.layers]
    modules = [layer.type.lower() for layer in behind if not layer.composite]
    return (modules or [*ops, ""])[0].rstrip("_")
