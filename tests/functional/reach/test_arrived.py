"""At which elements gradient has arrived, against a plain mask kept in every step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradflow.functional.reach.arrived import Arrived


@pytest.mark.parametrize("rare", [0.02, 0.5, 0.97])  # lists of what is left, and masks
@pytest.mark.parametrize("sparse", [False, True])
def test_masks_are_those_of_all_steps_together(rare: float, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {"a": torch.zeros(8, 5), "b": torch.zeros(30), "never": torch.zeros(2)}
    arrived, expected = Arrived(parameters), {n: torch.zeros_like(p) for n, p in parameters.items()}
    for step in range(6):
        gradients: dict[str, Tensor | None] = {"never": None}
        for name in ("a", "b"):
            shape = parameters[name].shape
            gradient = torch.randn(shape, generator=generator)
            gradient *= torch.rand(shape, generator=generator) > rare
            expected[name] += gradient.abs()
            gradients[name] = gradient.to_sparse() if sparse else gradient
        arrived.add(gradients, look=step in (0, 2, 5))
        left = arrived.unreached()
        assert left["never"] is None
        for name in ("a", "b"):
            wanted = expected[name] == 0
            assert torch.equal(left.get(name, torch.zeros_like(wanted)), wanted), (step, name)  # type: ignore


def test_what_is_settled_is_not_followed_any_more() -> None:
    arrived = Arrived({"a": torch.zeros(3), "b": torch.zeros(3)})
    arrived.add({"a": torch.ones(3), "b": torch.tensor([1.0, 0.0, 1.0])}, look=True)
    assert arrived.open == ["b"]
    arrived.add({"a": torch.zeros(3), "b": torch.tensor([0.0, float("nan"), 0.0])}, look=False)
    assert arrived.unreached() == {}  # a NaN has arrived too


def test_a_dense_gradient_may_follow_a_sparse_one_and_the_other_way_round() -> None:
    arrived = Arrived({"a": torch.zeros(8)})
    first, second = torch.ones(8), torch.zeros(8)
    first[:2], second[0] = 0, 1
    arrived.add({"a": first}, look=True)
    arrived.add({"a": second.to_sparse()}, look=False)
    (left,) = arrived.unreached().values()
    assert left is not None
    assert left.tolist() == [False, True, *[False] * 6]
