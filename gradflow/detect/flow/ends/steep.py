"""Parameters along which the loss is so steep that no step can follow: what is behind divides by nothing."""

from __future__ import annotations

import math

import attrs
import numpy as np

from gradflow.detect.updates.readings import is_adaptive, layer_of
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType, ParameterRecord

_AS_STEEP = 1e-3  # of the steepest step
_ZERO = 1e-6  # rms of what a layer gives, up to which it has as good as no length


@attrs.frozen(kw_only=True)
class _Slope:
    """By how much of itself the loss changes along a parameter, to first order, over a usual size of it."""

    parameter: ParameterRecord
    node: str
    steepest: float
    step: int


def steep_parameters(flow: Flow, above: float = 1e6, *, apart: float = 1e4) -> list[Issue]:
    """Layers along whose parameters the loss is a cliff, nearest the loss.

    Measured: ‖g‖ s / L for every parameter and step, with s the size that it starts with, or would if its
    numbers were as large as those of the model are on average, and L the largest loss of the run, or what
    zeros cost if that is more. Networks of a usual scale have 1 to 100, whatever the loss is multiplied by;
    from a million on, a change in the sixth digit changes the loss by as much as it is. A vector of zeros
    that is normalised gives 1e12, one over the epsilon. Nothing on the path of layers grows there: it begins
    between the last layer and the loss. Such a gradient does its harm once: plain descent throws the numbers
    as far as it is large, and an optimizer with a running mean of squares stands still in them for as long as
    that remembers it.

    Alike and not: losses that are next to zero by themselves, as those of a policy in its first step, along
    which all parameters are as steep (of all layers the median must be far below).

    Args:
        flow: the record along its wiring.
        above: by how many times what it is the loss must change.
        apart: how many times as steep as along the median layer.
    """
    losses, found = flow.record.losses, _slopes(flow)
    if not found or not np.isfinite(losses).all() or losses.min() < 0:
        return []
    steepest = {node: max(s.steepest for s in found if s.node == node) for node in {s.node for s in found}}
    middle = sorted(steepest.values())[(len(steepest) - 1) // 2]
    if len(steepest) == 1:  # nothing to hold it against but what zeros cost
        middle = 0.0 if flow.record.knowledge is not None and flow.record.knowledge.silent > 0 else middle
    told = {n for n, slope in steepest.items() if slope >= above and (slope >= apart * middle)}
    told = {n for n in told if n not in flow.layers or not told & (flow.wiring.downstream(n) - {n})}
    worst = [max((s for s in found if s.node == n), key=lambda s: s.steepest) for n in sorted(told)]
    return [_issue(flow, slope, middle) for slope in worst]


def _slopes(flow: Flow) -> list[_Slope]:
    """Return the steepest slope of the loss along each parameter that is trained."""
    record, known = flow.record, flow.record.knowledge
    trained = [p for p in record.parameters if p.trainable and p.optimized and len(p.norm)]
    numbers = sum(p.num_elements for p in trained)
    silent = known.silent if known is not None and math.isfinite(known.silent) else 0.0
    loss = max(float(np.abs(record.losses).max(initial=0.0)), silent)
    if not numbers or not loss > 0:
        return []
    sizes = np.sqrt(np.sum([np.square(p.norm) for p in trained], axis=0) / numbers)
    usual = float(sizes[np.argmax(sizes > 0)])  # before steps have made others of them
    owners = {name: node for node in flow.layers for name in flow.layers[node].parameters}
    found = []
    for parameter in trained:
        slope = _over(parameter, usual) / loss
        step = int(np.argmax(slope >= _AS_STEEP * slope.max()))  # later ones may be of its ruins
        node = owners.get(parameter.name, parameter.name)
        found.append(_Slope(parameter=parameter, node=node, steepest=float(slope[step]), step=step))
    return found


def _over(parameter: ParameterRecord, usual: float) -> Floats:
    size = max(float(parameter.norm[0]), usual * math.sqrt(parameter.num_elements))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.nan_to_num(parameter.grad_norm * size, posinf=0.0)


def _issue(flow: Flow, slope: _Slope, middle: float) -> Issue:
    record, parameter, step = flow.record, slope.parameter, slope.step
    layer, kind = layer_of(record, parameter.name)
    seen = flow.layers.get(slope.node)
    size = float(seen.output_rms[step]) if seen is not None and step < len(seen.output_rms) else math.nan
    empty = size <= _ZERO or parameter.norm[step] == 0
    kept = " Its optimizer keeps the square of that, and stands still in these numbers for as long."
    return Issue(
        layer=layer,
        layer_type=kind,
        issue_type=IssueType.EXPLODING,
        severity=IssueSeverity.HIGH,
        description=f"At step {step} the gradient of its {parameter.name.rpartition('.')[2]} is "
        f"{parameter.grad_norm[step]:.3g}, where the loss is {record.losses[step]:.3g}: a change by "
        f"{1 / slope.steepest:.0e} of a usual size would change the loss by as much as it is. "
        + (f"Along the median layer it is {slope.steepest / middle:.0e} times less steep. " if middle else "")
        + ("What it gives then is zero, and " if empty else "")
        + "what is behind it divides by next to nothing."
        + (kept if is_adaptive(record) else ""),
        magnitude=slope.steepest,
        recommended_actions=(
            *(
                (f"Start {parameter.name} at random, and small: a vector of zeros has no direction.",)
                if empty
                else ()
            ),
            "Find what divides behind it (F.normalize, a norm, a standard deviation, a root), and give it an "
            "epsilon of the size of what is usual there, inside the root: "
            "x / (x.square().sum(-1, keepdim=True) + 1e-4).sqrt().",
            "Until then, clip: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).",
        ),
        metrics={"slope": slope.steepest, "step": step, "parameter": parameter.name, "output_rms": size},
        evidence=Evidence(growth=slope.steepest, developed=step > 0),
    )
