"""What to change: recommended actions that fit the layer, its activation, its weights and the optimizer.

Each function returns the sentences for one situation, the most likely cure first.
"""

from __future__ import annotations

import math
import re

from gradflow.detect.evidence import activations_of, late, row_gain, swallowing_norms
from gradflow.detect.view import Flow
from gradflow.detect.wiring import layer_name, node_name
from gradflow.records import ActivationRecord, NumericalRecord

Actions = tuple[str, ...]

_RAW = 300.0  # rms of inputs in a unit of their own, beyond bytes: dates, prices, counts
_BOUNDED = ("sigmoid", "tanh", "hardtanh", "hardsigmoid")


def initialisation(flow: Flow, node: str) -> str:
    """Return the call that initialises a layer's weights for the activation it feeds.

    Xavier before a bounded activation or none, Kaiming before a rectifier.
    """
    weight = f"{layer_name(node) or 'model'}.weight"
    if flow.is_norm(node):
        return f"nn.init.ones_({weight})"
    ops = {a.op for a in activations_of(flow, node)}
    if ops & set(_BOUNDED):
        op = next(o for o in _BOUNDED if o in ops)
        gain = f", gain=nn.init.calculate_gain({op!r})" if op in ("sigmoid", "tanh") else ""
        return f"nn.init.xavier_uniform_({weight}{gain})"
    behind = {flow.layers[n].type.lower() for n in flow.wiring.after(node) if n in flow.layers}
    if any(kind in ("rectifier",) for kind in {a.kind for a in activations_of(flow, node)}) or behind & {
        "gelu", "silu", "leakyrelu", "elu",
    }:  # fmt: skip
        return f"nn.init.kaiming_normal_({weight}, nonlinearity='relu')"
    return f"nn.init.xavier_uniform_({weight})"


def vanishing_actions(flow: Flow, node: str, *, absorber: str, per_layer: float) -> Actions:
    """For a layer that gets too little, or that hands back too little."""
    actions: list[str] = []
    at = absorber or node
    gain = row_gain(flow, at)
    if flow.is_norm(at) and absorber:
        actions.append(
            f"Check the arguments of {layer_name(at)}: a large eps (the second argument of BatchNorm is eps, "
            "not a width) or a tiny weight makes a norm layer shrink what it should normalise."
        )
    if math.isfinite(gain) and gain < 0.3:
        alike = _small_alike(flow, at)
        more = f" (and of {alike} more layers like it)" if alike else ""
        actions.append(
            f"The rows of the weights of {layer_name(at)}{more} have rms {gain:.1e}, a usual initialisation "
            f"has 0.6 to 1.4: {initialisation(flow, at)}{', and so on' if alike else ''}. Where a layer "
            f"draws its weights by a rule of its own, multiply them by about {1 / gain:.2g}."
        )
    saturating = sorted({a.op for n in (node, at) for a in activations_of(flow, n) if a.op in _BOUNDED})
    if saturating:
        keeps = (
            "at most a quarter of the gradient" if "sigmoid" in saturating else "less the larger its input is"
        )
        kind = "sigmoid" if "sigmoid" in saturating else saturating[0]
        actions.append(
            f"Replace the hidden {'/'.join(saturating)} by ReLU or GELU: a {kind} keeps {keeps}, and a "
            "saturated one nothing."
        )
    swallowed = swallowing_norms(flow.record)
    if swallowed and not absorber:
        actions.append(
            f"Give {swallowed[0].name} an epsilon of 1e-5: its own is more than what it guards, so it does "
            "not normalise."
        )
    elif flow.norms and not absorber and flow.record.provenance.optimizer:
        rates = ", ".join(f"{r:.3g}" for r in flow.record.provenance.learning_rates)
        actions.append(
            "If the norms stand on the skip path (post-norm), move them into the branch (pre-norm), or warm "
            f"up {flow.record.provenance.optimizer} (learning rate {rates}): large first steps make "
            "post-norm cut."
        )
    if not flow.norms:
        actions.append("Add a norm layer between the layers, or a skip connection round each pair of them.")
        if not (absorber or saturating or gain < 0.3) and per_layer < 0.8:
            actions.append(f"Or start each to hand on what it gets: {initialisation(flow, at)}, and so on.")
    return tuple(actions) or ("Add skip connections round the layers that lose the gradient.",)


def _small_alike(flow: Flow, node: str) -> int:
    """Return how many other layers stand at the same place of other blocks, with weights as small."""
    own = re.sub(r"\d+", "#", layer_name(node))
    others = {flow.layers[n].module for n in flow.layers if re.sub(r"\d+", "#", layer_name(n)) == own}
    small = [m for m in others if row_gain(flow, node_name(m)) < 0.3]
    return len(small) - (flow.layers[node].module in small)


def forgetful_actions(layer: str, rate: float) -> Actions:
    """For a plain recurrent layer that keeps nothing over its sequence."""
    return (
        f"Use nn.GRU or nn.LSTM for {layer}: their gates can carry a state over many steps.",
        f"Or start its recurrent weights orthogonal, nn.init.orthogonal_({layer or 'rnn'}.weight_hh_l0): "
        f"they keep "
        f"1.0 a step, not {rate:.2g}.",
        "Or let the loss read every step (a mean over time, attention), or shorten the sequence.",
    )


def exploding_actions(flow: Flow, node: str, *, calls: int) -> Actions:
    """For a layer that amplifies."""
    actions: list[str] = []
    gain = row_gain(flow, node, lambda norms: float(norms[0]))  # what steps enlarge is no start to be mended
    entry, entering = _largest_input(flow)
    if entering >= _RAW:
        actions.append(f"Standardise what enters {entry} (rms {entering:.3g}), column by column.")
    if calls > 1:
        actions.append(
            f"{layer_name(node)} runs {calls} times in a step, and its growth is raised to that power: "
            f"gate the "
            "state (a GRU's update), normalise it at each step, or truncate the back-propagation."
        )
    if math.isfinite(gain) and gain >= 2:
        actions.append(
            f"The rows of its weights have rms {gain:.3g}, a usual initialisation has 0.6 to 1.4: "
            f"{initialisation(flow, node)}."
        )
    if not flow.norms:
        actions.append("Put a norm layer behind it, so that its scale cannot multiply.")
    rates = ", ".join(f"{r:.3g}" for r in flow.record.provenance.learning_rates)
    lower = f", and lower the learning rate of {flow.record.provenance.optimizer} ({rates})" if rates else ""
    actions.append(f"Until then, clip: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0){lower}.")
    return tuple(actions)


def _largest_input(flow: Flow) -> tuple[str, float]:
    """Return the layer that takes the largest numbers of a batch, and their rms in the first step."""
    first = [n for n in flow.layers if flow.wiring.is_first(n) and not flow.is_table(n)]
    known = [
        (layer_name(n), float(flow.layers[n].input_rms[0])) for n in first if len(flow.layers[n].input_rms)
    ]
    return max((k for k in known if math.isfinite(k[1])), key=lambda k: k[1], default=("", 0.0))


def dominance_actions(layer: str, rival: str, ratio: float) -> Actions:
    """For a head that swamps another."""
    return (
        f"Bring the targets of {layer} to the scale of its outputs (normalise returns or labels).",
        f"Weigh its loss by about {1 / ratio:.1e}, or use a Huber loss, whose gradient is bounded.",
        f"Or detach the trunk from {layer}, so that {rival} alone shapes it.",
    )


def far_actions(layer: str, rates: tuple[float, ...]) -> Actions:
    """For a head whose targets are far from its outputs."""
    rate = f" than {max(rates):.3g}" if rates else ""
    return (
        f"Bring the targets of {layer or 'the model'} to the scale of its outputs: standardise them, or "
        "train on their logarithm.",
        "Use a Huber or an absolute error, whose gradient does not grow with the distance.",
        f"Or a much lower learning rate{rate}, with clipping, until the output has found its scale.",
    )


def zero_actions(flow: Flow, node: str, why: str, at: str) -> Actions:
    """For a layer whose gradient is exactly zero."""
    here = layer_name(at) or layer_name(node)
    if why == "rectifier":
        if flow.is_norm(at or node) and late(flow.layers[at or node].output_rms) == 0:
            return _nothing_to_normalise(flow, at or node)
        bias = f"give {here} a bias of zero or a small positive one"
        fire = f"et some units of {here} fire: {initialisation(flow, at or node)}, and {bias}."
        if flow.wiring.known and flow.ends_weightless(at or node):
            return (
                "Leave the rectifier out at the output, or use softplus or LeakyReLU there: which of a few "
                "outputs fire is chance at any start, and one that does not can never learn to.",
                f"Or l{fire}",
                *_rate(flow),
            )
        return (
            f"L{fire}",
            "Or use LeakyReLU, ELU or GELU there, which pass a gradient below zero.",
            *_rate(flow),
        )
    if why == "one alternative":
        return (
            f"{here} has one output, and a softmax over one number is always 1: use a sigmoid with "
            "BCEWithLogitsLoss, or two outputs with CrossEntropyLoss.",
        )
    if why == "one feature":
        norm = next((layer_name(n) for n in flow.wiring.after(at) if flow.is_norm(n)), "the norm")
        return (
            f"{norm} normalises over one feature, and gives its bias whatever comes in: leave the norm out "
            "(nn.Identity()), or normalise where there are several features.",
        )
    if why == "zero factor":
        return (
            f"Look for a factor of exactly zero between {layer_name(node)} and the loss, and print it: the "
            "weight of a term, a beta, a mask or a gate that is zero for every sample.",
        )
    silent = why not in ("zero weight", "zero input") and late(flow.layers[node].output_rms) == 0
    factors = (
        f"If two factors of a product both start at zero ({layer_name(node) if silent else here} and its "
        "partner), start one of them at random."
    )
    given = bool(flow.record.provenance.optimizer)
    design = "If it is a zero initialisation by design, give it " + (
        "more steps of the optimizer." if given else "a few steps of the optimizer: pass optimizer=."
    )
    name = layer_name(node)
    if why == "zero input" and not _starts_at_zero(flow, node):
        return (
            f"Look at what is made of the weights of {name} before they are used: a round or a sign has a "
            "derivative of zero: use a straight-through estimate, w + (w.round() - w).detach().",
            factors,
        )
    if why in ("zero weight", "zero input"):
        return factors, design
    if silent:
        return factors, f"Or look at what stands behind {name}: a comparison has a derivative of zero."
    where = f"between {name} and {here}" if here != name else f"behind {name or 'the model'}"
    return (
        f"Look at what stands {where}: a sign, a round, a comparison or a hard bound has a derivative of "
        "zero.",
    )


def _nothing_to_normalise(flow: Flow, node: str) -> Actions:
    """For a norm that gives exactly zero: what enters it is one number, or its own weight is zero."""
    here = layer_name(node)
    feeders = [layer_name(n) for n in flow.wiring.before(node) if n in flow.layers and flow.parameters_of(n)]
    before = feeders[0] if feeders else "the layer before it"
    return (
        f"See what {before} hands to {here}: weights that are zero, masked or pruned away give one number "
        f"all over, and nothing is left of it when its mean is taken off. Give {before} weights again: draw "
        "them anew, or prune each layer by a share of its own.",
        f"If it is {here} whose weight is zero: nn.init.ones_({here}.weight).",
    )


def _starts_at_zero(flow: Flow, node: str) -> bool:
    """Whether what enters a layer is zero, or a parameter in it started there."""
    nothing = late(flow.layers[node].input_rms) == 0 or math.isnan(late(flow.layers[node].input_rms))
    return nothing or any(len(p.norm) and p.norm[0] == 0 for p in flow.parameters_of(node))


def rectifier_actions(flow: Flow, activation: ActivationRecord, share: float) -> Actions:
    """For a rectifier with units that never fire."""
    node = node_name(activation.layer)
    before = node if activation.functional else next(iter(flow.wiring.before(node)), node)
    return (
        f"Initialise what feeds it anew: {initialisation(flow, before)}, bias zero.",
        "Use LeakyReLU, ELU or GELU there: they pass a gradient below zero, so units can come back.",
        *_rate(flow),
    )


def _rate(flow: Flow) -> Actions:
    rates = flow.record.provenance.learning_rates
    if not rates:
        return ("If it died in training: a lower learning rate, or a warm-up.",)
    return (f"If it died in training: a learning rate below {max(rates):.3g}, or a warm-up.",)


def numerical_actions(birth: NumericalRecord | None) -> Actions:
    """For a NaN or an Inf, by the operation that bore it."""
    if birth is None:
        return ("Look at the loss: a division, log, sqrt or exp at the edge of its domain.",)
    # An infinity that enters was asked for, as a mask is: one that was born is told instead.
    entered = (abs(x) for x in (birth.input_min, birth.input_max) if math.isfinite(x))
    op, largest = birth.op.lower(), max(entered, default=0.0)
    if birth.phase == "input":
        return ("Clean the input: torch.nan_to_num, or drop the samples that hold a NaN.",)
    if birth.phase == "parameter":
        return ("Its parameters are broken before the step: look at the step, or the checkpoint, before.",)
    if largest > _BEYOND:
        return (
            f"{birth.op} is not at fault: what enters it has grown to {largest:.1e}. See what lets it grow.",
        )
    if op.startswith("log") and "softmax" not in op:
        return _log_actions(birth)
    for word, actions in _CURES.items():
        if word in op:
            return actions
    return (
        f"Keep the arguments of {birth.op} inside its domain: clamp them before it, not after it.",
        "Run the model in float32 there, if it runs in half precision.",
    )


_BEYOND = 1e18  # its square leaves the range of float32


def _log_actions(birth: NumericalRecord) -> Actions:
    """For the logarithm of what is not above zero."""
    last = "A clamp, log(x.clamp(min=1e-8)), keeps it finite, and gives no gradient below the bound."
    if birth.input_min < 0:
        return (
            f"What enters the logarithm goes down to {birth.input_min:.3g}: see which formula makes it, and "
            "that its argument is inside the formula's range: 1 - a**2 of an action before it is scaled "
            "beyond 1, 1 - p of a probability.",
            "Where it is a layer's output: make it positive where it is made, F.softplus(x) + 1e-4, or let "
            "the layer give the logarithm itself.",
            last,
        )
    if birth.input_max > 1.001:
        return (
            f"What enters holds zeros beside values up to {birth.input_max:.3g}. Where they stand for what "
            "is missing, leave them out before the logarithm, torch.where(valid, x, 1).log() or x[valid]: a "
            "mask that is multiplied on behind it makes NaN of -inf times zero.",
            last,
        )
    return (
        "What enters is exactly zero, a probability that was rounded away: compute the loss on the logits "
        "(logsigmoid, log_softmax, BCEWithLogitsLoss).",
        last,
    )


_CURES: dict[str, Actions] = {
    "sqrt": ("The slope of a square root at zero is infinite: torch.sqrt(x + 1e-8), with the constant "
    "inside.",
             "Where a mask or where() hides the bad branch: make its argument safe before the root."),
    "norm": ("A norm of zeros has no derivative: add a small constant inside, or start from values not all "
    "zero.",),
    "softmax": ("A row that is masked throughout has no softmax: keep one key, or drop the row.",
                "Fill the mask with a large negative number, not -inf, if such rows can occur."),
    "attention": ("A row that is masked throughout has no softmax: keep one key, or drop the row.",),
    "exp": ("Clamp the argument before exp (88 is the limit in float32, 11 in float16).",
            "Bound what produces it: a log-variance by clamp(-20, 8), a log-ratio by a cap."),
    "div": ("Guard the denominator: / (x + 1e-8); where it is a length, inside of its root, "
            "((x * x).sum(dim) + 1e-8).sqrt(); where it is a count, n.clamp(min=1).",
            "Where a mean runs over a mask: let an empty mask give zero."),
    "mean": ("The mean of nothing is NaN: guard for an empty selection.",),
    "pow": ("A power below 1 has an infinite slope at zero: add a small constant to the base.",),
    "acos": ("Clamp the argument to inside (-1, 1), by 1e-7.",),
    "where": ("where() hides a bad branch from the output and not from the gradient: make that branch's "
              "argument safe first.",),
    "mul": ("Infinity times a mask of zero is NaN: select with where() or indexing, or bound what is "
            "infinite.",),
    **dict.fromkeys(("var", "std"), (
        "The unbiased deviation of one value is zero by zero: hand it two or more, or pass unbiased=False.",
    )),
}  # fmt: skip


def unstable_actions(flow: Flow, node: str, ratio: float) -> Actions:
    """For a run that jumps."""
    provenance = flow.record.provenance
    name = layer_name(node) or "the model"
    if provenance.optimizer and provenance.learning_rates:
        rate, clip = max(provenance.learning_rates), "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
        return (
            f"Lower the learning rate of {provenance.optimizer}: {rate:.3g} to about {rate / 30:.1g}, and "
            "let it rise to that over the first steps (a warm-up).",
            f"Clip the gradient: {clip}. If your loop does, say so: diagnose(..., clip=1.0); the steps here "
            "were not clipped."
            if provenance.clip is None
            else f"Clip the gradient to less than {provenance.clip:g}.",
            f"If single batches do it: look for outliers in the targets of {name}, or use a Huber loss.",
        )
    return (
        f"Look for outliers in the batches: clip or rescale the targets of {name}, or use a Huber loss, "
        "whose gradient is bounded.",
        "Clip the gradient: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).",
    )


def batch_norm_actions(values: float) -> Actions:
    """For a batch norm over a handful of values."""
    return (
        f"Use GroupNorm or LayerNorm, free of the batch, or more than {values:.0f} samples a batch.",
        "Or freeze its statistics (eval mode for that layer) when fine-tuning.",
    )


def narrow_actions(layer: str, width: int, needed: float) -> Actions:
    """For a waist that throttles."""
    return (
        f"Widen {layer}: {width} numbers for a gradient of effective rank {needed:.0f}; try "
        f"{2 * round(needed)}.",
        "Or give what lies behind another way to what lies before: attention over it, or a skip connection.",
    )


def rectified_actions(layer: str, width: int) -> Actions:
    """For a rectifier in a narrow passage."""
    return (
        f"Widen {layer}: of {width} units all are off at once for a part of the samples.",
        f"Or leave {layer} without an activation (a linear bottleneck), or use tanh or LeakyReLU there.",
    )


def smoothing_actions(layer: str, times: int) -> Actions:
    """For rows that have become alike."""
    return (
        f"Add skip connections round the mixing before {layer}, so that each row keeps what is its own.",
        f"Mix less often: it is done {times} times; two to four are usual in graph networks.",
        "Or normalise the differences between rows (PairNorm), or drop edges at random.",
    )
