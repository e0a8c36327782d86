"""Conditions on a cause and a victim, in the light of what was measured, that the rules ask for."""

from __future__ import annotations

import math

import numpy as np

from gradflow.detect import squashed
from gradflow.detect.evidence import activations_of, late
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.records import AnyIssueType, Issue, IssueSeverity, IssueType, Role

SILENT = (Role.SILENT, Role.PARTLY_SILENT)
_MUCH_TOO_HIGH = 10.0  # by what factor a rate is, whose steps change what a model is
_OVERFLOWING = 11.0  # of an exponent, in the format of the least range
_THROWN = 10.0  # times its start: to where a loss was thrown before anything overflowed
# Where two types could each explain the other: what is the more basic event. Types not named come last.
PRECEDENCE: dict[AnyIssueType, int] = {
    kind: i
    for i, kind in enumerate(
        (
            IssueType.NUMERICAL,
            IssueType.EXPLODING,
            IssueType.DEAD,
            IssueType.SATURATION,
            IssueType.VANISHING,
            IssueType.UNSTABLE,
            IssueType.BOTTLENECK,
        )
    )
}


def named(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim names the cause's layer as the place where what it lacks is lost."""
    return victim.evidence.origin == cause.layer


def strong(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is HIGH at least."""
    return cause.severity >= IssueSeverity.HIGH


def developed(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim came about in training, of numbers that had grown too large."""
    return grown_in_training(victim) and victim.issue_type != cause.issue_type


def there_before(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is not what the steps of the optimizer made of the victim."""
    jumping = victim.evidence.plays(Role.JUMPING)
    return not (jumping and (grown_in_training(cause) or thrown_into(flow, victim, cause)))


def thrown_into(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """What was measured as too high a rate had thrown the loss to many times its start before a value
    overflowed in an exponential: what entered had grown. A logarithm, a root or a quotient of zero may come
    about in any run."""
    overflow = victim.metrics.get("value") == "inf" and victim.evidence.op.lower().startswith("exp")
    if not overflow or not math.isfinite(cause.metrics.get("rate_factor", math.nan)):
        return False
    before = flow.record.losses[: victim.metrics.get("step", 0)]
    if not (len(before) > 1 and np.isfinite(before).all() and before[0] > 0):
        return False
    return float(before.max()) >= _THROWN * float(before[0])


def grows_into(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is something that grew in training, and the victim was not there before it did."""
    return cause.evidence.growth > 1 and grown_in_training(cause) and victim.evidence.developed


def driven_up(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim is of what grew within the run, and the cause is a rate that was measured as too high by an
    order of magnitude: steps as large as the weights drive up whatever they reach."""
    measured = cause.metrics.get("rate_factor", math.nan) >= _MUCH_TOO_HIGH
    grown = victim.evidence.growth > 1 and grown_in_training(victim)
    return measured and grown and not victim.evidence.plays(Role.JUMPING)


def left_at_zero(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is of steps that were measured as far too short, and the gradient that the victim lacks is
    lost at a matrix that began at zero, out of which they do not lead."""
    place = node_name(victim.layer if victim.evidence.origin is None else victim.evidence.origin)
    measured = "factor" in cause.metrics and math.isfinite(cause.metrics.get("best", math.nan))
    if not measured or place not in flow.layers:
        return False
    weights = [p for p in flow.parameters_of(place) if len(p.shape) > 1 and len(p.norm)]
    return any(p.trainable and p.norm[0] == 0 for p in weights)


def still_heard(flow: Flow, issue: Issue) -> bool:
    """Whether a probability that the model gives is at its end, and the loss still hears what enters it."""
    known = issue.metrics
    if not {"op", "fed_by", "input_rms"} <= known.keys():
        return False
    feeder, op = node_name(str(known["fed_by"])), str(known["op"])
    return squashed.still_heard(flow, node_name(issue.layer), op, feeder, float(known["input_rms"]))


def not_grown_into(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is not what the victim, which grew in training, came to."""
    return not grows_into(flow, victim, cause)


def as_early(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause was there as early as the victim."""
    return victim.evidence.developed or not cause.evidence.developed


def grown_in_training(issue: Issue) -> bool:
    """Whether an issue came about within the run, and not by an operation outside its domain."""
    return issue.evidence.developed and not issue.evidence.plays(Role.UNDEFINED)


def overflows(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """What is not finite at the victim may be an overflow."""
    return not victim.evidence.plays(Role.UNDEFINED, Role.SUBNORMAL) or drives(flow, cause, victim)


def drives(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """An exponential has overflowed in the course of the run, and the cause was there from its first step:
    what entered had grown. An exponential is defined everywhere, a logarithm or a quotient is not."""
    overflow = victim.metrics.get("value") == "inf" and victim.evidence.op.lower().startswith("exp")
    large = victim.metrics.get("input_max", 0.0) >= _OVERFLOWING
    return overflow and large and victim.evidence.developed and not cause.evidence.developed


def not_driven(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is not what the victim, which was there before it, came to in the end."""
    return not drives(flow, victim, cause)


def fed(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """Something enters the cause, which could pass it on; else what is before it is at fault."""
    return not cause.evidence.no_input


def fed_or_silent(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause gets an input, or the victim is silent."""
    return not cause.evidence.no_input or victim.evidence.plays(*SILENT)


def on_the_way(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The gradient has no way round the cause."""
    return not cause.evidence.side_branch


def not_blocked(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """A zero that another layer makes is no cause, unless that very place is named."""
    return not cause.evidence.plays(Role.BLOCKED)


def not_blocking(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """Where all units of a module are silent, it is what feeds it that is at fault."""
    return not victim.evidence.plays(Role.BLOCKING)


def not_constant(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim does not give a constant by its make, which an activation behind it only passes on."""
    return not (victim.evidence.plays(Role.BLOCKING) and victim.severity > cause.severity)


def other(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """A part without gradient whose zeros are nothing that a layer or a rectifier makes."""
    return not cause.evidence.plays(Role.BLOCKED, Role.BLOCKING, *SILENT)


def not_silent(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim is not silent."""
    return not victim.evidence.plays(*SILENT)


def starved_of_input(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim's gradient is lost here, or nothing enters it, or it is not known where it is lost."""
    return victim.evidence.origin in (None, cause.layer) or victim.evidence.no_input


def shows_more(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """No one layer loses the gradient, each a little: it is reported where it shows most."""
    gradual = cause.evidence.origin is None and victim.evidence.origin is None
    on_the_way = bool(cause.evidence.roles) or order(flow, cause) >= 0  # and not of all that is trained
    return gradual and on_the_way and shown(flow, cause) < shown(flow, victim)


def behind_the_cut(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim runs before the cut, where the graph cannot tell: both are unreachable."""
    op, feeding = victim.evidence.op, flow.wiring.fed_by(node_name(cause.layer))
    if node_name(victim.layer) in feeding:
        # With an operation of its own that cuts it, mending the other one would not mend the victim.
        return op in ("", cause.evidence.op)
    a, b = (flow.layers.get(node_name(issue.layer)) for issue in (cause, victim))
    part = cause.layer.split(".")[0]
    same_part = part == victim.layer.split(".")[0]
    same_part |= not flow.wiring.known or flow.reaches_nothing
    if not (a and b and same_part and a.order > b.order) or op:
        return False
    # Where the gradient comes to what runs between them, as in every block of several, each is cut by itself.
    run = [x for x in flow.layers.values() if b.order < x.order < a.order and x.name.split(".")[0] == part]
    return not any(layer.reached.any() and not layer.composite for layer in run)


def wrecked(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The model came to the run knowing, and lost it by steps that were too large: what is wrong with it at
    the end, unless exact zeros, is what they have made of it. A tenth of what ignorance costs: a head that
    starts at the share of a rare class may have a quarter, and knows nothing else. Nothing is known where the
    loss holds no sample against its own target."""
    known, losses = flow.record.knowledge, flow.record.losses
    exact = victim.evidence.plays(Role.CUT, Role.UNUSED, Role.BLOCKED, Role.BLOCKING, *SILENT)
    jumps = victim.issue_type in (IssueType.UNSTABLE, IssueType.EXPLODING, IssueType.NUMERICAL)
    if (
        known is None
        or known.by_mean
        or known.crossed
        or exact
        or jumps
        or not len(losses)
        or not 0 < known.ignorance < math.inf
    ):
        return False
    return bool(0 <= losses[0] <= 0.1 * known.ignorance and late(losses) >= 0.5 * known.ignorance)


def not_finite(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """Both are of values that are not finite, rather than of a processor that is slow."""
    return not any(issue.evidence.plays(Role.SUBNORMAL) for issue in (cause, victim))


def swallowed(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is of a value that is not finite and that an operation has swallowed, gradient and all."""
    return bool(cause.metrics.get("swallowed_by"))


def picks(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """A router that picks several of a numbered list of parts, never this one; one alone is no pick."""
    parts, _, number = victim.layer.rpartition(".")
    softmax = any(a.kind == "softmax" for a in activations_of(flow, node_name(cause.layer)))
    ran = {m[len(parts) :].split(".")[1] for m in flow.modules_below(parts)}
    beside = f".{cause.layer}".startswith(f".{parts}".rpartition(".")[0])
    return softmax and beside and number.isdigit() and len(ran) > 1


def few_codes(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is a table of which next to no code is picked, and the victim runs after it. No gradient
    leads from one to the other where codes are handed on straight through, so that order tells."""
    return "num_codes" in cause.metrics and 0 <= order(flow, cause) < order(flow, victim)


def of_own_type(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim is of a type of the user's own."""
    return victim.issue_type not in PRECEDENCE


def is_lent(issue: Issue) -> bool:
    """Whether an issue plays a role that is another type's own: it stops the gradient, and is neither
    VANISHING nor DEAD."""
    own = issue.issue_type in (IssueType.VANISHING, IssueType.DEAD)
    return not own and issue.evidence.plays(Role.ABSORBING, Role.BLOCKING)


def lent(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause only passes on what another one does."""
    return is_lent(cause)


def shown(flow: Flow, issue: Issue) -> tuple[bool, bool, bool, int]:
    """Smaller where a loss of gradient shows more: further from the loss, but in the part of the model that
    loses it, and neither at a table, which nothing flows through, nor on a side branch, which gets less than
    what it branches off from for reasons of its own."""
    known, node = issue.evidence, node_name(issue.layer)
    return (flow.is_table(node), known.elsewhere, known.side_branch, order(flow, issue))


def order(flow: Flow, issue: Issue) -> int:
    """Return the place of an issue's layer in the order of execution; -1 if it did not run."""
    return layer.order if (layer := flow.layers.get(node_name(issue.layer))) else -1


def precedence(issue: Issue) -> int:
    """Return the place of an issue's type in `PRECEDENCE`."""
    return PRECEDENCE.get(issue.issue_type, len(PRECEDENCE))
