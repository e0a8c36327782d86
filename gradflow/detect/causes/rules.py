"""The rules of what can bring about what, as a table to be read and added to; see `explains` for their use.

A backward illness travels from its place towards the input: where the gradient is lost, blown up or cut at
one layer, every layer upstream of it shows it. A forward illness (a silent layer, a blown up signal) travels
the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import attrs

from gradflow.detect.evidence import activations_of
from gradflow.detect.view import Flow
from gradflow.detect.wiring import node_name
from gradflow.errors import PipelineError
from gradflow.records import AnyIssueType, Issue, IssueSeverity, IssueType, Role

# Where the victim stands, seen from the cause: at the same layer call or module; upstream, so that the cause
# is between it and the loss; downstream; on another branch that ends in the same last layer; or apart.
Where = Literal["same", "upstream", "downstream", "beside", "apart"]
Condition = Callable[[Flow, Issue, Issue], bool]


def _to_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _check_where(instance: Any, attribute: Any, value: tuple[Any, ...]) -> None:
    known = get_args(Where)
    if unknown := [place for place in value if place not in known]:
        raise PipelineError(
            f"Rule: expected where to be some of {', '.join(known)}, got {unknown[0]!r}. For what a "
            "layer does to those before it, which get their gradient through it, write where='upstream'."
        )


def _check_conditions(instance: Any, attribute: Any, value: tuple[Any, ...]) -> None:
    for condition in value:
        if not callable(condition):
            raise PipelineError(
                f"Rule: expected when to be functions of (flow, cause, victim), got {condition!r}. Write, "
                "for instance, when=lambda flow, cause, victim: cause.severity > victim.severity."
            )


@attrs.frozen(kw_only=True)
class Rule:
    """What an issue of one kind can bring about.

    Args:
        cause: types of issue that can be the cause; one or several, none for any.
        victim: types of issue that it can bring about; one or several, none for any.
        where: where the victim stands, seen from the cause: `same` layer, `upstream` of it,
            `downstream`, `beside` it (on another branch that ends in the same last layer), `apart`; one or
            several.
        because: how it comes about, in one line.
        roles: of these the cause must play one; none for any.
        victim_roles: of these the victim must play one; none for any.
        when: functions of (flow, cause, victim) that must all be true; `flow.record` is the record.

    Raises:
        PipelineError: if `where` holds another word, or `when` something that is not a function.

    >>> rule = Rule(cause=IssueType.BOTTLENECK, victim=IssueType.VANISHING, where="upstream", because="...")
    >>> rule.where
    ('upstream',)
    """

    cause: tuple[AnyIssueType, ...] = attrs.field(converter=_to_tuple)
    victim: tuple[AnyIssueType, ...] = attrs.field(converter=_to_tuple)
    where: tuple[Where, ...] = attrs.field(converter=_to_tuple, validator=_check_where)
    because: str
    roles: tuple[Role, ...] = attrs.field(default=(), converter=_to_tuple)
    victim_roles: tuple[Role, ...] = attrs.field(default=(), converter=_to_tuple)
    when: tuple[Condition, ...] = attrs.field(default=(), converter=_to_tuple, validator=_check_conditions)

    def holds(self, flow: Flow, cause: Issue, victim: Issue, where: Where) -> bool:
        """Whether the rule says that an issue can have brought another about, which stands there."""
        return (
            where in self.where
            and (not self.cause or cause.issue_type in self.cause)
            and (not self.victim or victim.issue_type in self.victim)
            and (not self.roles or cause.evidence.plays(*self.roles))
            and (not self.victim_roles or victim.evidence.plays(*self.victim_roles))
            and all(condition(flow, cause, victim) for condition in self.when)
        )


# ------------------------------------------------------------------------------- conditions


def _named(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim names the cause's layer as the place where what it lacks is lost."""
    return victim.evidence.origin == cause.layer


def _strong(flow: Flow, cause: Issue, victim: Issue) -> bool:
    return cause.severity >= IssueSeverity.HIGH


def _developed(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim came about in training, of numbers that had grown too large."""
    return _grown_in_training(victim) and victim.issue_type != cause.issue_type


def _there_before(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The cause is not what the steps of the optimizer made of the victim."""
    return not (victim.evidence.plays(Role.JUMPING) and _grown_in_training(cause))


def _as_early(flow: Flow, cause: Issue, victim: Issue) -> bool:
    return victim.evidence.developed or not cause.evidence.developed


def _grown_in_training(issue: Issue) -> bool:
    return issue.evidence.developed and not issue.evidence.plays(Role.UNDEFINED)


def _overflows(flow: Flow, cause: Issue, victim: Issue) -> bool:
    return not victim.evidence.plays(Role.UNDEFINED, Role.SUBNORMAL)


def _fed(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """Something enters the cause, which could pass it on; else what is before it is at fault."""
    return not cause.evidence.no_input


def _fed_or_silent(flow: Flow, cause: Issue, victim: Issue) -> bool:
    return not cause.evidence.no_input or victim.evidence.plays(*_SILENT)


def _on_the_way(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The gradient has no way round the cause."""
    return not cause.evidence.side_branch


def _not_blocked(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """A zero that another layer makes is no cause, unless that very place is named."""
    return not cause.evidence.plays(Role.BLOCKED)


def _not_blocking(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """Where all units of a module are silent, it is what feeds it that is at fault."""
    return not victim.evidence.plays(Role.BLOCKING)


def _not_constant(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim does not give a constant by its make, which an activation behind it only passes on."""
    return not (victim.evidence.plays(Role.BLOCKING) and victim.severity > cause.severity)


def _other(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """A part without gradient whose zeros are nothing that a layer or a rectifier makes."""
    return not cause.evidence.plays(Role.BLOCKED, Role.BLOCKING, *_SILENT)


def _not_silent(flow: Flow, cause: Issue, victim: Issue) -> bool:
    return not victim.evidence.plays(*_SILENT)


def _starved_of_input(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim's gradient is lost here, or nothing enters it, or it is not known where it is lost."""
    return victim.evidence.origin in (None, cause.layer) or victim.evidence.no_input


def _shows_more(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """No one layer loses the gradient, each a little: it is reported where it shows most."""
    gradual = cause.evidence.origin is None and victim.evidence.origin is None
    return gradual and shown(flow, cause) < shown(flow, victim)


def _behind_the_cut(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """The victim runs before the cut, where the graph cannot tell: both are unreachable."""
    op = victim.evidence.op
    if node_name(victim.layer) in flow.wiring.fed_by(node_name(cause.layer)):
        # With an operation of its own that cuts it, mending the other one would not mend the victim.
        return op in ("", cause.evidence.op)
    a, b = (flow.layers.get(node_name(issue.layer)) for issue in (cause, victim))
    same_part = cause.layer.split(".")[0] == victim.layer.split(".")[0]
    same_part |= not flow.wiring.known or flow.reaches_nothing
    return bool(a and b and same_part and a.order > b.order and not op)


def _not_finite(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """Both are of values that are not finite, rather than of a processor that is slow."""
    return not any(issue.evidence.plays(Role.SUBNORMAL) for issue in (cause, victim))


def _picks(flow: Flow, cause: Issue, victim: Issue) -> bool:
    """A router that picks several of a numbered list of parts, never this one; one alone is no pick."""
    parts, _, number = victim.layer.rpartition(".")
    softmax = any(a.kind == "softmax" for a in activations_of(flow, node_name(cause.layer)))
    ran = {m[len(parts) :].split(".")[1] for m in flow.modules_below(parts)}
    beside = f".{cause.layer}".startswith(f".{parts}".rpartition(".")[0])
    return softmax and beside and number.isdigit() and len(ran) > 1


def _of_own_type(flow: Flow, cause: Issue, victim: Issue) -> bool:
    return victim.issue_type not in PRECEDENCE


def is_lent(issue: Issue) -> bool:
    """Whether an issue plays a role that is another type's own: it stops the gradient, and is neither
    VANISHING nor DEAD."""
    own = issue.issue_type in (IssueType.VANISHING, IssueType.DEAD)
    return not own and issue.evidence.plays(Role.ABSORBING, Role.BLOCKING)


def _lent(flow: Flow, cause: Issue, victim: Issue) -> bool:
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


# -------------------------------------------------------------------------------- the table

_T = IssueType
_SILENT = (Role.SILENT, Role.PARTLY_SILENT)
_BOTH = ("upstream", "downstream")
_ANYWHERE = get_args(Where)

RULES: tuple[Rule, ...] = (
    # DEAD: exact zeros travel back, and silence forward.
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where=_BOTH, roles=Role.BLOCKED, when=_named,
        because="the victim's gradient is lost at that very layer",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="upstream", roles=Role.BLOCKING, when=_fed_or_silent,
        because="exact zeros come back from it",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="upstream", roles=_SILENT, when=(_strong, _not_blocking),
        because="nothing comes back through units that do not fire",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="upstream", when=(_other, _not_silent),
        because="what the loss does not reach hands nothing back",
    ),
    Rule(
        cause=_T.DEAD, victim=(_T.VANISHING, _T.BOTTLENECK), where="upstream",
        when=(_strong, _not_blocked, _fed), because="little or nothing comes back from it",
    ),
    Rule(
        cause=_T.DEAD, victim=(_T.VANISHING, _T.BOTTLENECK), where="same", when=(_strong, _not_blocked),
        because="it is the same layer, and zero is what is left of a small gradient",
    ),
    Rule(
        cause=_T.DEAD, victim=(_T.DEAD, _T.BOTTLENECK), where="downstream", roles=_SILENT,
        when=(_strong, _not_blocking, _starved_of_input), because="a silent layer passes nothing on",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="downstream", roles=Role.BLOCKING, when=_starved_of_input,
        because="a layer that only gives zeros starves the weights behind it of input",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.BOTTLENECK, where="downstream", roles=Role.BLOCKING, when=_strong,
        because="a layer that only gives zeros starves what is behind it",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="downstream", when=(_other, _not_silent, _named),
        because="the victim's gradient is lost at that very layer",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where=("beside", "apart"), roles=Role.CUT, victim_roles=Role.CUT,
        when=_behind_the_cut, because="what runs before the cut loses its gradient with it",
    ),
    # VANISHING: what absorbs the gradient starves those before it; so does a little loss at every layer.
    Rule(
        cause=_T.VANISHING, victim=_T.VANISHING, where=(*_BOTH, "beside"), roles=Role.ABSORBING, when=_named,
        because="the gradient that the victim lacks is lost there",
    ),
    Rule(
        cause=_T.VANISHING, victim=_T.VANISHING, where=(*_BOTH, "beside"), victim_roles=Role.STARVED,
        when=_shows_more, because="every layer on the way loses a little, and it shows there most",
    ),
    Rule(
        cause=_T.VANISHING, victim=_T.BOTTLENECK, where=(*_BOTH, "same"),
        because="rows become alike where signal and gradient die out",
    ),
    Rule(
        cause=_T.VANISHING, victim=_T.DEAD, where=(*_BOTH, "same"), victim_roles=Role.PARTLY_SILENT,
        because="where the signal is too small, the biases decide which units fire",
    ),
    Rule(
        cause=_T.VANISHING, victim=(_T.VANISHING, _T.DEAD, _T.BOTTLENECK), where=("upstream", "same"),
        roles=Role.UNDERFLOWING, because="what is too small for its format is zero from there on",
    ),
    Rule(
        cause=(_T.VANISHING, _T.DEAD), victim=_T.NUMERICAL, where=_ANYWHERE, victim_roles=Role.SUBNORMAL,
        because="a gradient that decays passes the smallest numbers of its format before it is zero",
    ),
    # SATURATION: a slope that is gone lets nothing back.
    Rule(
        cause=_T.SATURATION, victim=(_T.VANISHING, _T.DEAD), where=("upstream", "same"), when=_not_constant,
        because="nothing comes back through a slope that is gone",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.DEAD, where=_ANYWHERE, victim_roles=Role.BLOCKED, when=_named,
        because="it feeds the very slope that is gone",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.DEAD, where=_ANYWHERE, victim_roles=Role.UNUSED, when=_picks,
        because="what a softmax at its ends picks from never comes to be picked",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.SATURATION, where=_BOTH,
        because="extreme outputs drive what is behind, and what is before learns nothing against it",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.UNSTABLE, where=("upstream", "same"), when=_there_before,
        because="gradient passes in the rare steps that are not saturated",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.BOTTLENECK, where="downstream",
        because="saturated units give the same for all samples",
    ),
    # EXPLODING: what grows overflows, saturates and jumps.
    Rule(
        cause=_T.EXPLODING, victim=_T.EXPLODING, where=_BOTH, when=_as_early,
        because="growth along one path multiplies, from when it began",
    ),
    Rule(
        cause=_T.EXPLODING, victim=_T.NUMERICAL, where=(*_BOTH, "same"), when=_overflows,
        because="what grows without end leaves the range of floats",
    ),
    Rule(
        cause=_T.EXPLODING, victim=_T.UNSTABLE, where=(*_BOTH, "same"), when=_there_before,
        because="steps grow with the gradient",
    ),
    Rule(
        cause=_T.EXPLODING, victim=_T.SATURATION, where=("downstream", "same"),
        because="a blown up signal drives what is behind it into its flat ends",
    ),
    Rule(
        cause=_T.EXPLODING, victim=_T.DEAD, where="downstream",
        because="a blown up signal switches units behind it off for good",
    ),
    # NUMERICAL: a value that is not finite spreads both ways, and makes what looks like growth.
    Rule(
        cause=_T.NUMERICAL, victim=_T.NUMERICAL, where=_BOTH, when=_not_finite,
        because="a value that is not finite spreads",
    ),
    Rule(
        cause=_T.NUMERICAL, victim=(_T.EXPLODING, _T.UNSTABLE), where=(*_BOTH, "same"),
        roles=(Role.UNDEFINED, Role.GIVEN), when=_there_before,
        because="it spreads, and next to where an operation is not defined slopes have no bound",
    ),
    # BOTTLENECK: what does not pass is missing before it.
    Rule(
        cause=_T.BOTTLENECK, victim=_T.VANISHING, where="upstream", when=_on_the_way,
        because="what does not pass the narrow place is missing before it",
    ),
    Rule(
        cause=_T.BOTTLENECK, victim=_T.BOTTLENECK, where=_BOTH,
        because="what is alike, or missing, at one place stays so behind it, and teaches the same before it",
    ),
    # UNSTABLE: steps that are too large leave a model that is sick in other ways.
    Rule(
        cause=_T.UNSTABLE, victim=(), where=_ANYWHERE, roles=Role.JUMPING, when=_developed,
        because="the steps of the optimizer brought it about: it was not there before",
    ),
    Rule(
        cause=_T.UNSTABLE, victim=_T.VANISHING, where="upstream",
        because="gradients that jump are near nothing in between",
    ),
    # Any type, one of one's own too, by the role that its evidence tells.
    Rule(
        cause=(), victim=(_T.VANISHING, _T.BOTTLENECK), where=("upstream", "same"),
        roles=(Role.ABSORBING, Role.BLOCKING), when=_lent,
        because="next to nothing of the gradient comes back through it",
    ),
    Rule(
        cause=(), victim=_T.DEAD, where=("upstream", "same"), roles=Role.BLOCKING, when=_lent,
        because="exact zeros come back from it",
    ),
    Rule(
        cause=(), victim=(), where=("upstream", "downstream", "beside", "apart"), when=(_of_own_type, _named),
        because="the victim's own detector names it as the origin",
    ),
)  # fmt: skip
"""What the built-in types bring about, and any type by the role of its layer."""

# Where two types could each explain the other: what is the more basic event. Types not named come last.
PRECEDENCE: dict[AnyIssueType, int] = {
    kind: i
    for i, kind in enumerate(
        (_T.NUMERICAL, _T.EXPLODING, _T.DEAD, _T.SATURATION, _T.VANISHING, _T.UNSTABLE, _T.BOTTLENECK)
    )
}


def precedence(issue: Issue) -> int:
    """Return the place of an issue's type in `PRECEDENCE`."""
    return PRECEDENCE.get(issue.issue_type, len(PRECEDENCE))
