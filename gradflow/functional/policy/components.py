"""From what a step showed to the distributions that its actions are drawn from.

NOTE [What a head gives]
The strongest evidence is a distribution of `torch.distributions` made of a head's output; then a function
that takes logits, log-probabilities or probabilities; then values that are normalised, in the head's output
or in what the model makes of it; then names, `mean` and `log_std`. Where there is none of these, several
numbers per sample are taken for logits, unless they are bounded, by a tanh for instance. Which evidence it
was is kept with every distribution as its `evidence`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, distributions

from gradflow.functional.policy.scene import Gone, Scene, inside
from gradflow.functional.policy.seen import Seen, Seer, Use, column, is_normalised, is_view
from gradflow.functional.policy.statistics import (
    Distribution,
    family,
    is_discrete,
    own_copy,
    parts_of,
    probabilities,
)

_PLAIN = {"probs": "probabilities", "logits": "logits"}


@attrs.frozen(kw_only=True, eq=False)
class Component:
    """A distribution that actions are drawn from, in one step.

    Args:
        place: tells it from others made of the same heads.
        heads: modules that it is made of.
        parameters: names of parameters that enter it beside them.
        distribution: a copy without a graph.
        given, evidence, assumed, normalised_twice: see `gradflow.records.ActionDistribution`.
        part_dims: how many of its last batch dimensions are parts of one action.
    """

    place: int = 0
    heads: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    distribution: Distribution
    given: str
    evidence: str
    assumed: bool = False
    normalised_twice: bool = False
    part_dims: int = 0

    @property
    def key(self) -> tuple[tuple[str, ...], str, int]:
        """What it is recognised by in every step."""
        return self.heads, family(self.distribution), self.place


def components(
    scene: Scene, seer: Seer, heads: Sequence[str], parameters: Mapping[str, Tensor]
) -> list[Component]:
    """Return the distributions that are made of the policy's heads; see NOTE [What a head gives].

    Args:
        scene: the step.
        seer: what was done with tensors in it.
        heads: names of the policy's heads.
        parameters: the model's parameters by name.
    """
    near = _Builder(scene, heads, parameters)
    for builder in (near, attrs.evolve(near, deep=True)):
        seen = [s for s in seer.seen if builder.is_of_heads(s.tensors())]
        uses = [u for u in seer.uses if builder.is_of_heads([u.tensor])]
        if seen or any(u.tells for u in uses):
            break
    if any(t.requires_grad for s in seen for t in s.tensors()):  # others are of an older policy
        seen = [s for s in seen if any(t.requires_grad for t in s.tensors())]
    found = [builder.of_distribution(s) for s in seen]
    for names in _unknown(heads, found):
        part = attrs.evolve(builder, heads=names)
        own = [u for u in uses if part.is_of_heads([u.tensor])]
        found += part.of_uses(own) or part.of_values() or part.of_names() or part.assumed(own)
    return _distinct(found)


def _unknown(heads: Sequence[str], found: Sequence[Component]) -> list[list[str]]:
    """Return the heads that nothing is known of yet: one by one, but a mean and its deviation together."""
    left = [h for h in heads if not any(inside(known, h) for c in found for known in c.heads)]
    gaussian = [h for h in left if role(h)]
    return [[h] for h in left if h not in gaussian] + ([gaussian] if gaussian else [])


@attrs.define(eq=False)
class _Builder:
    """Makes components of what is known of some heads in a step.

    Args:
        scene: the step.
        heads: names of the heads.
        parameters: the model's parameters by name.
        deep: whether what is computed from the heads' outputs through other layers counts too.
    """

    scene: Scene
    heads: Sequence[str]
    parameters: Mapping[str, Tensor]
    deep: bool = False

    @property
    def outputs(self) -> list[Tensor]:
        """What the heads gave."""
        return [t for call in self.scene.calls_of(self.heads) for t in self.scene.outputs[call.index]]

    def is_of_heads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether tensors are made of the heads' outputs."""
        if self.deep:
            return self.scene.descends(tensors, self.outputs)
        return bool(self.scene.sources(tensors)[0] & self.scene.sources(self.outputs)[0])

    def of_distribution(self, seen: Seen) -> Component:
        """Make one of a distribution that was seen."""
        own = own_copy(seen.distribution)
        names = list(seen.given) or [n for n in own.arg_constraints if n in vars(own)]
        given = ", ".join(_PLAIN.get(n, n) for n in names) or "its parameters"
        raw = next((seen.given[n] for n in ("logits", "probs", "loc") if n in seen.given), None)
        twice = "logits" in seen.given and is_discrete(own) and is_normalised(seen.given["logits"])
        said = f"torch.distributions.{type(own).__name__} was made of it"
        return self._component(seen.tensors(), own, given, said, twice=twice == "probabilities", raw=raw)

    def of_uses(self, uses: Sequence[Use]) -> list[Component]:
        """Make some of functions that were applied."""
        telling = [u for u in uses if u.tells]
        views = [u for u in telling if any(is_view(u.tensor, t) for t in self.outputs)]
        twice = [u for u in telling if u.given == "logits" and is_normalised(u.tensor) == "probabilities"]
        found = []
        for use in twice[:1] or views or telling[:1]:
            x, more = use.tensor, use in twice
            own = _made(use.given, x.detach())
            said = f"{use.function} was applied to it"
            found.append(self._component([x], own, use.given, said, twice=more, raw=x))
        return found

    def of_values(self) -> list[Component]:
        """Make one of values that are normalised, in the model's output or the heads'."""
        made = [t for _, t in self.scene.named if self.is_of_heads([t])]
        for x in (*made, *self.outputs):
            if given := is_normalised(x):
                said = "its values are normalised"
                return [self._component([x], _made(given, x.detach()), given, said)]
        return []

    def of_names(self) -> list[Component]:
        """Make a Gaussian of a mean and a standard deviation that are called so."""
        found: dict[str, Tensor] = {}
        for call in self.scene.calls_of(self.heads):
            for t in self.scene.outputs[call.index]:
                found.setdefault(role(call.module), t)
        for name, t in self.scene.named:
            if self.is_of_heads([t]):
                found.setdefault(role(name), t)
        mean = found.get("mean", found.get("") if len(self.outputs) == 1 else None)
        for name, p in self.parameters.items():
            if mean is not None and mean.dim() and "std" in role(name) and p.shape[-1:] == mean.shape[-1:]:
                found.setdefault(role(name), p)
        spread = found.get("log std", found.get("std"))
        if mean is None or spread is None or not _fits(spread, mean):
            return []
        log = "log std" in found or not bool((spread > 0).all())
        std = spread.detach().exp() if log else spread.detach()
        own = distributions.Normal(mean.detach(), std.expand(mean.shape), validate_args=False)
        given = "mean, log of the standard deviation" if log else "mean, standard deviation"
        said = "they are called so, and no distribution was seen to be made of them"
        return [self._component([mean, spread], own, given, said)]

    def assumed(self, uses: Sequence[Use]) -> list[Component]:
        """Take several numbers per sample for logits, where nothing says what they are."""
        wide = [t for t in self.outputs if t.dim() and t.shape[-1] > 1]
        if uses or len(wide) != 1 or any(role(h) for h in self.heads):
            return []
        said = "nothing was seen that tells what it holds"
        own = _made("logits", wide[0].detach())
        return [attrs.evolve(self._component(wide, own, "logits", said), assumed=True)]

    def _component(
        self,
        tensors: Sequence[Tensor],
        own: Distribution,
        given: str,
        evidence: str,
        *,
        twice: bool = False,
        raw: Tensor | None = None,
    ) -> Component:
        calls, leaves = self.scene.sources(tensors)
        heads = self.scene.within(calls, self.heads) or tuple(self.heads)
        outputs = [t for i in sorted(calls) for t in self.scene.outputs.get(i, [])]
        outputs = [t for t in outputs if not isinstance(t, Gone)] or self.outputs
        used = {id(leaf) for leaf in leaves}
        return Component(
            place=column(raw, outputs) if raw is not None else 0,
            heads=heads,
            parameters=tuple(name for name, p in self.parameters.items() if id(p) in used),
            distribution=own,
            given=given,
            evidence=evidence,
            normalised_twice=twice,
            part_dims=_part_dims(own, outputs),
        )


def _fits(small: Tensor, large: Tensor) -> bool:
    """Whether a tensor can be broadcast to the shape of another."""
    pairs = zip(reversed(small.shape), reversed(large.shape), strict=False)
    return small.dim() <= large.dim() and all(a in (1, b) for a, b in pairs)


def _made(given: str, x: Tensor) -> Distribution:
    if given == "logits of yes or no":
        return distributions.Bernoulli(logits=x, validate_args=False)
    if given == "probabilities of yes":
        return distributions.Bernoulli(probs=x, validate_args=False)
    if given == "probabilities":
        return distributions.Categorical(probs=x, validate_args=False)
    return distributions.Categorical(logits=x, validate_args=False)


def _part_dims(distribution: Distribution, outputs: Sequence[Tensor]) -> int:
    """Return how many of the last batch dimensions are parts of an action, by the shape of the head's output.

    A head gives (samples..., features). So the last batch dimension of a distribution with as many of them,
    and no event dimension, is the parts; where the one feature of a head was squeezed away, there are none.
    """
    batch = distribution.batch_shape
    if not outputs or not batch:
        return 0
    more = len(batch) - (max(t.dim() for t in outputs) - 1)
    widths = {t.shape[-1] for t in outputs if t.dim()}
    if more <= 0 and not distribution.event_shape and not isinstance(distribution, distributions.Categorical):
        return int(batch[-1] > 1 and (batch[-1] in widths or 2 * batch[-1] in widths))
    return min(max(more, 0), 1)


def role(name: str) -> str:
    """Return what a name calls a tensor: `mean`, `std`, `log std`, or nothing."""
    words = set(re.findall(r"[a-z]+", name.rpartition(".")[2].lower()))
    joined = "".join(re.findall(r"[a-z]+", name.rpartition(".")[2].lower()))
    if any(w in joined for w in ("logstd", "logsigma", "logscale")):
        return "log std"
    if words & {"std", "sigma", "scale", "stddev"}:
        return "std"
    return "mean" if words & {"mu", "mean", "loc", "means"} else ""


def _distinct(found: Sequence[Component]) -> list[Component]:
    """Return components without those that repeat another: the same heads and places, the same values."""
    kept: list[Component] = []
    for component in found:
        if not any(_same(component, other) for other in kept):
            kept.append(component)
    return kept


def _same(a: Component, b: Component) -> bool:
    if a.key != b.key or a.distribution.batch_shape != b.distribution.batch_shape:
        return False
    x, y = (_values(c.distribution) for c in (a, b))
    return len(x) == len(y) and all(
        p.shape == q.shape and torch.allclose(p, q, rtol=1e-3, atol=1e-5, equal_nan=True)
        for p, q in zip(x, y, strict=True)
    )


def _values(distribution: Distribution) -> list[Tensor]:
    if is_discrete(distribution):
        return [probabilities(distribution)]
    return [
        v for d in (distribution, *parts_of(distribution)) for v in vars(d).values() if isinstance(v, Tensor)
    ]
