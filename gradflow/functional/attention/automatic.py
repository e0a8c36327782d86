"""Attention that is found by itself: what `gradflow.automatic` measures where the first step shows some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from gradflow.functional.attention.session import AttentionSession
from gradflow.functional.measurement import Session, some_of

MOST = 2**19  # elements of the weights of one attention that are read at a look


@attrs.frozen
class AutomaticAttention:
    """Like `attention()`, where the first step shows attention, at its first and its last step; else nothing.

    Of attention with more than `MOST` weights some samples are read, which the record's provenance tells.
    """

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return _AutomaticSession(modules, MOST)


class _AutomaticSession(AttentionSession):
    def listens(self, *, end: bool) -> bool:
        return end and bool(self._layers)

    @property
    def _takes_sums(self) -> bool:
        return bool(self._layers or self._pending)  # a branch without attention before it is of no interest

    def fields(self) -> Mapping[str, Any]:
        return super().fields() if self._layers else {}

    def notes(self) -> tuple[str, ...]:
        return super().notes() if self._layers else ()

    def found(self) -> Sequence[str]:
        if not self._layers:
            return ()
        ops = some_of(dict.fromkeys(layer.op for layer in self._layers.values()))
        places = some_of(layer.name or "the model" for layer in self._layers.values())
        read = f", on {' and '.join(self._thinned)}" if self._thinned else ""
        return (f"attention, since {ops} ran in {places}; at the first and the last step{read}",)
