"""The lowest loss of any outputs, and of those within a range, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.functional.reverse.floors import floors

IN_UNIT = torch.tensor([[0.2], [0.9], [0.4], [0.6]])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([3.0, -1.0, 0.5, 0.25], {"": 0.0, "0 to 1": 1.25, "-1 to 1": 1.0, "above 0": 0.25}),
        ([0.9, 0.1, 0.5, 0.25], {"": 0.0, "0 to 1": 0.0, "-1 to 1": 0.0, "above 0": 0.0}),
        ([-0.9, 0.1, 0.5, 0.25], {"": 0.0, "0 to 1": 0.2025, "-1 to 1": 0.0, "above 0": 0.2025}),
    ],
)
def test_squared_errors_leave_what_lies_beyond(targets: list[float], expected: dict[str, float]) -> None:
    found = floors(lambda y: (y[:, 0] - torch.tensor(targets)).square().mean(), IN_UNIT, scored=False)
    assert found == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_cross_entropy_of_scores_that_lie_near_each_other(classes: int) -> None:
    """Scores that are at most d apart leave ln(1 + (k - 1) exp(-d)) of k classes."""
    target = torch.arange(12) % classes
    output = torch.rand(12, classes, generator=torch.Generator().manual_seed(0))
    found = floors(lambda y: F.cross_entropy(y, target), output, scored=True)
    assert found[""] == pytest.approx(0.0, abs=1e-3)
    for name, apart in (("0 to 1", 1.0), ("-1 to 1", 2.0)):
        assert found[name] == pytest.approx(math.log(1 + (classes - 1) * math.exp(-apart)), rel=1e-2)


def test_only_ranges_that_outputs_keep_are_asked_for() -> None:
    signed = torch.tensor([[-0.5], [0.5], [0.1]])
    assert set(floors(lambda y: y.square().mean(), signed, scored=False)) == {"", "-1 to 1"}
    assert floors(lambda y: y.square().mean(), 9 * signed, scored=False) == {}
    assert floors(lambda y: y.square().mean(), signed * math.nan, scored=False) == {}


def test_a_loss_that_looks_at_outputs_together_is_not_asked() -> None:
    def critic(y: Tensor) -> Tensor:
        return F.softplus(-y @ torch.ones(3, 1)).mean()

    output = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    assert floors(critic, output, scored=False) == {}
    assert floors(lambda y: (y - 2).abs().mean(), output, scored=False) != {}


@pytest.mark.parametrize(("beyond", "left"), [(3.0, 1.0), (2.0, 0.0)])
def test_a_clamp_has_bounds_of_its_own(beyond: float, left: float) -> None:
    """What lies at the ends of its outputs is where it clamps."""
    output = torch.tensor([[-2.0], [2.0], [0.5], [2.0]])
    target = torch.tensor([[-beyond], [beyond], [0.5], [beyond]])
    found = floors(lambda y: (y - target).square().mean(), output, scored=False, clamped=True)
    assert found == pytest.approx({"": 0.0, "as clamped": 0.75 * left}, abs=2e-2)
    assert floors(lambda y: (y - target).square().mean(), output, scored=False) == {}
