"""Actions about structure: activations, norms, skip connections, what enters a layer, how wide it is."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

from torch import nn
from torch.nn import functional as F

from gradflow.detect.evidence import late
from gradflow.detect.wiring import node_name
from gradflow.records import IssueType
from gradflow.remedies.choosing.targets import Target, module_of
from gradflow.remedies.kinds import data, optimizing, structure
from gradflow.remedies.kinds import initialisation as start
from gradflow.remedies.kinds.blocks import pre_norm, skip_round, wider
from gradflow.remedies.kinds.functions import cooled, left_out, loss_of_logits, smooth
from gradflow.remedies.remedy import Remedy


def another_activation(target: Target, action: str) -> Iterator[Remedy]:
    """Put another activation in the place of one that saturates or dies."""
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
    if "at the output" in action:
        yield structure.without(modules) if modules else left_out(functions)
    together = found[0] if len(found) == 1 else found[0] + found[1]
    if bounded and all(target.is_output(a) for a in chosen):
        yield structure.without(modules) if modules else left_out(functions)
    yield together
    if bounded and target.weighted:
        yield together + start.kaiming(target.weighted)


def norms(target: Target, action: str) -> Iterator[Remedy]:
    """Put norm layers between, or skips round."""
    blocks = target.bare_blocks()
    if target.cause.issue_type is IssueType.EXPLODING and target.group:
        yield structure.norm_behind(target.group)
    if target.hidden:
        yield structure.norm_behind(target.hidden)
    if target.rectified():
        yield start.kaiming(target.rectified())
    if "skip" in action and target.hidden:
        yield skip_round(target.hidden[1:] or target.hidden)
    if len(blocks) > 1:
        yield skip_round(blocks, norm=True)


def skips(target: Target, action: str) -> Iterator[Remedy]:
    """Put skip connections round."""
    if target.node in target.flow.layers and target.flow.is_norm(target.node):
        yield structure.without([target.module])  # it may divide out just what told the rows apart
    blocks = target.blocks()
    if blocks:
        yield skip_round(blocks, norm=True)
    alike = target.alike(target.module)
    yield skip_round(alike, norm=True)
    yield skip_round(alike)


def post_norm(target: Target, action: str) -> Iterator[Remedy]:
    """Move norms from the path into the branches, or warm up."""
    norms, entries = target.norms_on_the_path()
    if norms and entries:
        yield pre_norm(norms, entries)
    if target.bare_blocks():
        yield skip_round(target.bare_blocks(), norm=True)
    yield optimizing.warmed_up(30) + optimizing.rate_times(1 / 10)


def epsilon(target: Target, action: str) -> Iterator[Remedy]:
    """Give norm layers a usual epsilon."""
    named = re.search(r"(?:arguments of|Give) (\S+?)(?::| an)", action)
    node = node_name(named[1]) if named and node_name(named[1]) in target.flow.layers else target.node
    kind = target.flow.layers[node].type if node in target.flow.layers else ""
    alike = [
        module_of(n)
        for n, layer in target.flow.layers.items()
        if layer.type == kind and "norm" in kind.lower()
    ]
    own = [str(named[1])] if named else []
    names = list(dict.fromkeys([*own, *alike]))
    if names:
        yield structure.norm_epsilon(names)


def scores(target: Target, action: str) -> Iterator[Remedy]:
    """Divide attention scores."""
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


def scaled_inputs(target: Target, action: str) -> Iterator[Remedy]:
    """Standardise what enters."""
    named = re.search(r"what enters (\S+) \(rms", action)
    if named and named[1] in target.matrices and named[1] != target.feeder:
        yield structure.standardised([named[1]])
        yield from itertools.islice(inputs_off_scale(target), 1)
        return
    yield structure.standardised([target.feeder])
    if target.entry != target.feeder:
        yield structure.standardised([target.entry])
    yield from itertools.islice(inputs_off_scale(target), 1)
    yield structure.norm_before([target.feeder])


def as_scores(target: Target, action: str) -> Iterator[Remedy]:
    """Leave out an activation at the end; the loss takes scores."""
    for activation in target.activations():
        if activation.functional:
            yield left_out((activation.op,)) + loss_of_logits()
        else:
            yield structure.without([module_of(activation.name)]) + loss_of_logits()


def without_norm(target: Target, action: str) -> Iterator[Remedy]:
    """Leave a norm out."""
    after = target.flow.wiring.after(target.node) if target.node in target.flow.layers else ()
    norms = [module_of(node) for node in after if target.flow.is_norm(node)]
    yield structure.without(norms or [target.module])


def gated(target: Target, action: str) -> Iterator[Remedy]:
    """Put gates into a recurrence."""
    yield structure.gated(target.module)


def other_norm(target: Target, action: str) -> Iterator[Remedy]:
    """Put a norm that does not depend on the batch."""
    names = [module_of(n) for n, layer in target.flow.layers.items() if "batchnorm" in layer.type.lower()]
    yield structure.group_norm(list(dict.fromkeys(names)) or [target.module])
    yield data.larger_batches(8)


def dropping(target: Target, action: str) -> Iterator[Remedy]:
    """Drop less."""
    told = re.search(r"(?:Drop less in (\S+?)[:,]|Give (\S+) the share of the others, ([\d.]+))", action)
    if told:
        yield structure.less_dropout(told[1] or told[2], float((told[3] or "0.1").rstrip(".")))


def bounded_updates(target: Target, action: str) -> Iterator[Remedy]:
    """Bound what a block adds."""
    told = re.search(r"number of blocks \((\d+)\)", action)
    if told and target.group:
        yield structure.output_times(target.group, 1 / int(told[1]))
        yield structure.norm_before(target.group)


def above_zero(target: Target, action: str) -> Iterator[Remedy]:
    """Pass something below zero."""
    functions = tuple(dict.fromkeys(a.op for a in target.activations(("rectifier",)) if a.functional))
    modules = [module_of(a.name) for a in target.activations(("rectifier",)) if not a.functional]
    if functions:
        yield smooth(functions, new=F.softplus)
    if modules:
        yield structure.activation(modules, nn.Softplus)
    yield start.biased([target.feeder], 1.0)


def bending(target: Target, action: str) -> Iterator[Remedy]:
    """Put a function with a second derivative in the place of every rectifier."""
    every = [a for a in target.flow.record.activations if a.kind == "rectifier"]
    if functions := tuple(dict.fromkeys(a.op for a in every if a.functional)):
        yield smooth(functions, new=F.silu)
    if modules := [module_of(a.name) for a in every if not a.functional]:
        yield structure.activation(modules, nn.SiLU)


def more_outputs(target: Target, action: str) -> Iterator[Remedy]:
    """Widen a passage."""
    own = target.flow.parameters.get(f"{target.module}.weight")
    if own is None or len(own.shape) != 2:
        return
    owners = target.readers()
    before = own.shape[1]
    if owners and before > own.shape[0]:
        yield wider(target.module, owners, min(before, 64))


def fired(target: Target, action: str) -> Iterator[Remedy]:
    """A unit with a threshold fires if what enters it is of the threshold's size."""
    if target.hidden:
        yield structure.norm_behind(target.hidden)
    entering = (
        late(target.flow.layers[target.node].input_rms) if target.node in target.flow.layers else math.nan
    )
    if 0 < entering < 1:
        yield start.rescaled([target.feeder], 1 / entering)


def bounded_std(target: Target, action: str) -> Iterator[Remedy]:
    """Bound a standard deviation from below."""
    yield structure.bounded_output([target.module], -2.0, 1.0)


def settled_inputs(target: Target) -> Iterator[Remedy]:
    """Yield standardised inputs, alone and with smaller steps."""
    yield data.inputs_standardised()
    yield data.inputs_standardised() + optimizing.rate_times(1 / 10)


def inputs_off_scale(target: Target) -> Iterator[Remedy]:
    """Yield the remedy for a model whose inputs are not of a usual size."""
    flow = target.flow
    seen = [
        late(flow.layers[n].input_rms)
        for n in flow.layers
        if flow.wiring.is_first(n) and not flow.is_table(n)
    ]
    known = [rms for rms in seen if math.isfinite(rms)]
    if not known or max(known) > 3 or max(known) < 0.1:
        yield from settled_inputs(target)
