"""The batches of a trial: drawn once, and handed out again as often as a run asks, with what came with them.

NOTE [What comes with a batch]
A loss may know the targets of the latest batch by itself: whoever draws it puts them into a dict, a list or a
variable that both share. So what the loss holds (cells of closures, globals that it names, dicts, lists,
attributes, tensors, the states of generators) is looked at before and after each draw; what a draw changes
came with the batch, and is put back before that batch is handed out again. Where a run has a copy of such a
place, the copy is written to: see `copies.py`. What draws do not change, such as a log, is let be.
"""

from __future__ import annotations

import functools
import operator
import random
import types
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.batches import Source, no_batches
from gradflow.functional.model.closures import MOST_ITEMS, cells_of, globals_of, is_the_users, reachable
from gradflow.functional.model.purity import seed_all
from gradflow.functional.model.trees import private_copy
from gradflow.functional.model.undo import generator_undo
from gradflow.functional.torch_private import num_writes
from gradflow.remedies.trials.copies import Memo

_STRIDE = 100_003  # between the random states of two seeds; runs have fewer steps than that

Key = tuple[int, str]


@attrs.frozen(eq=False)
class Place:
    """One thing that a loss holds, with what is in it at a moment.

    Args:
        owner: the cell, dict, list, tensor, generator or function that holds it.
        name: of the global; "" for others.
        contents: what tells, by identity, whether it has changed.
        put: (memo) → None; puts it back as it was, into the copy where the memo has one.
    """

    owner: Any
    name: str
    contents: tuple[Any, ...]
    put: Callable[[Memo], Any]

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return id(self.owner), self.name

    def is_as(self, other: Place) -> bool:
        """Whether the same is in it as at another moment."""
        return len(self.contents) == len(other.contents) and all(
            map(operator.is_, self.contents, other.contents)
        )


@attrs.frozen(eq=False)
class Drawn:
    """A batch, and what the loss held when it was drawn.

    Args:
        batch: the batch.
        places: all that the loss held.
        carried: the keys of those that draws change; the recorder's, and complete once all are drawn.
    """

    batch: Any
    places: tuple[Place, ...]
    carried: Set[Key]

    def again(self, memo: Memo) -> Any:
        """Return the batch, after what came with it was put back."""
        for place in self.places:
            if place.key in self.carried:
                place.put(memo)
        return self.batch


class Recorder:
    """Draws the batches of the first run, and keeps them.

    Args:
        batches: the user's, as `analyze` takes them.
        loss_fn: the user's loss.
        seed: of that run.
    """

    def __init__(self, batches: Any, loss_fn: Any, seed: int) -> None:
        self.drawn: list[Drawn] = []
        self._carried: set[Key] = set()
        self._batches, self._source = batches, Source(batches)
        self._held = _Held(loss_fn)
        self._ended, self._step, self._seed = False, 0, seed

    def __call__(self) -> Any:
        """Return the next batch; after the last one the first again."""
        before = {place.key: place for place in self._held.now()} if not self._ended else {}
        batch = None if self._ended else self._source.draw()
        if batch is None:
            self._ended = True
            if not self.drawn:
                raise no_batches(self._batches)
            batch = self.drawn[self._step % len(self.drawn)].again({})
        else:
            after = self._held.now()
            known = [place for place in after if place.key in before]
            self._carried |= {place.key for place in known if not place.is_as(before[place.key])}
            self.drawn.append(Drawn(private_copy(_kept, batch), after, self._carried))
        self._step += 1
        same_random(self._seed, self._step)
        return batch

    def close(self) -> None:
        """Let go of the source, and leave the loss with what came with the last batch."""
        self._source.close()
        if self.drawn:
            self.drawn[-1].again({})


def replayed(drawn: Sequence[Drawn], seed: int, memo: Memo) -> Callable[[], Any]:
    """Return a function that hands the batches out again, over and over.

    Args:
        drawn: in the order of drawing, which is that of seed 0; other seeds have orders of their own.
        seed: of the run.
        memo: of its copies.
    """
    step, order = 0, list(drawn)
    if seed:
        random.Random(seed).shuffle(order)

    def draw() -> Any:
        nonlocal step
        batch = order[step % len(order)].again(memo)
        step += 1
        same_random(seed, step)
        return batch

    return draw


def same_random(seed: int, step: int) -> None:
    """Put all random states where every run of that seed has them at that step, whatever it has drawn."""
    seed_all(_STRIDE * seed + step)


def _kept(tensor: Tensor) -> Tensor:
    return tensor if tensor.requires_grad else tensor.detach().clone()


class _Held:
    """What a loss holds that drawing a batch may change."""

    def __init__(self, loss_fn: Any) -> None:
        self._loss_fn = loss_fn
        self._clones: dict[int, tuple[Tensor, int, Tensor]] = {}  # unchanged tensors are not kept twice

    def now(self) -> tuple[Place, ...]:
        """Return it as it is now."""
        return tuple(place for value in reachable([self._loss_fn]) for place in self._places(value))

    def _places(self, value: Any) -> Iterator[Place]:
        if isinstance(value, types.FunctionType):
            if is_the_users(value):
                yield from _of_function(value)
        elif type(value) in (dict, list):
            if len(value) <= MOST_ITEMS:
                yield _of_container(value)
        elif isinstance(value, Tensor):
            if value.is_leaf and not value.requires_grad:
                clone = self._clone(value)
                yield Place(value, "", (clone,), functools.partial(_rewrite, value, clone))
        elif (undo := generator_undo(value)) is not None:
            yield Place(value, "", (object(),), lambda memo: undo())
        elif not isinstance(value, (nn.Module, torch.optim.Optimizer, type, types.ModuleType)):
            held = getattr(value, "__dict__", None)
            if type(held) is dict and is_the_users(type(value)):
                items = dict(held)
                put = functools.partial(_refill_attributes, value, items)
                yield Place(value, "", (*items, *items.values()), put)

    def _clone(self, tensor: Tensor) -> Tensor:
        writes = num_writes(tensor)
        if id(tensor) not in self._clones or self._clones[id(tensor)][1] != writes:
            self._clones[id(tensor)] = (tensor, writes, tensor.detach().clone())
        return self._clones[id(tensor)][2]


def _of_function(function: types.FunctionType) -> Iterator[Place]:
    for cell, value in cells_of(function):
        yield Place(cell, "", (value,), functools.partial(_fill_cell, cell, value))
    for name, value in globals_of(function):
        if not isinstance(value, (types.ModuleType, types.FunctionType, type, nn.Module)):
            yield Place(function, name, (value,), functools.partial(_set_global, function, name, value))


def _of_container(value: dict[Any, Any] | list[Any]) -> Place:
    items = value.copy()
    contents = (*items, *items.values()) if isinstance(items, dict) else tuple(items)
    return Place(value, "", contents, functools.partial(_refill, value, items))


def _in(memo: Memo, value: Any) -> Any:
    return memo.get(id(value), value)


def _fill_cell(cell: types.CellType, value: Any, memo: Memo) -> None:
    _in(memo, cell).cell_contents = _in(memo, value)


def _set_global(function: types.FunctionType, name: str, value: Any, memo: Memo) -> None:
    _in(memo, function).__globals__[name] = _in(memo, value)


def _refill(container: Any, items: Any, memo: Memo) -> None:
    container = _in(memo, container)
    if isinstance(container, dict):
        container.clear()
        container.update({key: _in(memo, value) for key, value in items.items()})
    else:
        container[:] = [_in(memo, value) for value in items]


def _refill_attributes(owner: Any, items: dict[str, Any], memo: Memo) -> None:
    _refill(vars(_in(memo, owner)), items, memo)


def _rewrite(tensor: Tensor, values: Tensor, memo: Memo) -> None:
    tensor = _in(memo, tensor)
    if not torch.equal(tensor, values):
        with torch.no_grad():
            tensor.copy_(values)
