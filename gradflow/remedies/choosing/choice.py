"""Which remedies a cause's recommended actions stand for, the likeliest first.

NOTE [From words to remedies]
A detector recommends in words. `sentences.py` tells, for every kind of sentence that gradflow's detectors
write, which remedies do what it says; a sentence that no rule knows (call a module, widen a layer, another
loss) is about code that cannot be changed from outside, and gives none. The order is that of the sentences,
and what usually helps against that type of issue comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import attrs
import torch

from gradflow.records import Cause, FlowRecord, IssueType
from gradflow.remedies.choosing.running import far_targets
from gradflow.remedies.choosing.sentences import of_action
from gradflow.remedies.choosing.shapes import inputs_off_scale
from gradflow.remedies.choosing.targets import Target, module_of
from gradflow.remedies.choosing.weights import scale_of_outputs
from gradflow.remedies.kinds import initialisation as start
from gradflow.remedies.kinds import optimizing, structure
from gradflow.remedies.kinds.blocks import skip_round
from gradflow.remedies.kinds.domains import guard_of, guarded
from gradflow.remedies.kinds.functions import bounded_exponents, flattened, straight_through, wider_precision
from gradflow.remedies.remedy import Remedy

MOST = 10  # remedies for one cause


def remedies_for(cause: Cause, record: FlowRecord) -> tuple[Remedy, ...]:
    """Return the remedies that a cause's recommended actions stand for, the likeliest first, ten at most.

    Args:
        cause: of a report.
        record: the one that the report was made from.

    >>> from gradflow.diagnosis import diagnose
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    >>> _ = nn.init.constant_(model[0].bias, -9.0)
    >>> report = diagnose(model, [torch.randn(64, 8)] * 3, lambda y: y.square().mean())
    >>> [remedy.name for remedy in remedies_for(report.causes[0], report.record)][:2]
    ['kaiming_normal_ on 0, bias 0', 'LeakyReLU for 1']
    """
    target = Target.of(cause, record)
    found: dict[str, Remedy] = {}
    for remedy in _found(target):
        found.setdefault(remedy.name, remedy)
    return tuple(found.values())[:MOST]


def first_action(cause: Cause, record: FlowRecord) -> tuple[Remedy, ...]:
    """Return the remedies that the first recommended action of a cause alone stands for; none if it is about
    what cannot be changed from outside."""
    actions = cause.issues[0].recommended_actions[:1] if cause.issues else ()
    target = Target.of(cause, record)
    return tuple(remedy for action in actions for remedy in of_action(target, action))


def _found(target: Target) -> Iterator[Remedy]:
    for action in target.cause.issues[0].recommended_actions if target.cause.issues else ():
        yield from of_action(target, action)
    if isinstance(target.cause.issue_type, IssueType):
        yield from _USUAL.get(target.cause.issue_type, lambda target: ())(target)


# --------------------------------------------------------------------- what usually helps, by the issue


def _against_vanishing(target: Target) -> Iterator[Remedy]:
    if target.hidden:
        yield structure.norm_behind(target.hidden)
    if target.weighted:
        yield start.kaiming(target.rectified() or target.weighted)
    if target.bare_blocks():
        yield skip_round(target.bare_blocks(), norm=True)
    yield from scale_of_outputs(target)


def _against_explosion(target: Target) -> Iterator[Remedy]:
    if target.bare_blocks():
        yield skip_round(target.bare_blocks(), norm=True)
    if target.hidden:
        yield structure.norm_behind(target.hidden)
    yield from scale_of_outputs(target)
    yield structure.standardised([target.entry])
    yield from inputs_off_scale(target)
    yield optimizing.clipped(1.0) + optimizing.rate_times(1 / 10)
    yield from far_targets(target)


def _against_death(target: Target) -> Iterator[Remedy]:
    drawn = _zeros(target)
    if drawn:
        yield start.initialised(drawn)
    if target.rectified() and target.activations(("rectifier",)):
        yield start.kaiming(target.rectified())
    if "exactly zero" in target.description:
        if "rectifier" not in target.description:
            yield straight_through()
            yield from inputs_off_scale(target)
        if target.hidden:
            yield structure.norm_behind(target.hidden)


def _zeros(target: Target) -> list[start.Init]:
    """What parameters that start at exactly zero are drawn from; biases may stay there."""
    zeros = [p for p in target.flow.record.parameters if p.trainable and len(p.norm) and p.norm[0] == 0]
    return [
        start.Init("xavier_uniform_", p.name)
        if len(p.shape) >= 2
        else start.Init("normal_", p.name, {"std": 0.1})
        for p in zeros
        if not p.name.endswith("bias")
    ]


def _against_leaps(target: Target) -> Iterator[Remedy]:
    known = target.cause.issues[0].metrics
    if "best" in known:  # a rate that is too low
        yield optimizing.rate_times(known["factor"])
    if "best" in known or known.get("rate") == 0:
        return
    stepper = target.flow.record.provenance.optimizer
    if stepper and not hasattr(torch.optim, stepper):
        yield optimizing.plain_adam()
        yield optimizing.plain_adam(0.1)
    yield optimizing.rate_times(1 / 30)
    yield from inputs_off_scale(target)
    if "exp" in target.ops():
        yield bounded_exponents()
    yield optimizing.clipped(1.0)
    yield optimizing.rate_times(1 / 300) + optimizing.clipped(1.0)
    yield structure.standardised([target.entry])


def _against_saturation(target: Target) -> Iterator[Remedy]:
    yield structure.standardised([target.feeder])
    yield from inputs_off_scale(target)
    entering = target.entering()
    if math.isfinite(entering) and entering > 2:
        yield start.rescaled([target.feeder], 1 / entering)
        found = target.activations(("bounded",))
        modules = [module_of(a.name) for a in found if not a.functional]
        functions = [a.op for a in found if a.functional]
        if found:
            yield flattened(list(dict.fromkeys(modules)), list(dict.fromkeys(functions)), entering)


def _against_nan(target: Target) -> Iterator[Remedy]:
    for birth in target.flow.record.numerics[:1]:
        op = guard_of(birth.op)
        if op:
            yield guarded(op)
    drawn = _zeros(target)
    if drawn:
        yield start.initialised(drawn)
    every = guarded("log")
    for op in ("sqrt", "div", "exp", "norm", "pow", "softmax", "mean", "mul"):
        every += guarded(op)
    yield attrs.evolve(every, name="every operation inside its domain")
    yield from inputs_off_scale(target)
    yield wider_precision()
    yield wider_precision(torch.float64)


_USUAL: dict[IssueType, Callable[[Target], Iterable[Remedy]]] = {
    IssueType.VANISHING: _against_vanishing,
    IssueType.EXPLODING: _against_explosion,
    IssueType.DEAD: _against_death,
    IssueType.UNSTABLE: _against_leaps,
    IssueType.SATURATION: _against_saturation,
    IssueType.NUMERICAL: _against_nan,
}
