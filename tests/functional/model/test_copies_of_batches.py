"""Batches of any class are copied: a model that writes to its input leaves them alone."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, BatchFeature

from gradflow.functional import analyze
from tests.functional.model.small import X, mean_square
from tests.functional.snapshots import content, difference


class Attributes:
    """Holds tensors in attributes, as a graph does; one refers to the object itself."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.more, self.me = x, {"edges": [x.clone()]}, self


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Store(MutableMapping):  # type: ignore[type-arg]
    """A mapping that keeps its tensors in a private dict, as a dict of tensors does."""

    def __init__(self, **held: Any) -> None:
        self._held = held

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._held[key] = value

    def __delitem__(self, key: str) -> None:
        del self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@dataclass(frozen=True)
class Frozen:
    x: Tensor


Named = namedtuple("Named", "x")


BATCHES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda b: b),
    "dict": (lambda x: {"x": x}, lambda b: b["x"]),
    "UserDict": (lambda x: UserDict(x=x), lambda b: b["x"]),
    "BatchEncoding": (lambda x: BatchEncoding({"x": x}), lambda b: b["x"]),
    "BatchFeature": (lambda x: BatchFeature({"x": x}), lambda b: b["x"]),
    "store": (lambda x: Store(x=x), lambda b: b["x"]),
    "ordered dict": (lambda x: OrderedDict(x=x), lambda b: b["x"]),
    "attributes": (Attributes, lambda b: b.x),
    "attributes, deeper": (lambda x: [Attributes(x)], lambda b: b[0].x),
    "slots": (lambda x: (Slots(x),), lambda b: b[0].x),
    "frozen dataclass": (Frozen, lambda b: b.x),
    "named tuple": (Named, lambda b: b.x),
    "array": (lambda x: (x.numpy(),), lambda b: torch.from_numpy(b[0])),
    "packed": (
        lambda x: nn.utils.rnn.pack_padded_sequence(x.view(2, 3, 3), torch.tensor([3, 2]), batch_first=True),
        lambda b: b.data,
    ),
    "sparse": (lambda x: x.to_sparse(), lambda b: b),
}  # fmt: skip


@pytest.mark.parametrize("kind", BATCHES)
def test_a_model_that_writes_to_its_input_leaves_the_batch_alone(kind: str) -> None:
    make, find = BATCHES[kind]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            found = [a.x for a in args if isinstance(a, (Attributes, Slots, Frozen, Named))]
            found += [torch.from_numpy(a) for a in args if isinstance(a, np.ndarray)]
            found += [a for a in args if type(a) is Tensor] + list(kwargs.values())
            found += [a.data for a in args if isinstance(a, nn.utils.rnn.PackedSequence)]
            (x,) = found
            x.mul_(2.0)
            return self.fc(x.to_dense() if x.is_sparse else x)

    torch.manual_seed(0)
    batch, model = make(torch.ones(6, 3)), Model()
    before = content(batch)
    losses = analyze(model, [batch] * 3, mean_square).losses
    assert difference(before, content(batch)) == ""
    assert bool((find(batch).to_dense() if kind == "sparse" else find(batch)).eq(1).all())
    expected = float(model.fc(torch.full((6, 3), 2.0)).square().mean().detach())
    np.testing.assert_allclose(losses, [expected] * 3, rtol=1e-6)


def test_lists_without_tensors_in_a_batch_are_copied_as_well() -> None:
    class Popping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 1)

        def forward(self, x: Tensor, names: list[str], table: dict[str, list[int]]) -> Tensor:
            names.pop()
            table["more"] = [1]
            return self.fc(x)

    batch = (X, ["a", "b"], {"some": [0]})
    analyze(Popping(), [batch] * 3, mean_square)
    assert batch[1:] == (["a", "b"], {"some": [0]})
