"""Whether a step weighs the log-probabilities of choices, as a policy gradient does.

NOTE [What tells a policy from a classifier]
Both make a distribution of a layer's output, and both raise the log-probability of a choice. A classifier,
a language model, a density raises that of every target, all alike or by weights of one sign. A policy raises
some and lowers others, by what they brought. So the log-probabilities of single choices are followed: what
`log_prob` of a distribution gives, what is gathered from a softmax or its logarithm, and an unreduced
cross-entropy. The derivatives of the loss with respect to them are the weights. Weights of both signs make a
policy. So do weights of one sign that differ from sample to sample, where the distribution is asked for its
entropy besides, or model or head is called a policy or an actor; and, with such a name, any at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.measurement import gradients
from gradflow.functional.policy.seen import Distribution
from gradflow.functional.tap.nodes import feeds
from gradflow.functional.tap.probes import is_probe

_WORDS = frozenset(("policy", "policies", "actor", "actors", "pi"))
_BOTH = 0.02  # of all weights, by size: the least of the rarer sign
_PICKS = frozenset(("gather", "__getitem__", "take_along_dim", "index_select"))
_LOSSES = frozenset(("cross_entropy", "nll_loss"))


def is_policy_name(name: str) -> bool:
    """Whether a name says that something is a policy.

    >>> is_policy_name("ActorCriticPolicy"), is_policy_name("actor.mu"), is_policy_name("factory")
    (True, True, False)
    """
    return any(word.lower() in _WORDS for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name))


@attrs.define(eq=False)
class _Chosen:
    """Log-probabilities (or probabilities) of single choices.

    Args:
        values: the tensor.
        what: where they come from, in words.
        distribution: id of the distribution that was asked, or 0.
    """

    values: Tensor
    what: str
    distribution: int = 0


class Weighed:
    """Follows the log-probabilities of choices through one step; see NOTE [What tells a policy ...]."""

    def __init__(self) -> None:
        self._chosen: dict[Any, _Chosen] = {}
        self._soft: dict[int, Any] = {}  # by node: what a softmax, or its logarithm, gave
        self._entropies: set[int] = set()

    def hear(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        frames: Sequence[FrameType],
    ) -> Callable[[Any], None] | None:
        """Hear of a function call, as `Seer`; what is returned is to be called with its output."""
        asked = _asked(frames)
        if asked is not None:
            distribution, method = asked
            if method == "entropy":
                self._entropies.add(id(distribution))
                return None
            name = type(distribution).__name__
            chosen = f"log_prob of a {name}"
            return lambda out: self._choose(("log_prob", id(distribution)), out, chosen, id(distribution))
        name = getattr(func, "__name__", "")
        if name in ("softmax", "log_softmax") or (name in ("log", "log_") and self._is_soft(args[0])):
            return self._soften
        if name in _PICKS and args and self._is_soft(args[0]) and _picks(args, kwargs):
            return lambda out: self._choose(len(self._chosen), out, "what is gathered from a softmax")
        if name in _LOSSES and kwargs.get("reduction") == "none":
            return lambda out: self._choose(len(self._chosen), out, f"an unreduced {name}")
        return None

    def _soften(self, out: Any) -> None:
        if isinstance(out, Tensor) and out.grad_fn is not None:
            self._soft[id(out.grad_fn)] = out.grad_fn

    def _is_soft(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or x.grad_fn is None:
            return False
        node: Any = x.grad_fn
        return id(node) in self._soft or (is_probe(node) and id(feeds(node)[0][0]) in self._soft)

    def _choose(self, key: Any, out: Any, what: str, distribution: int = 0) -> None:
        if isinstance(out, Tensor) and out.requires_grad and out.numel() > 1:
            self._chosen[key] = _Chosen(out, what, distribution)

    def evidence(self, loss: Tensor, names: Iterable[str]) -> str:
        """Return in words what makes the step one of a policy; nothing where it is none.

        Args:
            loss: with its graph.
            names: of the model's class and of its modules.
        """
        chosen = list(self._chosen.values())
        if not chosen:
            return ""
        named = next((name for name in names if is_policy_name(name)), "")
        one = ""
        for found, weights in zip(chosen, gradients(loss, [c.values for c in chosen]), strict=True):
            signs = _signs(weights)
            if signs == "both":
                return f"{found.what} is weighed by numbers of both signs"
            entropy = found.distribution in self._entropies
            if not one and signs == "differ" and (entropy or named):
                why = f"{named!r} is called so" if named else "its entropy is taken"
                one = f"{found.what} is weighed sample by sample, and {why}"
            if not one and signs and named and found.distribution:
                one = f"{found.what} is taken, and {named!r} is called so"
        return one


def _asked(frames: Sequence[FrameType]) -> tuple[Distribution, str] | None:
    """Return the distribution that is being asked for a log_prob or an entropy: the outermost."""
    found = None
    for frame in frames:
        method = frame.f_code.co_name
        if method in ("log_prob", "entropy") and isinstance(frame.f_locals.get("self"), Distribution):
            found = frame.f_locals["self"], method
    return found


def _picks(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether entries are chosen by indices that are tensors."""
    parts = [*args[1:], *kwargs.values()]
    parts = [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
    return any(isinstance(p, Tensor) and p.dtype in (torch.int64, torch.int32) for p in parts)


def _signs(weights: Tensor | None) -> str:
    """Return `both`, `differ` or `alike` for the weights of choices; nothing where there are none."""
    if weights is None:
        return ""
    found = weights.detach().flatten().double()
    found = found[(found != 0) & found.isfinite()]
    if len(found) < 2:
        return ""
    sizes = found.abs()
    up = float(sizes[found > 0].sum() / sizes.sum())
    if min(up, 1 - up) >= _BOTH:
        return "both"
    return "differ" if float(sizes.std() / sizes.mean()) > 1e-3 else "alike"
