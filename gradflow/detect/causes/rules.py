"""The rules of what can bring about what, as a table to be read and added to; see `explains` for their use.

A backward illness travels from its place towards the input: where the gradient is lost, blown up or cut at
one layer, every layer upstream of it shows it. A forward illness (a silent layer, a blown up signal) travels
the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import attrs

from gradflow.detect.causes import conditions as _if
from gradflow.detect.view import Flow
from gradflow.errors import PipelineError
from gradflow.records import AnyIssueType, Issue, IssueType, Role

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


# -------------------------------------------------------------------------------- the table

_T = IssueType
_SILENT = _if.SILENT
_BOTH = ("upstream", "downstream")
_ANYWHERE = get_args(Where)

RULES: tuple[Rule, ...] = (
    # DEAD: exact zeros travel back, and silence forward.
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where=_BOTH, roles=Role.BLOCKED, when=_if.named,
        because="the victim's gradient is lost at that very layer",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="upstream", roles=Role.BLOCKING, when=_if.fed_or_silent,
        because="exact zeros come back from it",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="beside", roles=Role.BLOCKING, when=_if.named,
        because="the victim's gradient is lost at the same place",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="upstream", roles=_SILENT, when=(_if.strong, _if.not_blocking),
        because="nothing comes back through units that do not fire",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="upstream", when=(_if.other, _if.not_silent),
        because="what the loss does not reach hands nothing back",
    ),
    Rule(
        cause=_T.DEAD, victim=(_T.VANISHING, _T.BOTTLENECK), where="upstream",
        when=(_if.strong, _if.not_blocked, _if.fed), because="little or nothing comes back from it",
    ),
    Rule(
        cause=_T.DEAD, victim=(_T.VANISHING, _T.BOTTLENECK), where="same", when=(_if.strong, _if.not_blocked),
        because="it is the same layer, and zero is what is left of a small gradient",
    ),
    Rule(
        cause=_T.DEAD, victim=(_T.DEAD, _T.BOTTLENECK), where="downstream", roles=_SILENT,
        when=(_if.strong, _if.not_blocking, _if.starved_of_input), because="a silent layer passes nothing on",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="downstream", roles=Role.BLOCKING, when=_if.starved_of_input,
        because="a layer that only gives zeros starves the weights behind it of input",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.BOTTLENECK, where="downstream", roles=Role.BLOCKING, when=_if.strong,
        because="a layer that only gives zeros starves what is behind it",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where="downstream", when=(_if.other, _if.not_silent, _if.named),
        because="the victim's gradient is lost at that very layer",
    ),
    Rule(
        cause=_T.DEAD, victim=_T.DEAD, where=("beside", "apart"), roles=Role.CUT, victim_roles=Role.CUT,
        when=_if.behind_the_cut, because="what runs before the cut loses its gradient with it",
    ),
    # VANISHING: what absorbs the gradient starves those before it; so does a little loss at every layer.
    Rule(
        cause=_T.VANISHING, victim=_T.VANISHING, where=(*_BOTH, "beside"), roles=Role.ABSORBING,
        when=_if.named,
        because="the gradient that the victim lacks is lost there",
    ),
    Rule(
        cause=_T.VANISHING, victim=_T.VANISHING, where=(*_BOTH, "beside"), victim_roles=Role.STARVED,
        when=_if.shows_more, because="every layer on the way loses a little, and it shows there most",
    ),
    Rule(
        cause=(_T.VANISHING, _T.UNSTABLE), victim=_T.VANISHING, where=_ANYWHERE, when=_if.left_at_zero,
        because="steps that are far too short do not lead out of a start at zero, which hands back nothing",
    ),
    Rule(
        cause=_T.VANISHING, victim=_T.BOTTLENECK, where=("downstream", "same"),
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
        cause=_T.SATURATION, victim=(_T.VANISHING, _T.DEAD), where=("upstream", "same"),
        when=_if.not_constant,
        because="nothing comes back through a slope that is gone",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.DEAD, where=_ANYWHERE, victim_roles=Role.BLOCKED, when=_if.named,
        because="it feeds the very slope that is gone",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.DEAD, where=_ANYWHERE, victim_roles=Role.UNUSED, when=_if.picks,
        because="what a softmax at its ends picks from never comes to be picked",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.SATURATION, where=_BOTH,
        because="extreme outputs drive what is behind, and what is before learns nothing against it",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.UNSTABLE, where=("upstream", "same"),
        when=(_if.there_before, _if.not_grown_into),
        because="gradient passes in the rare steps that are not saturated",
    ),
    Rule(
        cause=_T.SATURATION, victim=_T.BOTTLENECK, where="downstream",
        because="saturated units give the same for all samples",
    ),
    # EXPLODING: what grows overflows, saturates and jumps.
    Rule(
        cause=_T.EXPLODING, victim=_T.EXPLODING, where=_BOTH, when=_if.as_early,
        because="growth along one path multiplies, from when it began",
    ),
    Rule(
        cause=_T.EXPLODING, victim=_T.NUMERICAL, where=(*_BOTH, "same"), when=_if.overflows,
        because="what grows without end leaves the range of floats",
    ),
    Rule(
        cause=_T.EXPLODING, victim=_T.UNSTABLE, where=(*_BOTH, "same"), when=_if.there_before,
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
        cause=_T.NUMERICAL, victim=_T.NUMERICAL, where=_BOTH, when=_if.not_finite,
        because="a value that is not finite spreads",
    ),
    Rule(
        cause=_T.NUMERICAL, victim=(_T.EXPLODING, _T.UNSTABLE), where=(*_BOTH, "same"),
        roles=(Role.UNDEFINED, Role.GIVEN), when=(_if.there_before, _if.not_driven),
        because="it spreads, and next to where an operation is not defined slopes have no bound",
    ),
    Rule(
        cause=_T.NUMERICAL, victim=(_T.DEAD, _T.VANISHING, _T.BOTTLENECK), where=_ANYWHERE,
        when=_if.swallowed,
        because="the gradient went with the value that is not finite",
    ),
    # BOTTLENECK: what does not pass is missing before it.
    Rule(
        cause=_T.BOTTLENECK, victim=_T.VANISHING, where="upstream", when=_if.on_the_way,
        because="what does not pass the narrow place is missing before it",
    ),
    Rule(
        cause=_T.BOTTLENECK, victim=_T.BOTTLENECK, where=_BOTH,
        because="what is alike, or missing, at one place stays so behind it, and teaches the same before it",
    ),
    Rule(
        cause=_T.BOTTLENECK, victim=_T.BOTTLENECK, where=("beside", "apart"), when=_if.few_codes,
        because="all that passes a table of codes is said with those that are picked",
    ),
    # UNSTABLE: steps that are too large leave a model that is sick in other ways.
    Rule(
        cause=_T.UNSTABLE, victim=(), where=_ANYWHERE, roles=Role.JUMPING, when=_if.developed,
        because="the steps of the optimizer brought it about: it was not there before",
    ),
    Rule(
        cause=_T.UNSTABLE, victim=_T.UNSTABLE, where=_ANYWHERE, roles=Role.JUMPING, when=_if.driven_up,
        because="updates as large as the weights drive up whatever they reach",
    ),
    Rule(
        cause=_T.UNSTABLE, victim=_T.NUMERICAL, where=_ANYWHERE, roles=Role.JUMPING, when=_if.thrown_into,
        because="steps that are too large had thrown the loss far off before its exponential overflowed",
    ),
    Rule(
        cause=_T.UNSTABLE, victim=(_T.VANISHING, _T.DEAD, _T.SATURATION, _T.BOTTLENECK), where=_ANYWHERE,
        roles=Role.JUMPING, when=_if.wrecked,
        because="the model came knowing, and the steps of the optimizer have thrown it out of that",
    ),
    Rule(
        cause=_T.UNSTABLE, victim=_T.VANISHING, where="upstream",
        because="gradients that jump are near nothing in between",
    ),
    Rule(
        cause=_T.UNSTABLE, victim=_T.SATURATION, where="same", when=_if.grows_into,
        because="scores that training drives up drive the exponential that they enter to its ends",
    ),
    # Any type, one of one's own too, by the role that its evidence tells.
    Rule(
        cause=(), victim=(_T.VANISHING, _T.BOTTLENECK), where=("upstream", "same"),
        roles=(Role.ABSORBING, Role.BLOCKING), when=_if.lent,
        because="next to nothing of the gradient comes back through it",
    ),
    Rule(
        cause=(), victim=_T.DEAD, where=("upstream", "same"), roles=Role.BLOCKING, when=_if.lent,
        because="exact zeros come back from it",
    ),
    Rule(
        cause=(), victim=(), where=("upstream", "downstream", "beside", "apart"),
        when=(_if.of_own_type, _if.named),
        because="the victim's own detector names it as the origin",
    ),
)  # fmt: skip
"""What the built-in types bring about, and any type by the role of its layer."""
