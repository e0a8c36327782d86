"""Tensors inside nested values."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.functional import analyze
from gradflow.functional.model.trees import (
    is_differentiable,
    iter_tensors,
    map_tensors,
    named_tensors,
    same_device,
    shapes,
)

Point = namedtuple("Point", "x y")


@dataclass
class Output:
    """An output as libraries define them, with a field that is computed and one that nests."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    name: str = "kept"
    total: float = field(init=False, default=0.0)


A, B = torch.ones(2), torch.zeros(3, dtype=torch.int64)
VALUE: dict[str, Any] = {"a": [A, (B, None)], "p": Point(A, 3), "o": Output(A, (B,)), "s": "text", "n": 1}


def test_tensors_are_named_by_their_path_in_order() -> None:
    named = [(name, t.shape) for name, t in named_tensors(VALUE, "in")]
    assert named == [
        ("in.a.0", (2,)),
        ("in.a.1.0", (3,)),
        ("in.p.x", (2,)),
        ("in.o.logits", (2,)),
        ("in.o.hidden.0", (3,)),
    ]
    assert [name for name, _ in named_tensors(A, "in")] == ["in"]
    assert [name for name, _ in named_tensors((A, A))] == ["0", "1"]
    assert list(named_tensors(None)) == list(named_tensors(3.5, "in")) == []
    assert [t.shape for t in iter_tensors(VALUE)] == [shape for _, shape in named]
    assert next(iter_tensors(A)) is A


def test_a_named_tuple_of_a_derived_class_is_entered() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(3, 2, 4), torch.tensor([3, 1]))
    names = ["0.data", "0.batch_sizes", "0.sorted_indices", "0.unsorted_indices"]
    assert [name for name, _ in named_tensors((packed, 1))] == names[
        : 2 + 2 * (packed.sorted_indices is not None)
    ]
    new, one = map_tensors(lambda t: t * 2 if t.is_floating_point() else t, (packed, 1))
    assert type(new) is type(packed)
    assert torch.equal(new.data, torch.full((4, 4), 2.0))
    assert new.batch_sizes is packed.batch_sizes
    assert map_tensors(lambda t: t, packed) is packed
    assert one == 1


def test_mapping_rebuilds_what_changed_with_its_types() -> None:
    new = map_tensors(lambda t: t + 1, VALUE)
    assert torch.equal(new["a"][0], torch.full((2,), 2.0))
    assert torch.equal(new["a"][1][0], torch.ones(3, dtype=torch.int64))
    assert isinstance(new["p"], Point)
    assert new["p"].y == 3
    assert isinstance(new["o"], Output)
    assert torch.equal(new["o"].hidden[0], torch.ones(3, dtype=torch.int64))
    assert new["o"].name == "kept"
    assert torch.equal(A, torch.ones(2))
    ordered = map_tensors(lambda t: t + 1, OrderedDict(z=A, a=B))
    assert list(ordered) == ["z", "a"]
    assert isinstance(ordered, OrderedDict)


def test_where_nothing_changes_the_very_object_comes_back() -> None:
    for value in (VALUE, VALUE["o"], VALUE["p"], [A], None, 3, "text", object()):
        assert map_tensors(lambda t: t, value) is value
    output = VALUE["o"]
    assert map_tensors(lambda t: t, {"o": output})["o"] is output


def test_shapes_read_well() -> None:
    assert shapes(A) == "float32[2]"
    assert shapes((A, {"b": B})) == "0: float32[2], 1.b: int64[3]"
    assert shapes("text") == "no tensor (str)"
    assert shapes(torch.tensor(1.0, dtype=torch.bfloat16)) == "bfloat16[]"


def test_differentiable_dtypes() -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int32, torch.bool)
    assert [is_differentiable(torch.ones(1, dtype=d)) for d in kinds] == [True] * 4 + [False] * 2


def test_the_one_device_of_a_model() -> None:
    assert same_device(nn.Linear(1, 1)) == torch.device("cpu")
    assert same_device(nn.ReLU()) is None
    two = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    assert same_device(two) is None


def test_layers_that_return_nested_values_are_probed_all_over() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            y = x @ self.w
            return {"first": Output(y, (2 * y, y.detach())), "rest": [Point(y * 3, "text"), None]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Nested()

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            assert isinstance(out["first"], Output)
            assert isinstance(out["rest"][0], Point)
            return out["first"].logits.sum() + 2 * out["first"].hidden[0].sum() + 3 * out["rest"][0].x.sum()

    x = torch.randn(4, 3, dtype=torch.float64)
    record = analyze(Model(), [x])
    # three outputs of 4 × 2 with gradients 1, 2 and 3 everywhere; the detached one has none
    expected = float(torch.tensor(8.0 * (1 + 4 + 9), dtype=torch.float64).sqrt())
    assert abs(record["inner"].grad_norm[0] - expected) < 1e-12
    assert record["inner"].num_elements.tolist() == [32]
    assert record["inner"].shape == (4, 2)
