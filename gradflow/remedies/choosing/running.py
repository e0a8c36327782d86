"""Actions about the training and about single operations: rates, losses, cuts, NaN."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from gradflow.detect.wiring import layer_name
from gradflow.records import IssueType
from gradflow.remedies.choosing.targets import Target, module_of
from gradflow.remedies.kinds import optimizing, structure
from gradflow.remedies.kinds.domains import divisors_bounded, guard_of, guarded
from gradflow.remedies.kinds.functions import (
    attached,
    bounded_exponents,
    inputs_with_gradient,
    reparametrised,
    straight_through,
)
from gradflow.remedies.kinds.initialisation import kaiming
from gradflow.remedies.remedy import Remedy


def lower_rate(target: Target, action: str) -> Iterator[Remedy]:
    """Lower the rate: by what is told, or by a lot; what has died is drawn anew as well."""
    if "much lower" in action:
        yield optimizing.clipped(1.0) + optimizing.rate_times(1 / 10)
        yield optimizing.rate_times(1e-4)
        return
    if target.cause.issue_type is IssueType.DEAD and target.rectified():
        # What has died does not come back by smaller steps alone.
        yield kaiming(target.rectified()) + optimizing.rate_times(1 / 30) + optimizing.warmed_up(10)
        return
    told = re.search(r"ower the learning rate of \S+: ([\d.e+-]+) to about ([\d.e+-]*\d)", action)
    factor = float(told[2]) / float(told[1]) if told and float(told[1]) > 0 else 1 / 30
    yield optimizing.rate_times(min(factor, 1 / 10)) + optimizing.warmed_up(10)
    yield optimizing.rate_times(1 / 300)


def steady_rates(target: Target, action: str) -> Iterator[Remedy]:
    """Yield rates that no hook changes."""
    yield optimizing.steady_rates()


def all_held(target: Target, action: str) -> Iterator[Remedy]:
    """Yield an optimizer that holds what it has left out."""
    yield optimizing.all_held()


def clip(target: Target, action: str) -> Iterator[Remedy]:
    """Clip the gradient."""
    yield (
        optimizing.clipped(1.0) + optimizing.rate_times(1 / 10)
        if "lower the" in action
        else optimizing.clipped(1.0)
    )


def passed(target: Target, action: str) -> Iterator[Remedy]:
    """Let the gradient through what has a slope of zero."""
    yield straight_through()
    yield reparametrised()


def uncut(target: Target, action: str) -> Iterator[Remedy]:
    """Take away what cuts the gradient."""
    yield attached()
    if "Follow the output" in action:
        yield reparametrised()


def checkpointed(target: Target, action: str) -> Iterator[Remedy]:
    """Let checkpointed stages have their gradient."""
    yield inputs_with_gradient()


def far_targets(target: Target, action: str = "") -> Iterator[Remedy]:
    """Yield the remedy for targets that are far from the outputs."""
    # Under a squared error the root of the first loss is how far the targets are, and outputs in that unit
    # with a loss over its square are what standardised targets are.
    first = float(target.flow.record.losses[0]) if target.flow.record.steps else math.nan
    if math.isfinite(first) and first > 1:
        scale = math.sqrt(first)
        yield structure.output_times([target.module], scale) + optimizing.loss_times(1 / first)


def broken_steps(target: Target, action: str) -> Iterator[Remedy]:
    """Mend a step that gives NaN."""
    yield optimizing.epsilon(1e-4)
    yield optimizing.rate_times(1 / 30) + optimizing.warmed_up(10)


def own_rate(target: Target, action: str) -> Iterator[Remedy]:
    """Give a parameter a rate of its own."""
    told = re.search(r"(?:Give|gradient of) (\S+) (?:a smaller learning rate|down by)", action)
    if told:
        yield optimizing.own_rate([told[1]], 0.01)
        alike = target.parameters_alike(told[1])
        if len(alike) > 1:
            yield optimizing.own_rate(alike, 0.01)


def defined(target: Target, action: str) -> Iterator[Remedy]:
    """Keep an operation inside its domain."""
    if target.cause.issue_type is IssueType.NUMERICAL:
        op = guard_of(target.cause.issues[0].evidence.op) or next(
            (found for birth in target.flow.record.numerics if (found := guard_of(birth.op))), ""
        )
        if op:
            yield guarded(op)
            if (
                "inside the root" in action and "div" in op
            ):  # the slope of a length that is zero breaks as well
                yield guarded(op) + guarded("sqrt")
        elif target.hidden:  # an operation of the user's own: it breaks where its arguments are large
            yield structure.norm_behind(target.hidden)


def divisors(target: Target, action: str) -> Iterator[Remedy]:
    """Keep divisors away from zero."""
    yield divisors_bounded()


def masked_by_zero(target: Target, action: str) -> Iterator[Remedy]:
    """An infinite factor: of a product of matrices it is what enters that is too large, else it is given."""
    if re.search(r"born in (?:matmul|mm|bmm|baddbmm|einsum|linear|scaled_dot)", target.description):
        fed = target.flow.wiring.after(target.node)
        alike = [target.module]
        for node in (n for f in fed for n in target.flow.wiring.before(f)):
            if target.flow.has_matrix(node):
                alike.append(module_of(layer_name(node)))
        yield structure.norm_behind(list(dict.fromkeys(alike)))
    else:
        yield guarded("mul")


def grown(target: Target, action: str) -> Iterator[Remedy]:
    """What enters an operation has grown: bound what makes it grow."""
    if "softmax" in action:
        yield guarded("softmax")
    if "exp" in target.ops():
        yield bounded_exponents()
    if target.hidden:
        yield structure.norm_behind(target.hidden)
