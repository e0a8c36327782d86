"""What to do about activations and gates that are at their ends."""

from __future__ import annotations

import math

from gradflow.detect.actions import Actions, initialisation
from gradflow.detect.evidence import early, late, row_gain
from gradflow.detect.knowledge import INFORMED, falls, guesses, knows
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import ActivationRecord

_CROSS_ENTROPIES = {"cross_entropy", "log_softmax", "nll_loss"}
_CHOICES = {"log", "gather", "index"}  # what makes of probabilities that of an action

_TAKE_SCORES = (
    "softmax",
    "nll_loss",
    "cross_entropy_loss",
    "with_logits",
    "log_sigmoid",
    "softplus",
    "sigmoid",
)
WANTED = (
    " The loss asks for these ends: what is at them is pulled further out, and no other squashing follows."
)


def is_wanted(flow: Flow, activation: ActivationRecord, share: float = 0.9) -> bool:
    """Whether the loss wants a sigmoid or tanh at its ends, by `share` of its pull, and is given them as they
    are: what takes scores would ask for more than any end.

    Of one that weights take, half of the pull leads outwards by chance: there half of the excess is enough,
    in a run whose loss falls. But where it was at its ends in the first steps already, it was put there by
    the scale of what enters, and which end each sample is at was chance: an untrained critic then wants all
    actions one way or the other, and may well have more of that half.
    """
    ends = [e for e in flow.record.parts.ends if (e.layer, e.op) == (activation.layer, activation.op)]
    hidden = flow.wiring.known and not flow.ends_weightless(node_name(activation.layer))
    began = early(activation.saturated_share) >= 0.5
    least = 0.5 + (share - 0.5) / 2 if hidden and not began else share
    if not flow.wiring.known or not ends or not all(e.wanted_share >= least for e in ends):
        return False
    missed = late(flow.record.losses) >= 0 and guesses(flow.record)
    if missed and flow.ends_weightless(node_name(activation.layer)):
        return False  # what is asked for may be out of its reach
    if hidden:
        return falls(flow.record)
    behind = [flow.wiring.nodes[n].type for n in flow.wiring.downstream(node_name(activation.layer))]
    taking = [kind for kind in behind if any(word in kind.lower() for word in _TAKE_SCORES)]
    if activation.functional and activation.op in taking:
        taking.remove(activation.op)
    return not taking


STEEP = (
    " But the loss takes derivatives of the model in what enters it, and weights that start so large, on "
    "inputs of usual size, make it as steep there as a fast solution is."
)


def is_steep(flow: Flow, activation: ActivationRecord, feeder: str, *, usual: float = 3.0) -> bool:
    """Whether a tanh or sigmoid is at its ends because the first layer of a network of a differential
    equation starts with large weights, for a solution that changes fast.

    Each of its units then bends at a place of its own, and is flat elsewhere; the layers behind learn of the
    steps that they make. Inputs that are large, and weights that the steps have made so, are no such design,
    nor is one in which no unit bends for any sample.

    Args:
        flow: the record along its wiring.
        activation: what is at its ends.
        feeder: node of the layer before it.
        usual: rms of inputs and of rows of weights up to which they are of usual size.
    """
    layer = flow.layers.get(feeder)
    if layer is None or not flow.wiring.is_first(feeder) or not len(layer.input_rms):
        return False
    first = row_gain(flow, feeder, at=lambda norms: float(norms[0]))
    if not (first > usual and late(layer.input_rms) <= usual and activation.always_saturated < 0.9):
        return False
    uses = {n for n, other in flow.layers.items() if other.module == layer.module}
    behind = {m for n in uses for m in flow.wiring.downstream(n)}
    return any(flow.wiring.nodes[n].type.endswith(f"{activation.op}_backward") for n in behind)


def is_right(flow: Flow, activation: ActivationRecord, share: float = 0.9) -> bool:
    """Whether what is at the ends of a last sigmoid or tanh is where the loss has it, by `share` of its pull,
    in a model that knows: most pixels of a mask are sure, and right, while its border still teaches."""
    ends = [e for e in flow.record.parts.ends if (e.layer, e.op) == (activation.layer, activation.op)]
    if not ends or not all(e.wanted_share >= share for e in ends):
        return False
    return knows(flow.record, INFORMED) and flow.ends_weightless(node_name(activation.layer))


def passed_by(flow: Flow, activation: ActivationRecord) -> bool:
    """Whether a sigmoid or tanh in the loss is a weight on what else the loss makes of the same numbers, in a
    run whose loss falls: its slope is not the only way back, and what comes back by another does its work.

    A gate that is shut hands nothing back past itself either, and the loss stands.
    """
    node = node_name(activation.layer)
    if not (activation.functional and activation.op in ("sigmoid", "tanh") and flow.wiring.known):
        return False
    if not flow.ends_weightless(node) or not falls(flow.record):
        return False
    todo, seen = [*flow.wiring.succs.get(node, ())], set[str]()
    while todo:
        name = todo.pop()
        if name in seen or flow.wiring.nodes[name].type == activation.op:
            continue
        seen.add(name)
        todo += flow.wiring.succs.get(name, ())
    return flow.wiring.loss in seen


def still_heard(flow: Flow, node: str, op: str, feeder: str, entering_rms: float) -> bool:
    """Whether a probability that the model gives is at its end, and the loss still hears what enters it.

    The slope of a logarithm is the larger the nearer its argument is to zero, and makes up for the one that
    the sigmoid has lost, until the probability is exactly zero or one: as what enters changes by its size,
    the loss changes by a tenth of itself and more, to first order.

    Args:
        flow: the record along its wiring.
        node: of the activation.
        op: it.
        feeder: node of the layer before it.
        entering_rms: of what enters it.
    """
    layer, losses = flow.layers.get(feeder), flow.record.losses
    logarithm = {name.rstrip("_") for name in flow.wiring.ops_after(node)} & _LOGARITHMS
    if op not in ("sigmoid", "softmax") or layer is None or not logarithm:
        return False
    if not flow.ends_weightless(node):
        return False
    sizes = layer.num_elements[layer.num_elements > 0]
    entering = entering_rms * math.sqrt(float(sizes[-1])) if len(sizes) else math.nan
    return bool(late(flow.grad[feeder]) * entering >= 0.1 * abs(late(losses)) > 0)


_LOGARITHMS = frozenset(("log", "log2", "log10", "binary_cross_entropy"))
MADE_UP = (
    " But the loss takes its logarithm, whose slope makes up for it: what comes back is of the size of the "
    "loss, the loss falls, and the outputs fit their own samples."
)


def saturation_actions(flow: Flow, activation: ActivationRecord, feeder: str) -> Actions:
    """For a saturated activation."""
    gain = row_gain(flow, node_name(feeder)) if node_name(feeder) in flow.layers else math.nan
    entering = late(activation.input_rms)
    actions: list[str] = []
    if activation.kind == "softmax":
        joint = activation.functional and node_name(activation.layer) not in flow.layers
        last = flow.wiring.is_last(node_name(activation.layer))
        if joint or (activation.functional and "attn" in activation.layer.lower()):
            actions.append(
                "Divide the attention scores by sqrt(head dimension), or normalise queries and keys."
            )
        elif last:
            ops = set(flow.wiring.ops_after(node_name(activation.layer))) - {activation.op}
            if not ops or (ops & _CROSS_ENTROPIES and "mul" not in ops):
                actions.append(
                    "If a cross-entropy follows, leave the softmax out: it takes scores, and applies its own."
                )
            if not ops or ops & _CHOICES:
                actions.append(
                    "If it is a policy: a stronger entropy bonus, smaller steps, normalised advantages."
                )
        if entering > 10:
            actions.append(
                f"What enters has rms {entering:.3g}: scale it down (a temperature, smaller weights)."
            )
    else:
        entered = late(flow.layers[node_name(feeder)].input_rms) if math.isfinite(gain) else math.nan
        if (bias := _bias_rms(flow, node_name(feeder))) > 0.7 * entering:
            actions.append(
                f"What enters the {activation.op} is the bias of {feeder}, whose rms is {bias:.3g}: start it "
                f"at zero, nn.init.zeros_({feeder}.bias)."
            )
        elif gain < 3 <= entered:
            actions.append(
                f"Standardise what enters {feeder}, which has rms {entered:.3g}{_pixels(entered)}, or put a "
                f"norm layer before the {activation.op}: the weights of {feeder} are of a usual size (their "
                f"rows have rms {gain:.2g})."
            )
        elif math.isfinite(gain) and gain < 3:
            actions.append(
                f"The rows of the weights of {feeder} have rms {gain:.2g} (0.6 to 1.4 is usual), and what "
                f"enters it {entered:.3g}, yet the {activation.op} gets {entering:.3g}: standardise what "
                f"enters {feeder}{_pixels(entered)}, or put a norm layer before the {activation.op}."
            )
        elif math.isfinite(gain):
            drawn = initialisation(flow, node_name(feeder))
            actions.append(
                f"The rows of the weights of {feeder}, which feeds it, have rms {gain:.2g} (0.6 to 1.4 is "
                f"usual): {drawn}."
            )
        if activation.op == "squash":
            actions.append(
                f"What is squashed has rms {entering:.3g}, and its length is one whatever it says: sum "
                "votes that are smaller (weights of a hundredth), or divide by their number."
            )
        elif activation.op == "sigmoid" and _ends_a_loss(flow, node_name(activation.layer)):
            actions.insert(
                0,
                "The loss is that sigmoid itself, which is flat where it is most wrong: take its logarithm, "
                "-F.logsigmoid(x).mean().",
            )
        elif flow.wiring.is_last(node_name(activation.layer)):
            # If neither weights nor what enters them are large, the loss asks for what the bounds forbid.
            began = row_gain(flow, node_name(feeder), at=lambda norms: float(norms[0]))
            usual = gain < 10 and entered < 10 and not began >= 3
            actions.insert(0 if usual else len(actions), _of_an_output(activation.op))
        elif not (gain < 3 and entered >= 10):  # large inputs would only be handed on
            actions.append(f"Replace the {activation.op} by ReLU or GELU.")
    return tuple(actions) or ("Scale down what enters it.",)


def _of_an_output(op: str) -> str:
    if op not in ("sigmoid", "softmax"):
        return (
            f"The {op} is an output. Where no bound is asked for, end the model without an activation; where "
            "it bounds a value, keep targets inside the bounds."
        )
    return (
        "It is an output. Where it stands for a probability, leave it out of the model and compute the loss "
        "on what enters it (BCEWithLogitsLoss, and other losses that apply a sigmoid of their own: after "
        "two, no score is below a half). Where it bounds a value, keep targets inside the bounds."
    )


def _ends_a_loss(flow: Flow, node: str) -> bool:
    """Whether nothing but picking, differences and means stands beside a sigmoid behind a layer."""
    ops = set(flow.wiring.ops_after(node))
    return ops - _PLAIN == {"sigmoid"} and "mean" in ops


_PLAIN = {"view", "reshape", "select", "slice", "squeeze", "unsqueeze", "sub", "rsub", "neg", "mean"}


def _bias_rms(flow: Flow, node: str) -> float:
    """Return the rms of a layer's bias; 0 where it has none."""
    biases = [p for p in flow.parameters_of(node) if p.name.endswith("bias") and len(p.shape) == 1]
    return max((late(p.norm) / math.sqrt(p.num_elements) for p in biases), default=0.0)


def _pixels(rms: float) -> str:
    """Return the usual cure of inputs that look like bytes."""
    return " (divide pixels by 255)" if 50 <= rms <= 255 else ""


def gate_actions(layer: str, entering: float) -> Actions:
    """For a recurrent layer whose input shuts or opens all of its gates."""
    return (
        f"Standardise what enters {layer or 'it'} (rms {entering:.3g}): subtract the mean, divide by the "
        "standard deviation, feature by feature.",
        "Or put a norm layer before it.",
    )
