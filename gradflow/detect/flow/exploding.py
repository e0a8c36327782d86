"""EXPLODING: the gradient, or the signal, grows from layer to layer, or one head swamps the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import attrs
import numpy as np

from gradflow.detect.actions import exploding_actions
from gradflow.detect.evidence import (
    Shares,
    activations_of,
    early,
    kept_at_most,
    late,
    middle,
    row_gain,
    shares,
)
from gradflow.detect.flow.ends.drowned import derived_layers, loud_additions, swamping_residuals
from gradflow.detect.flow.ends.exponential import exponentials
from gradflow.detect.flow.ends.loud import (
    growing_signal,
    impossible_targets,
    loud_heads,
    loud_outputs,
    over_silence,
    steep_outputs,
)
from gradflow.detect.flow.ends.misgiven import misgiven_losses
from gradflow.detect.flow.ends.off_scale import dominating_heads, far_targets, lone_columns
from gradflow.detect.flow.ends.steep import steep_parameters
from gradflow.detect.flow.ends.unheard import tiny_targets, unmet_targets
from gradflow.detect.flow.readings.recurrent_weights import memory
from gradflow.detect.flow.repeats import LEVELS, bursting_calls, growing_repeats, levels_off
from gradflow.detect.flow.signal.grown import begun_before
from gradflow.detect.flow.signal.multiplied import multiplied_signal
from gradflow.detect.flow.signal.uneven import uneven_inputs
from gradflow.detect.knowledge import CAME, at_level, calm, came_knowing, coped_with, lowered
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import layer_name
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType


def exploding(
    threshold: float = 10.0, *, dominance: float = 100.0, off_scale: float = 30.0, loud: float = 3.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of gradients that grow on their way back from the loss.

    Measured: (1) the norm of the output gradient of each layer call, over what may arrive there at most
    (NOTE [What should arrive] in `gradflow.detect.evidence`); from it the growth over the whole path, and
    the growth across each layer, and across all calls of a reused one together. (2) The size of a weight's
    rows, ‖W‖_F / √rows: by how much a layer blows up the signal. (3) Where two heads share a trunk, the
    norms of the gradients that the heads' outputs receive, and |loss| / (‖gradient‖ ‖output‖) of the stronger
    one: for a squared error that is half of (error / output), so how far its outputs are from its targets,
    in units of the outputs. (4) The same ratio at the first step of a run that its steps blow up, and whether
    what the last layer gives goes through an exponential there. (5) What new parts of a frozen model give in
    the first step, beside what they are added to; and how much larger what a layer is given then is than what
    the layers that feed it give, see `multiplied_signal`; and what comes into one network from outside by
    several calls, see `uneven_inputs`. (6) The slope of the loss along each parameter,
    over a usual size of it and over the loss.

    Why this is evidence: growth is a ratio of norms along one path, free of the scale of the loss. A healthy
    layer at any usual initialisation multiplies the gradient by 0.4 to 1.5; what doubles per layer or per
    time step grows a thousandfold in ten.

    Looks alike and is not: large gradients everywhere (a summed loss, a large batch); the gradient before a
    norm layer, which undoes the small scale of an embedding; growth of no great extent in a model that came
    to the run with what it has learned, and keeps it, or that learns in it (LOW), and over the calls of a
    loop that adds up and does not multiply (LOW); growth across a frozen part behind all that is trained, as
    across the features of a perceptual loss; one layer of gain 10 by itself; an auxiliary
    head of small weight, which is outweighed by design, while the outputs of the main one are of the size of
    its targets; large weights before a bounded activation, which `saturation` tells.

    Args:
        threshold: growth across one layer that is out of its kind's range: the largest usual gain is 1.5,
            and 10 leaves room for a spread. The growth along a path counts from `threshold` squared, two such
            layers' worth, below which optimisers and clipping cope.
        dominance: ratio of two heads' gradients from which on the weaker one is as good as absent. At 100 it
            moves the trunk by a percent. Where the run teaches nothing, `off_scale` will do for both.
        off_scale: |loss| / (‖gradient‖ ‖output‖) from which on the stronger head's outputs are far from its
            targets' scale. A regression that starts from zero-mean outputs and targets of the same size has
            about 1 to 5. Squared, from which far targets explain a run that blows up: a few hundred are
            common, and most optimizers cope.
        loud: how many times what zeros cost the first cross entropy must be, or any first loss for growth
            to be no work of the steps. Scores of variance one cost a tenth more; three times takes scores
            that are sure of wrong classes. For an exponential likewise.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        flow = flow_of(record)
        seen = shares(flow, kept_at_most(flow))
        first = growing_signal(flow, threshold**2)  # what the steps have made of it was not there first
        issues = _growth(flow, seen, threshold, math.inf if first else loud)
        if not issues:
            issues = dominating_heads(flow, dominance, off_scale)
        far = far_targets(flow, off_scale)
        grown = [issue for issue in issues if not any(issue.layer == other.layer for other in far)]
        found = [*grown, *far, *_runaway(flow, threshold), *_large_weights(flow, threshold)]
        found += [*impossible_targets(flow), *misgiven_losses(flow, IssueType.EXPLODING)]
        found += exponentials(flow, loud)
        if found and not all(issue.evidence.developed for issue in found):
            return found
        if not first and any(issue.severity.is_serious for issue in found):
            first = multiplied_signal(flow, over_silence(flow), threshold**2)
            found = [i for i in found if all(i.layer != other.layer for other in first)]
        return [*found, *first] if found or first else _others(flow, threshold, loud)

    return detector


def _others(flow: Flow, threshold: float, loud: float) -> list[Issue]:
    """What is looked for where the gradient is not seen to grow along the path of layers."""
    heads = loud_heads(flow, loud)
    found = (
        [*begun_before(flow, heads), *heads]
        or loud_additions(flow, loud)
        or growing_repeats(flow, threshold**1.5)
    )
    found = found or bursting_calls(flow, threshold**2)
    outputs = swamping_residuals(flow, loud_outputs(flow, threshold**2)) if not found else []
    found = found or [*begun_before(flow, outputs), *outputs] or steep_outputs(flow, threshold**2)
    found = found or lone_columns(flow) or unmet_targets(flow)
    if not found and not derived_layers(flow):  # zeros solve an equation, and say nothing of its targets
        found = tiny_targets(flow, threshold**4)
    return found or uneven_inputs(flow) or steep_parameters(flow, threshold**6)


@attrs.frozen(kw_only=True)
class _Amplifier:
    """A module that amplifies: the logarithm of its growth over all of its calls on the path."""

    module: str
    nodes: tuple[str, ...]
    growth: float
    largest: float


@attrs.frozen
class _Rise:
    """How the gradient grows along a path: all in all, at the start, and what that is to be told as."""

    path: Sequence[str]
    total: float
    start: float
    severity: IssueSeverity
    developed: bool
    part: str  # the part of the model that alone amplifies; "" for none


def _before_any_step(record: FlowRecord, growth: float, threshold: float, loud: float) -> bool:
    """Whether growth in the first step is no work of the steps, however much they add to it: HIGH by itself,
    or MEDIUM, and the first loss so far above what zeros cost that the signal too must have grown."""
    known = record.knowledge
    above = known is not None and 0 < loud * known.silent <= record.losses[0]
    return growth >= threshold ** (2 if above else 3)


def _growth(flow: Flow, seen: Shares, threshold: float, loud: float) -> list[Issue]:
    grown = {node: _typical(values) for node, values in seen.share.items() if not _drops(flow, node)}
    fixed, before = _behind_all(flow, seen)
    grown = {node: share / before for node, share in grown.items() if node not in fixed}
    peak = max(grown, key=lambda node: (grown[node], node), default="")
    total = grown.get(peak, math.nan)
    if not total >= threshold**2:
        return []
    path = [node for node in seen.path(peak) if node not in fixed]
    amplifiers = _amplifiers(flow, path, grown)
    if not amplifiers:
        return []
    strong = [a for a in amplifiers if a.largest >= threshold] or [
        a for a in amplifiers if a.growth >= 0.25 * max(b.growth for b in amplifiers)
    ]
    severity = _severity(total, threshold)
    start = early(seen.share[peak][:3]) / before
    at_first = float(seen.share[peak][0]) / before
    developed = start < total / 10 and not _before_any_step(flow.record, at_first, threshold, loud)
    part = _part(amplifiers)
    first: dict[str, str] = {}  # by module
    for node in sorted(flow.layers, key=lambda n: flow.layers[n].order):
        first.setdefault(flow.layers[node].module, node)
    rise = _Rise(path, total, start, severity, developed, part)
    found = [_issue(flow, a, first[a.module], rise) for a in strong]
    if severity is not IssueSeverity.MEDIUM:
        return found
    if calm(flow.record) and (came_knowing(flow.record) or at_level(flow.record)):
        return [lowered(issue, CAME) for issue in found]
    found = [lowered(i, LEVELS) if levels_off(flow, i, total) else i for i in found]
    return coped_with(flow.record, found)


def _drops(flow: Flow, node: str, least: float = 1e-3) -> bool:
    """Whether a table takes next to nothing of the gradient at its output: that is at rows of padding."""
    tables = [p for p in flow.trainable(node) if len(p.grad_norm)] if flow.is_table(node) else []
    with np.errstate(invalid="ignore"):
        return bool(tables) and all(np.nanmax(p.grad_norm - least * flow.grad[node]) <= 0 for p in tables)


def _behind_all(flow: Flow, seen: Shares) -> tuple[frozenset[str], float]:
    """Return what stands behind every parameter to be trained, and the growth up to there; 1 for none.

    What a frozen part at the end multiplies (the features of a perceptual loss, a simulator, a factor in
    front of it) multiplies all gradients that train anything alike, as a factor on the loss does.
    """
    trained = [node for node in flow.layers if flow.trainable(node)]
    last = max(trained, key=lambda node: flow.layers[node].order, default="")
    if not last or last not in seen.share or not flow.wiring.known:
        return frozenset(), 1.0
    behind = flow.wiring.downstream(last) & seen.share.keys()
    upstream = flow.wiring.upstream(last)
    frozen = [node for node in behind if flow.parameters_of(node)]
    if not frozen or not all(node == last or node in upstream for node in trained):
        return frozenset(), 1.0
    growth = _typical(seen.share[last])
    return (frozenset(behind), growth) if growth > 1 else (frozenset(), 1.0)


def _typical(values: np.ndarray) -> float:
    """The largest of the run's start, middle and end, each as a median: an explosion that the first steps
    tame has still happened to them."""
    parts = [v for v in (early(values), middle(values), late(values)) if math.isfinite(v)]
    return max(parts, default=math.nan)


def _severity(total: float, threshold: float) -> IssueSeverity:
    if total >= threshold**6:
        return IssueSeverity.CRITICAL
    return IssueSeverity.HIGH if total >= threshold**3 else IssueSeverity.MEDIUM


def _amplifiers(flow: Flow, path: Sequence[str], grown: dict[str, float]) -> list[_Amplifier]:
    """Each step of the path, booked to the layer that the gradient went through, by module; or, if its
    weights are too small for it, to the layer whose output feeds the operations between."""
    booked: dict[str, list[tuple[float, str]]] = {}
    for before, node in itertools.pairwise(path):
        if grown[before] > 0 and grown[node] > 0:
            growth = grown[before] / grown[node]
            at = node if _amplifies(flow, node, growth) or not flow.wiring.feeds_op(before) else before
            booked.setdefault(flow.layers[at].module, []).append((math.log(growth), at))
    return [
        _Amplifier(
            module=module,
            nodes=tuple(node for _, node in steps),
            growth=sum(step for step, _ in steps),
            largest=math.exp(max(step for step, _ in steps)),
        )
        for module, steps in booked.items()
        if sum(step for step, _ in steps) > 0
    ]


def _part(amplifiers: Sequence[_Amplifier]) -> str:
    """The part of the model, by the first component of its names, in which the gradient grows most."""
    grown: dict[str, float] = {}
    for a in amplifiers:
        part = a.module.partition(".")[0] if "." in a.module else ""
        grown[part] = grown.get(part, 0.0) + a.growth
    return max(grown, key=lambda part: (grown[part], part), default="")


def _amplifies(flow: Flow, node: str, growth: float) -> bool:
    """Whether a layer's own weights can have made the gradient grow so much: by five times their rms at most,
    which is about what the largest singular value of a random matrix is above the rms of its rows."""
    gain = row_gain(flow, node)
    return flow.is_norm(node) or growth <= 5.0 * max(1.0, gain if math.isfinite(gain) else 1.0)


def _issue(flow: Flow, amplifier: _Amplifier, first: str, rise: _Rise) -> Issue:
    path, total = rise.path, rise.total
    calls = len(amplifier.nodes)
    # The growth of a first call has nothing before it to show in; it is still the module that amplifies.
    node = first if calls > 1 else amplifier.nodes[0]
    layer, growth = flow.layers[node], math.exp(amplifier.growth)
    across = f"over its {calls} calls" if calls > 1 else "on its way through"
    forward = _forward_growth(flow, path)
    also = f" The signal grows too, by {forward:.2g}." if forward >= 10 else ""
    return Issue(
        layer=layer.name,
        layer_type=layer.type,
        issue_type=IssueType.EXPLODING,
        severity=rise.severity,
        description=f"The gradient grows {growth:.3g} times {across}, and {total:.3g} times from the loss to "
        f"{path[0]}, beyond what layers of these kinds may.{also}",
        magnitude=total if calls > 1 else amplifier.largest,
        recommended_actions=exploding_actions(flow, node, calls=calls),
        metrics={
            "growth": growth,
            "largest_step": amplifier.largest,
            "total_growth": total,
            "num_calls": calls,
            "peak": layer_name(path[0]),
            "row_gain": row_gain(flow, node),
            "forward_growth": forward,
            "growth_at_start": rise.start,
        },
        evidence=Evidence(
            num_calls=calls,
            developed=rise.developed,
            growth=growth,
            elsewhere=bool(rise.part) and not layer.module.startswith(f"{rise.part}."),
        ),
    )


def _forward_growth(flow: Flow, path: Sequence[str]) -> float:
    """How much larger the signal is at the loss's end of the path than at the other."""
    start, end = (middle(flow.layers[n].output_rms) for n in (path[0], path[-1]))
    return end / start if start > 0 and math.isfinite(end) else math.nan


def _runaway(flow: Flow, threshold: float) -> list[Issue]:
    """Plain recurrent layers whose weights multiply the state at every step. A tanh would bound the output by
    1."""
    issues = []
    for node, layer in flow.layers.items():
        kept = memory(flow, node)
        if kept is None or kept.kept < threshold**2 or not middle(layer.output_rms) > 1:
            continue
        issues.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.EXPLODING,
                severity=_severity(kept.kept, threshold),
                description=f"Over {kept.steps} steps its recurrent weights multiply signal and gradient by "
                f"{kept.kept:.3g} ({kept.rate:.3g} a step); its output has rms "
                f"{middle(layer.output_rms):.3g}.",
                magnitude=kept.kept,
                recommended_actions=exploding_actions(flow, node, calls=kept.steps),
                metrics={"growth": kept.kept, "kept_per_step": kept.rate, "num_steps": kept.steps},
                evidence=Evidence(growth=kept.kept),
            )
        )
    return issues


def _large_weights(flow: Flow, threshold: float) -> list[Issue]:
    """Layers whose weights are off scale by `threshold` and that blow up the signal, seen forward.

    Needed for a layer with none before it, past which no gradient flows. A norm or a bounded activation
    behind it undoes the size, or turns it into a saturation, which is that detector's.
    """
    rms = {node: middle(layer.output_rms) for node, layer in flow.layers.items()}
    issues = []
    for node, layer in flow.layers.items():
        gain = row_gain(flow, node)
        if not flow.has_matrix(node) or not flow.trainable(node) or not gain >= threshold:
            continue
        if rms[node] < threshold * middle(layer.input_rms):  # its input is such that it does not
            continue
        if not flow.wiring.is_first(node) or flow.is_table(node) or _tamed(flow, node):
            continue
        others = [value for other, value in rms.items() if other != node and value > 0]
        severity = IssueSeverity.HIGH if gain >= threshold**2 else IssueSeverity.MEDIUM
        start = row_gain(flow, node, at=lambda norms: float(norms[0]))
        issues.append(
            Issue(
                layer=layer.name,
                layer_type=layer.type,
                issue_type=IssueType.EXPLODING,
                severity=severity,
                description=f"Its weights blow up the signal: the rms of their rows is {gain:.3g}, where a "
                f"usual initialisation has 0.6 to 1.4, and its output has rms {rms[node]:.3g}.",
                magnitude=gain,
                recommended_actions=exploding_actions(flow, node, calls=1),
                metrics={
                    "row_gain": gain,
                    "total_growth": gain,
                    "growth_at_start": start,
                    "output_rms": rms[node],
                    "median_output_rms": float(np.median(others)) if others else math.nan,
                },
                evidence=Evidence(developed=start < gain / 10),
            )
        )
    return issues


def _tamed(flow: Flow, node: str) -> bool:
    behind = flow.wiring.after(node)
    normed = any(flow.is_norm(other) for other in behind) or any(
        "norm" in op.lower() for op in flow.wiring.ops_after(node)
    )
    return normed or any(a.kind in ("bounded", "softmax") for a in activations_of(flow, node))
