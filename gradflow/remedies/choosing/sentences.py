"""What the sentences mean that detectors recommend in: for each kind, which remedies do what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from gradflow.detect.actions import initialisation
from gradflow.detect.wiring import node_name
from gradflow.records import IssueType
from gradflow.remedies.choosing.targets import Target, module_of
from gradflow.remedies.kinds import data, optimizing, structure
from gradflow.remedies.kinds import initialisation as start
from gradflow.remedies.kinds.domains import guard_of, guarded
from gradflow.remedies.kinds.functions import (
    attached,
    cooled,
    inputs_with_gradient,
    reparametrised,
    smooth,
    straight_through,
)
from gradflow.remedies.remedy import Remedy

_Maker = Callable[[Target, str], Iterable[Remedy]]


def of_action(target: Target, action: str) -> Iterator[Remedy]:
    """Yield the remedies that a recommended action stands for; none if it is about code to be edited."""
    for pattern, make in _RULES:
        if pattern.search(action):
            yield from make(target, action)


def _drawn_anew(target: Target, action: str) -> Iterator[Remedy]:
    own = start.inits_in(action)
    if not own:
        return
    zero_bias = "bias zero" in action or "bias of zero" in action
    others = [
        init
        for issue in target.same
        for line in issue.recommended_actions
        for init in start.inits_in(line)
        if (init.function, init.parameter) not in {(i.function, i.parameter) for i in own}
    ]
    alike = [
        init
        for name in target.off_scale()
        for init in start.inits_in(initialisation(target.flow, node_name(name)) + ".")
    ]
    every = {i.parameter: i for i in (*own, *others, *alike) if i.parameter in target.flow.parameters}
    if not every:
        return
    yield start.initialised(tuple(every.values()), zero_bias=zero_bias)
    if zero_bias and target.rectified():
        yield start.kaiming(target.rectified())


def _at_random(target: Target, action: str) -> Iterator[Remedy]:
    names = [i.metrics.get("parameter", "") for i in target.same]
    named = re.search(r"Draw (\S+) at random", action)
    found = [named[1]] if named else []
    known = set(target.flow.parameters)
    found += [n for n in names if isinstance(n, str) and n]
    found = [n for n in dict.fromkeys(found) if n in known] or [
        p.name
        for p in target.flow.record.parameters
        if p.layer == target.module and len(p.shape) >= 2 and p.trainable
    ]
    if found:
        inits = [
            start.Init("xavier_uniform_" if len(target.flow.parameters[n].shape) >= 2 else "normal_", n)
            for n in found
            if n in known
        ]
        yield start.initialised(inits)
        every = [p.name for p in target.flow.record.parameters if len(p.shape) >= 2 and p.trainable]
        yield start.initialised([start.Init("xavier_uniform_", n) for n in every])


def _another_activation(target: Target, action: str) -> Iterator[Remedy]:
    bounded = "Replace the" in action
    if bounded and "hidden" in action and target.cause.issue_type is IssueType.VANISHING:
        chosen = target.all_activations(("bounded",))
    else:
        chosen = target.activations(("bounded",) if bounded else ("rectifier",))
    if "hidden" in action:
        chosen = [a for a in chosen if not target.is_output(a)]
    modules = list(dict.fromkeys(module_of(a.name) for a in chosen if not a.functional))
    functions = tuple(dict.fromkeys(a.op for a in chosen if a.functional))
    found: list[Remedy] = []
    if modules:
        found.append(structure.activation(modules, nn.GELU if bounded else nn.LeakyReLU))
    if functions:
        found.append(smooth(functions, new=F.gelu if bounded else F.leaky_relu))
    if not found:
        return
    together = found[0] if len(found) == 1 else found[0] + found[1]
    yield together
    if bounded and target.hidden:
        yield together + start.kaiming(target.hidden)


def _norms(target: Target, action: str) -> Iterator[Remedy]:
    if target.cause.issue_type is IssueType.EXPLODING and target.group:
        yield structure.norm_behind(target.group)
    if target.hidden:
        yield structure.norm_behind(target.hidden)
    if target.rectified():
        yield start.kaiming(target.rectified())
    if "skip" in action and target.hidden:
        yield structure.skip_round(target.hidden[1:] or target.hidden)


def _skips(target: Target, action: str) -> Iterator[Remedy]:
    own = re.sub(r"\d+", "#", target.module)
    every = dict.fromkeys(
        ".".join(parts[:depth])
        for parts in (layer.module.split(".") for layer in target.flow.record.layers)
        for depth in range(1, len(parts) + 1)
    )
    alike = [name for name in every if re.sub(r"\d+", "#", name) == own]
    yield structure.skip_round(alike or [target.module])


def _lower_rate(target: Target, action: str) -> Iterator[Remedy]:
    if "much lower" in action:
        yield optimizing.clipped(1.0) + optimizing.rate_times(1 / 10)
        yield optimizing.rate_times(1e-4)
        return
    yield optimizing.rate_times(1 / 30) + optimizing.warmed_up(10)
    yield optimizing.rate_times(1 / 300)


def _warm_up(target: Target, action: str) -> Iterator[Remedy]:
    yield optimizing.warmed_up(30) + optimizing.rate_times(1 / 10)


def _clip(target: Target, action: str) -> Iterator[Remedy]:
    yield (
        optimizing.clipped(1.0) + optimizing.rate_times(1 / 10)
        if "lower the" in action
        else optimizing.clipped(1.0)
    )


def _epsilon(target: Target, action: str) -> Iterator[Remedy]:
    kind = target.flow.layers[target.node].type if target.node in target.flow.layers else ""
    named = re.search(r"(?:arguments of|Give) (\S+?)(?::| an)", action)
    alike = [
        module_of(n)
        for n, layer in target.flow.layers.items()
        if layer.type == kind and "norm" in kind.lower()
    ]
    own = [str(named[1])] if named else []
    names = list(dict.fromkeys([*own, *alike]))
    if names:
        yield structure.norm_epsilon(names)


def _scores(target: Target, action: str) -> Iterator[Remedy]:
    actions = " ".join(line for issue in target.same for line in issue.recommended_actions)
    told = re.search(r"standard deviation is ([\d.]+(?:e[+-]?\d+)?)", f"{action} {actions}")
    factor = float(told[1]) if told else target.entering()
    if not 1 < factor < 1e4:  # beyond, it is the size of a mask
        return
    activation = next(iter(target.activations(("softmax",))), None)
    inside = module_of(activation.name) if activation and not activation.functional else target.module
    yield cooled("", factor)
    yield cooled(inside, factor)
    yield start.queries_divided(target.module, factor)


def _scaled_inputs(target: Target, action: str) -> Iterator[Remedy]:
    yield structure.standardised([target.feeder])
    if target.entry != target.feeder:
        yield structure.standardised([target.entry])
    yield structure.norm_before([target.feeder])


def _left_out(target: Target, action: str) -> Iterator[Remedy]:
    for activation in target.activations():
        if activation.functional:
            yield smooth((activation.op,), new=_identity)
        else:
            yield structure.without([module_of(activation.name)])


def _identity(x: Tensor) -> Tensor:
    return x


def _without_norm(target: Target, action: str) -> Iterator[Remedy]:
    after = target.flow.wiring.after(target.node) if target.node in target.flow.layers else ()
    norms = [module_of(node) for node in after if target.flow.is_norm(node)]
    yield structure.without(norms or [target.module])


def _gated(target: Target, action: str) -> Iterator[Remedy]:
    yield structure.gated(target.module)


def _keeping(target: Target, action: str) -> Iterator[Remedy]:
    told = re.search(r"fill_\(([\d.]+)\)", action)
    if told:
        yield start.keeping(target.module, float(told[1]))


def _orthogonal(target: Target, action: str) -> Iterator[Remedy]:
    yield start.orthogonal_recurrence(target.module)


def _passed(target: Target, action: str) -> Iterator[Remedy]:
    yield straight_through()
    yield reparametrised()


def _attached(target: Target, action: str) -> Iterator[Remedy]:
    yield attached()


def _checkpointed(target: Target, action: str) -> Iterator[Remedy]:
    yield inputs_with_gradient()


def _other_norm(target: Target, action: str) -> Iterator[Remedy]:
    names = [module_of(n) for n, layer in target.flow.layers.items() if "batchnorm" in layer.type.lower()]
    yield structure.group_norm(list(dict.fromkeys(names)) or [target.module])
    yield data.larger_batches(8)


def _siblings(target: Target, action: str) -> Iterator[Remedy]:
    named = re.search(r"Initialise (\S+) like", action)
    if named:
        yield start.like_siblings([named[1]])


def _dropping(target: Target, action: str) -> Iterator[Remedy]:
    told = re.search(r"(?:Drop less in (\S+?)[:,]|Give (\S+) the share of the others, ([\d.]+))", action)
    if told:
        yield structure.less_dropout(told[1] or told[2], float((told[3] or "0.1").rstrip(".")))


def _gains(target: Target, action: str) -> Iterator[Remedy]:
    told = re.search(r"Start the (gains|bias) of (\S+) at", action)
    if told and told[1] == "gains":
        yield start.initialised([start.Init("ones_", f"{told[2]}.weight")])
    elif told:
        yield start.initialised([start.Init("zeros_", f"{told[2]}.bias")])


def _divided(target: Target, action: str) -> Iterator[Remedy]:
    told = re.search(r"divide its scores by a constant, ([\d.]+(?:e[+-]?\d+)?)", action)
    if told:
        yield structure.output_times([target.module], 1 / float(told[1].rstrip(".")))


def far_targets(target: Target, action: str = "") -> Iterator[Remedy]:
    """Yield the remedy for targets that are far from the outputs."""
    # Under a squared error the root of the first loss is how far the targets are, and outputs in that unit
    # with a loss over its square are what standardised targets are.
    first = float(target.flow.record.losses[0]) if target.flow.record.steps else math.nan
    if math.isfinite(first) and first > 1:
        scale = math.sqrt(first)
        yield structure.output_times([target.module], scale) + optimizing.loss_times(1 / first)


def _small_updates(target: Target, action: str) -> Iterator[Remedy]:
    if target.group:
        yield start.rescaled(target.group, 1e-3)


def _bounded_updates(target: Target, action: str) -> Iterator[Remedy]:
    told = re.search(r"number of blocks \((\d+)\)", action)
    if told and target.group:
        yield structure.output_times(target.group, 1 / int(told[1]))
        yield structure.norm_before(target.group)


def _above_zero(target: Target, action: str) -> Iterator[Remedy]:
    functions = tuple(dict.fromkeys(a.op for a in target.activations(("rectifier",)) if a.functional))
    modules = [module_of(a.name) for a in target.activations(("rectifier",)) if not a.functional]
    if functions:
        yield smooth(functions, new=F.softplus)
    if modules:
        yield structure.activation(modules, nn.Softplus)
    yield start.biased([target.feeder], 1.0)


def _broken_steps(target: Target, action: str) -> Iterator[Remedy]:
    yield optimizing.epsilon(1e-4)
    yield optimizing.rate_times(1 / 30) + optimizing.warmed_up(10)


def _own_rate(target: Target, action: str) -> Iterator[Remedy]:
    told = re.search(r"Give (\S+) a smaller learning rate", action)
    if told:
        yield optimizing.own_rate(told[1], 0.01)


def _fan_in(target: Target, action: str) -> Iterator[Remedy]:
    grown = target.entering()
    names = target.group or [target.module]
    yield start.rescaled(names, 0.1 if not math.isfinite(grown) else min(0.1, 1 / max(grown, 1.0)))
    last = target.matrices[-1:]
    if last:
        yield structure.norm_before(last)


def _defined(target: Target, action: str) -> Iterator[Remedy]:
    if target.cause.issue_type is IssueType.NUMERICAL:
        op = guard_of(target.cause.issues[0].evidence.op) or next(
            (found for birth in target.flow.record.numerics if (found := guard_of(birth.op))), ""
        )
        if op:
            yield guarded(op)


def _near_uniform(target: Target, action: str) -> Iterator[Remedy]:
    yield start.initialised([start.Init("orthogonal_", f"{target.module}.weight", {"gain": 0.01})])


_RULES: tuple[tuple[re.Pattern[str], _Maker], ...] = tuple(
    (re.compile(pattern), make)
    for pattern, make in (
        (r"policy_head", _near_uniform),
        (r"inside its domain|[Cc]lamp the argument|Guard the denom|slope of a square root", _defined),
        (r"make it positive where|on the logits|A clamp, log", _defined),
        (r"masked throughout|norm of zeros|mean of nothing|power below 1|where\(\) hides", _defined),
        (r"nn\.init\.\w+_\((?!policy_head|normal_\()", _drawn_anew),
        (r"Draw \S+ at random|start one of them at random|Start \S+ at random", _at_random),
        (r"Replace the|se LeakyReLU", _another_activation),
        (r"[Aa]dd a norm layer|Put a norm layer behind|norm layer before the last|normalise it at", _norms),
        (r"Add skip connections|Put a skip connection|Add the input of", _skips),
        (r"ower the learning rate|ower learning rate|learning rate below", _lower_rate),
        (r"\(post-norm\)", _warm_up),
        (r"[Cc]lip(?: the gradient)?: torch", _clip),
        (r"a large eps|an epsilon of", _epsilon),
        (r"attention scores|Scale the scores|scale it down|Normalise queries", _scores),
        (r"tandardise (?:what enters|it|the obs)|[Rr]escale the inputs", _scaled_inputs),
        (r"Normalise what enters(?!.*norm out)", _scaled_inputs),
        (r"compute the loss on what|leave the softmax out|without an activation", _left_out),
        (r"leave the norm out", _without_norm),
        (r"nn\.GRU or nn\.LSTM|a gated layer", _gated),
        (r"\.fill_\(", _keeping),
        (r"recurrent weights (?:smaller or )?orthogonal", _orthogonal),
        (r"straight-through|a sign, a round", _passed),
        (r"Remove detach|no_grad|\.data cuts|Follow the output", _attached),
        (r"use_reentrant", _checkpointed),
        (r"Use GroupNorm", _other_norm),
        (r"like the same", _siblings),
        (r"Drop less in|the share of the others", _dropping),
        (r"Start the (?:gains|bias) of", _gains),
        (r"divide its scores by a constant", _divided),
        (r"Bring the targets", far_targets),
        (r"last layer of each block's update", _small_updates),
        (r"fan_in of", _fan_in),
        (r"Bound what each block adds", _bounded_updates),
        (r"look at the step, or", _broken_steps),
        (r"pass something below zero", _above_zero),
        (r"a smaller learning rate, in", _own_rate),
    )
)  # fmt: skip
