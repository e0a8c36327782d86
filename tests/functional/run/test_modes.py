"""Modes of a model in a run, and buffers that move on from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import analyze
from tests.functional.run.models import Noisy, X, mean_square


def test_train_eval_and_keep() -> None:
    seen: list[tuple[bool, bool]] = []

    class Telling(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.bn.training))
            return super().forward(x)

    for mode, training, bn, expected in [
        ("train", True, True, (True, True)),
        ("train", True, False, (True, False)),  # a model in the mode asked for keeps the modes of its parts
        ("train", False, False, (True, True)),
        ("eval", True, True, (False, False)),
        ("eval", False, True, (False, True)),
        ("keep", True, False, (True, False)),
        ("keep", False, False, (False, False)),
    ]:
        model = Telling()
        model.train(training)
        model.bn.train(bn)
        seen.clear()
        record = analyze(model, [X], mean_square, steps=1, mode=mode)
        assert seen == [expected], (mode, training, bn)
        assert (model.training, model.bn.training) == (training, bn)
        assert record.provenance.mode == mode


def test_buffers_move_on_from_step_to_step_within_a_run_and_not_beyond() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.5))
    model.train()
    means: list[Tensor] = []

    def loss(y: Tensor) -> Tensor:
        means.append(model[1].running_mean.clone())  # type: ignore[union-attr]
        return mean_square(y)

    batches = [X, 2 * X, 3 * X]
    unwrapped = torch._C._functorch.get_unwrapped  # type: ignore[attr-defined]
    for transform in ("fused", "vjp"):
        means.clear()
        analyze(model, batches, loss, steps=3, transform=transform)  # type: ignore[arg-type]
        expected, mean = [], torch.zeros(3)
        for x in batches:
            mean = 0.5 * mean + 0.5 * model[0](x).detach().mean(0)
            expected.append(mean)
        # `vjp` shows its structure beforehand; the other asks the loss of two guesses at the end.
        steps = means[-3:] if transform == "vjp" else means[:3]
        for found, wanted in zip(steps, expected, strict=True):
            torch.testing.assert_close(unwrapped(found) if transform == "vjp" else found, wanted)
        assert torch.equal(model[1].running_mean, torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("transform", ["fused", "vjp"])
def test_buffers_that_are_bound_anew_move_on_too(transform: Any) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            self.mean = 0.5 * self.mean + 0.5 * h.detach().mean(0)
            return h - self.mean

    batches = [X, X + 1.0, X - 2.0, X]
    model, real = Centred(), Centred()
    record = analyze(model, batches, mean_square, steps=4, transform=transform)
    expected = [float(mean_square(real(x)).detach()) for x in batches]
    np.testing.assert_allclose(record.losses, expected, rtol=1e-6)
    assert torch.equal(model.mean, torch.zeros(3))
