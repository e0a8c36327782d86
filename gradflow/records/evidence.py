"""What a detector knows of how an issue came about: `Evidence`, which the causes are read off, and `Role`."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable

import attrs

from gradflow.records.fields import NAN, float_field


class Role(enum.Enum):
    """The part that a layer plays in an illness, as far as it decides what the illness can bring about."""

    UNUSED = "unused"
    """No step runs it."""
    CUT = "cut"
    """It runs, and no path leads from the loss to it."""
    BLOCKING = "blocking"
    """The gradient that it hands back, or its parameters get, is made exactly zero right behind it."""
    BLOCKED = "blocked"
    """Its gradient is exactly zero, and another layer makes it so."""
    SILENT = "silent"
    """None of its units ever fires."""
    PARTLY_SILENT = "partly silent"
    """Some of its units never fire."""
    ABSORBING = "absorbing"
    """It hands back next to nothing of the gradient that it gets, so what is before it starves."""
    STARVED = "starved"
    """Too little of the gradient arrives at it."""
    OFF_SCALE = "off scale"
    """What it is trained towards is far from the scale of its outputs, from the first step on."""
    JUMPING = "jumping"
    """Steps of the optimizer that are too large show in it."""
    UNDEFINED = "undefined"
    """Its operation gives no finite value for what enters it, such as the logarithm of zero."""
    UNDERFLOWING = "underflowing"
    """What it hands back becomes zero because it is too small for the format of its numbers."""
    SUBNORMAL = "subnormal"
    """Its gradient is among the smallest numbers of its format, which take a processor long."""
    GIVEN = "given"
    """A value that is not finite comes in from outside: with the data, or in a parameter."""


# A layer plays at most one of these: they tell what becomes of the gradient that its parameters should get.
_ONE_OF = frozenset((Role.UNUSED, Role.CUT, Role.BLOCKING, Role.BLOCKED, Role.SILENT, Role.PARTLY_SILENT))


def _to_roles(value: Role | Iterable[Role]) -> tuple[Role, ...]:
    return (value,) if isinstance(value, Role) else tuple(dict.fromkeys(value))


@attrs.frozen(kw_only=True)
class Evidence:
    """What a detector knows of how an issue came about, for finding causes; all of it may be left out.

    `gradflow.find_causes` reads this and the place of the layer in the graph, and nothing else of an issue
    but its type and severity. So a detector of one's own takes part like a built-in one.

    Args:
        roles: the parts that the layer plays; one `Role`, or several.
        origin: name of the layer call at which what is missing here is lost, the issue's own layer if it is
            lost there; None where that is not one place, or not known.
        op: the operation that was seen to do it, such as `detach`; empty if none was.
        num_calls: of how many calls of the layer's module the issue speaks.
        developed: whether it was not there at the first steps, but came about while an optimizer stepped.
        growth: by how much signal or gradient grow here, as a factor; NaN where they do not, or it is not
            known.
        no_input: whether nothing but zeros enters it, so that what is before it is at fault.
        elsewhere: whether more of the decay or the growth happens in another part of the model.
        side_branch: whether it stands on a branch beside a path that gets more.
        undecided: whether the verdict hangs on what only full detail measures; `diagnose` then measures it.
        explained_by: name of the layer whose issue explains this one; set by `explain`, None where none does.

    >>> Evidence(roles=Role.ABSORBING).plays(Role.ABSORBING, Role.CUT)
    True
    """

    roles: tuple[Role, ...] = attrs.field(default=(), converter=_to_roles)
    origin: str | None = None
    op: str = ""
    num_calls: int = 1
    developed: bool = False
    growth: float = float_field(NAN)
    no_input: bool = False
    elsewhere: bool = False
    side_branch: bool = False
    undecided: bool = False
    explained_by: str | None = None

    def plays(self, *roles: Role) -> bool:
        """Whether the layer plays one of the roles."""
        return any(role in self.roles for role in roles)

    def merged(self, other: Evidence) -> Evidence:
        """Return what both know; of what they tell differently, `developed` included, what this one tells."""
        told = bool(_ONE_OF.intersection(self.roles))
        return Evidence(
            roles=(*self.roles, *(r for r in other.roles if not (told and r in _ONE_OF))),
            origin=self.origin if self.origin is not None else other.origin,
            op=self.op or other.op,
            num_calls=self.num_calls if self.num_calls != 1 else other.num_calls,
            developed=self.developed,
            growth=other.growth if math.isnan(self.growth) else self.growth,
            no_input=self.no_input or other.no_input,
            elsewhere=self.elsewhere or other.elsewhere,
            side_branch=self.side_branch or other.side_branch,
            undecided=self.undecided or other.undecided,
            explained_by=self.explained_by if self.explained_by is not None else other.explained_by,
        )
