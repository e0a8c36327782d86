"""Policies that are found by themselves: what `gradflow.automatic` measures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from gradflow.functional.measurement import Session
from gradflow.functional.policy.measurement import PolicyHeads, PolicySession
from gradflow.functional.policy.scene import Scene, listed
from gradflow.functional.policy.seen import Seer, distribution_frames
from gradflow.functional.policy.weighed import Weighed
from gradflow.functional.tap.recorder import Recorder


@attrs.frozen
class AutomaticPolicy:
    """Like `policy_heads()`, where the first step trains a policy, at its first and its last step.

    What makes it one: see NOTE [What tells a policy from a classifier] in `weighed.py`.
    """

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return _AutomaticSession(PolicyHeads(), model, modules)


class _AutomaticSession(PolicySession):
    def __init__(self, asked: PolicyHeads, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(asked, model, modules)
        self._names = (type(model).__name__, *modules)
        self._weighed: Weighed | None = None
        self._why = ""

    def listens(self, *, end: bool) -> bool:
        return end and self._is_policy

    @property
    def _is_policy(self) -> bool:
        return bool(self._why and self._heads is not None and self._heads.policy)

    def begin(self, step: int, recorder: Recorder) -> None:
        super().begin(step, recorder)
        self._scene = Scene(recorder, sparing=not self._is_policy)
        self._weighed = None if self._is_policy else Weighed()

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        frames = distribution_frames()
        self._seer.hear(func, args, kwargs, frames)
        return self._weighed.hear(func, args, kwargs, frames) if self._weighed is not None else None

    def differentiate(self, loss: Tensor) -> None:
        if self._weighed is not None:
            self._why = self._weighed.evidence(loss, self._names)
        if self._why:
            super().differentiate(loss)
        else:
            self._scene, self._seer = None, Seer()

    def end(self) -> None:
        super().end()
        self._weighed = None

    def fields(self) -> Mapping[str, Any]:
        return super().fields() if self._is_policy else {}

    def found(self) -> Sequence[str]:
        if not self._is_policy:
            return ()
        assert self._heads is not None
        value = f", value in {listed(self._heads.value)}" if self._heads.value else ""
        heads = f"policy in {listed(self._heads.policy)}{value}"
        return (f"{heads}, since {self._why}; at the first and the last step",)
