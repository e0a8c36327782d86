"""What a model chooses: codes that it picks for itself, by an argmin or its like, from a table that no
gradient teaches; and alternatives that it gives probabilities, by a softmax of what a layer gives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.shards import is_distributed
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.watch import source_calls
from gradflow.records import AnswersRecord, ChoiceRecord

_PICK = frozenset(("argmin", "argmax", "min", "max", "topk"))  # of which the positions are taken
_SAME = frozenset(
    ("float", "to", "type", "type_as", "double", "half", "scatter_", "scatter", "view", "reshape", "flatten")
)
_SOFT = frozenset(("softmax", "log_softmax"))
_PRODUCTS = frozenset(("matmul", "mm", "__matmul__", "bmm"))


@attrs.define(eq=False)
class Choices:
    """Hears which rows of a table are picked by positions that the model itself has found, over the steps.

    Positions are known by their storage, which views share; what has heard of them keeps them for the step.
    """

    picked: dict[str, Tensor] = attrs.field(
        factory=dict
    )  # by module and place: whether a row was ever picked
    numbers: dict[str, int] = attrs.field(factory=dict)
    by_step: dict[str, list[Tensor]] = attrs.field(factory=dict)
    _recorder: Recorder | None = None
    _found: dict[int, tuple[int, Tensor]] = attrs.field(
        factory=dict
    )  # storage -> (alternatives, what is kept)
    _ones: dict[int, tuple[Tensor, Any]] = attrs.field(factory=dict)  # by storage of one-hot rows: positions
    _heard: list[tuple[str, int, Tensor]] = attrs.field(factory=list)

    def begin(self, recorder: Recorder) -> None:
        """Start a step, or start it again."""
        self._recorder = recorder
        self._forget()

    def _forget(self) -> None:
        self._found, self._ones, self._heard = {}, {}, []

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Return what follows the positions to the output of a function; None where there are none."""
        name, x = getattr(func, "__name__", ""), args[0] if args else None
        if not isinstance(x, Tensor):
            return None
        if name in _PICK and x.is_floating_point() and x.dim() > 1 and _storage(x):
            return lambda out: self._note(x, out)
        if not self._found:
            return None
        if name == "one_hot" and self._known(x) is not None:
            return lambda out: self._mark(out, x)
        if name in _SAME and (position := self._position(name, x, args)) is not None:
            return lambda out: self._mark(out, position)
        if (use := self._use(name, args)) is not None:
            self._heard.append((self._place(), *use))
        return None

    def _note(self, x: Tensor, out: Any) -> None:
        """Note positions that were found in what the model computed, of one axis of it."""
        positions = out if isinstance(out, Tensor) else getattr(out, "indices", None)
        if not isinstance(positions, Tensor) or positions.is_floating_point() or positions.dim() == 0:
            return
        lost = x.numel() // max(positions.numel(), 1)
        if lost > 1 and lost * positions.numel() == x.numel():
            self._found[_storage(positions)] = (lost, positions)

    def _known(self, positions: Tensor) -> int | None:
        known = self._found.get(_storage(positions)) if not positions.is_floating_point() else None
        return None if known is None else known[0]

    def _mark(self, out: Any, positions: Tensor) -> None:
        if isinstance(out, Tensor) and _storage(out):
            self._ones[_storage(out)] = (positions, weakref.ref(out))

    def _position(self, name: str, x: Tensor, args: tuple[Any, ...]) -> Tensor | None:
        """Return the positions that one-hot rows are, or are made of."""
        if name.startswith("scatter"):
            index = args[2] if len(args) > 2 else None
            return index if isinstance(index, Tensor) and self._known(index) is not None else None
        return self._positions_of(x)

    def _positions_of(self, ones: Tensor) -> Tensor | None:
        """Return the positions that one-hot rows show, of which something is still there."""
        positions, made = self._ones.get(_storage(ones), (None, _nothing))
        return positions if made() is not None else None

    def _use(self, name: str, args: tuple[Any, ...]) -> tuple[int, Tensor] | None:
        """Return the number of rows and the positions where a table is read at positions that were found."""
        table, index = args[0], args[1] if len(args) > 1 else None
        if name == "embedding":
            table, index = index, table
        elif name == "index_select":
            index = args[2] if len(args) > 2 and args[1] == 0 else None
        elif name == "__getitem__" and isinstance(index, tuple) and len(index) == 1:
            index = index[0]
        elif name in _PRODUCTS and isinstance(index, Tensor):
            positions, rows = self._positions_of(table), index.shape[-2] if index.dim() > 1 else 0
            if positions is None or not table.shape[-1] == rows == self._known(positions):
                return None
            return rows, positions
        elif name != "__getitem__":
            return None
        if not isinstance(table, Tensor) or not isinstance(index, Tensor):
            return None
        codes = table.is_floating_point() and not table.requires_grad and table.dim() > 1
        return (table.shape[0], index) if codes and self._known(index) == table.shape[0] else None

    def _place(self) -> str:
        assert self._recorder is not None
        running = self._recorder.running()
        return running[-1].module if running else ""

    def end(self) -> None:
        """Take in what was picked in the step, which now counts."""
        for place, rows, positions in self._heard:
            flat = positions.detach().flatten()
            hit = torch.zeros(rows, dtype=torch.bool, device=flat.device).index_fill_(0, flat.long(), True)
            self.by_step.setdefault(place, []).append(hit)
            old = self.picked.get(place)
            self.picked[place] = hit if old is None or old.shape != hit.shape else old | hit
            self.numbers[place] = self.numbers.get(place, 0) + flat.numel()
        self._forget()
        self._recorder = None

    def read(self) -> list[ChoiceRecord]:
        """Return the numbers, at the end of the run."""
        return [
            ChoiceRecord(
                layer=place,
                num_codes=len(hit),
                num_picked=int(hit.sum()),
                num_choices=self.numbers[place],
                by_step=[int(step.sum()) for step in self.by_step[place]],
            )
            for place, hit in self.picked.items()
        ]


@attrs.define(eq=False)
class Answers:
    """Hears the softmaxes of matrices that one layer call feeds, a row to a sample, over the steps."""

    found: dict[tuple[str, int], list[Tensor]] = attrs.field(factory=dict)
    _recorder: Recorder | None = None
    _heard: dict[tuple[str, int], Tensor] = attrs.field(factory=dict)

    def begin(self, recorder: Recorder) -> None:
        """Start a step, or start it again."""
        self._recorder, self._heard = recorder, {}

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Return what takes in the output of a softmax over the last axis of a matrix; None for all else."""
        name = getattr(func, "__name__", "")
        x = args[0] if args else kwargs.get("input")
        if name not in _SOFT or not isinstance(x, Tensor) or x.dim() != 2 or not x.requires_grad:
            return None
        axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if axis not in (1, -1) or len(x) < 4 or x.shape[1] < 3 or is_distributed(x):
            return None
        return lambda out: self._note(x, out, logarithms=name == "log_softmax")

    def _note(self, x: Tensor, out: Any, *, logarithms: bool) -> None:
        sources = source_calls(x)
        if self._recorder is None or len(sources) != 1 or not isinstance(out, Tensor):
            return
        with torch.no_grad():
            odds = out.detach().float()
            largest = (odds.exp() if logarithms else odds).mean(0).max()
        self._heard[self._recorder.calls[sources[0]].name, x.shape[1]] = largest

    def end(self) -> None:
        """Take in what was said in the step, which now counts; of one layer, the last."""
        for key, largest in self._heard.items():
            self.found.setdefault(key, []).append(largest)
        self._recorder, self._heard = None, {}

    def read(self) -> list[AnswersRecord]:
        """Return the numbers, at the end of the run."""
        return [
            AnswersRecord(
                layer=layer, num_alternatives=number, largest=np.array(torch.stack(steps).double().tolist())
            )
            for (layer, number), steps in self.found.items()
        ]


def _nothing() -> None:
    return None


def _storage(x: Tensor) -> int:
    """Return what tells the memory of a plain tensor; 0 for others, and where there is none."""
    plain = x.layout is torch.strided and not x.is_nested and x.device.type != "meta"
    return x.untyped_storage().data_ptr() if plain else 0
