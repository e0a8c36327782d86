"""Actions about weights: how they start, and how large they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from gradflow.detect.actions import initialisation
from gradflow.detect.evidence import early, row_gain
from gradflow.detect.wiring import node_name
from gradflow.remedies.choosing.targets import SMALL_GAIN, Target
from gradflow.remedies.kinds import initialisation as start
from gradflow.remedies.kinds import structure
from gradflow.remedies.kinds.starts import parameters_times, rows_revived, scale_kept, small_steps
from gradflow.remedies.remedy import Remedy


def drawn_anew(target: Target, action: str) -> Iterator[Remedy]:
    """Draw weights anew."""
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


def at_random(target: Target, action: str) -> Iterator[Remedy]:
    """Start one of two factors at random."""
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


def siblings(target: Target, action: str) -> Iterator[Remedy]:
    """Start a parameter as those of other blocks."""
    named = re.search(r"Initialise (\S+) like", action)
    if named:
        yield start.like_siblings([named[1]])


def gains(target: Target, action: str) -> Iterator[Remedy]:
    """Start gains and biases as usual."""
    told = re.search(r"Start the (gains|bias) of (\S+) at", action)
    if told and told[1] == "gains":
        yield start.initialised([start.Init("ones_", f"{told[2]}.weight")])
    elif told:
        yield start.initialised([start.Init("zeros_", f"{told[2]}.bias")])


def divided(target: Target, action: str) -> Iterator[Remedy]:
    """Divide scores by a constant."""
    told = re.search(r"divide its scores by a constant, ([\d.]+(?:e[+-]?\d+)?)", action)
    if told:
        yield structure.output_times([target.module], 1 / float(told[1].rstrip(".")))


def small_updates(target: Target, action: str) -> Iterator[Remedy]:
    """Start updates small."""
    if target.group:
        yield start.rescaled(target.group, 1e-3)


def fan_in(target: Target, action: str) -> Iterator[Remedy]:
    """Draw generated weights by their fan-in."""
    grown = target.entering()
    names = target.group or [target.module]
    yield start.rescaled(names, 0.1 if not math.isfinite(grown) else min(0.1, 1 / max(grown, 1.0)))
    last = target.matrices[-1:]
    if last:
        yield structure.norm_before(last)


def near_uniform(target: Target, action: str) -> Iterator[Remedy]:
    """Start a policy near uniform."""
    yield start.initialised([start.Init("orthogonal_", f"{target.module}.weight", {"gain": 0.01})])


def keeping(target: Target, action: str) -> Iterator[Remedy]:
    """Open a gate that keeps."""
    told = re.search(r"fill_\(([\d.]+)\)", action)
    if told:
        yield start.keeping(target.module, float(told[1]))


def orthogonal(target: Target, action: str) -> Iterator[Remedy]:
    """Start a recurrence orthogonal."""
    yield start.orthogonal_recurrence(target.module)


def usual_scale(target: Target, action: str) -> Iterator[Remedy]:
    """Draw weights of a head at their usual scale."""
    told = re.search(
        r"Draw the weights of (\S+) at their usual scale, .* not ([\d.]+(?:e[+-]?\d+)?) ", action
    )
    if not told:
        return
    own = target.flow.parameters.get(f"{told[1]}.weight")
    if own is not None and len(own.shape) == 2:
        yield start.initialised([start.Init("normal_", own.name, {"std": own.shape[1] ** -0.5})])
        return
    # The head has no weights of its own: those of a table are used again.
    tables = [f"{target.flow.layers[n].module}.weight" for n in target.flow.layers if target.flow.is_table(n)]
    tables = [name for name in tables if name in target.flow.parameters]
    if tables:
        yield parameters_times(tables, 1 / float(told[2]))


def per_call(target: Target, action: str) -> Iterator[Remedy]:
    """What runs many times in a step keeps its size if each run does."""
    told = re.search(r"grows ([\d.]+(?:e[+-]?\d+)?) times over its (\d+) calls", target.description)
    if told and float(told[1]) > 1:
        yield start.rescaled([target.module], float(told[1]) ** (-1 / int(told[2])) / 2)


def scale_of_outputs(target: Target) -> Iterator[Remedy]:
    """Yield the remedies that keep the scale from layer to layer, where that grows or fades by itself."""
    factors = {}
    for name in target.hidden:
        layer = target.flow.layers.get(node_name(name))
        if layer is None:
            continue
        before = [target.flow.layers[n] for n in target.flow.wiring.before(node_name(name))]
        given = max(
            (early(b.output_rms) for b in before if math.isfinite(early(b.output_rms))), default=math.nan
        )
        kept = given / early(layer.output_rms) if early(layer.output_rms) > 0 else math.nan
        if math.isfinite(kept) and kept > 0 and not 0.5 <= kept <= 2:
            factors[name] = kept
    if factors:
        yield scale_kept(factors)
        yield scale_kept(factors, outputs=True)


def by_fan_in(target: Target, action: str) -> Iterator[Remedy]:
    """Keep the scale layer by layer."""
    yield from reversed(list(scale_of_outputs(target)))


def revived(target: Target, action: str) -> Iterator[Remedy]:
    """Start idle rows anew."""
    told = re.search(
        r"No gradient reached rows ([\d., and]+) of \d+ of ([\w.]+?)(?: in any|,|\.? )", target.description
    )
    if told:
        rows: list[int] = []
        for first, last in re.findall(r"(\d+)(?:\.\.(\d+))?", told[1]):
            rows += range(int(first), int(last or first) + 1)
        yield rows_revived(told[2], rows)


def codes(target: Target, action: str) -> Iterator[Remedy]:
    """Start codes at the scale of what they are compared with."""
    told = re.search(r"Print what stands between (\S+) and", " ".join(target.actions))
    node = node_name(told[1]) if told else ""
    if node not in target.flow.layers:
        return
    layer = target.flow.layers[node]
    sources = [layer.input_rms, *(target.flow.layers[n].output_rms for n in target.flow.wiring.before(node))]
    given = next((early(rms) for rms in sources if early(rms) > 0), 0.0)
    for code in target.flow.record.parameters:
        inside = code.name.startswith(f"{layer.module}.") and len(code.shape) >= 2
        size = early(code.norm) / math.sqrt(code.num_elements) if inside else 0.0
        if size > 0 and given > 0:
            yield parameters_times([code.name], given / size)


def slow_states(target: Target, action: str) -> Iterator[Remedy]:
    """Start what a state is multiplied by near one; what overwrote it may have made weights small as well."""
    small = [n for n in target.matrices if row_gain(target.flow, node_name(n), early) < SMALL_GAIN]
    names = [f"{n}.weight" for n in small if f"{n}.weight" in target.flow.parameters]
    inits = [start.Init("xavier_uniform_", name) for name in names]
    if inits:
        yield start.initialised(inits) + small_steps(target.module)
    yield small_steps(target.module)
    yield start.keeping(target.module, 2.0)
