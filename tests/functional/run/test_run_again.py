"""Steps that have to be run again: a reverse pass inside the reverse pass, a model that changes itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import analyze
from gradflow.functional.model.purity import ModuleState

X = torch.randn(5, 4)


def mean_square(y: Tensor) -> Tensor:
    return y.square().mean()


class Reversible(torch.autograd.Function):
    """Keeps no activation: its backward runs the part again, and a backward pass of its own in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: nn.Module) -> Tensor:
        ctx.part = part
        ctx.save_for_backward(x)
        return part(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.part(x).backward(gradients[0])
        return x.grad, None


class Weight(nn.Module):
    """Holds a weight that is used without calling it, so that no layer runs in the inner pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))


class Model(nn.Module):
    def __init__(self, *, reversible: bool, borrowed: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.body: nn.Module = Weight() if borrowed else nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.reversible, self.borrowed = reversible, borrowed

    def part(self, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.body.weight) if self.borrowed else self.body(h)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out(Reversible.apply(h, self.part) if self.reversible else self.part(h))  # type: ignore[arg-type]


@pytest.mark.parametrize("borrowed", [False, True])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_a_backward_pass_inside_backward_is_counted(borrowed: bool, detail: Any) -> None:
    record = analyze(Model(reversible=True, borrowed=borrowed), [X] * 3, mean_square, detail=detail)
    model = Model(reversible=True, borrowed=borrowed)
    mean_square(model(X)).backward()
    for name, parameter in model.named_parameters():
        found = record.parameter(name)
        assert found.reached.all(), name
        assert parameter.grad is not None
        np.testing.assert_allclose(found.grad_norm, parameter.grad.norm().item(), rtol=1e-6, err_msg=name)


def test_layers_of_a_reversible_part_are_probed_as_without_it() -> None:
    there, plain = (
        analyze(Model(reversible=kind, borrowed=False), [X] * 2, mean_square) for kind in (True, False)
    )
    assert [layer.name for layer in there] == [layer.name for layer in plain]
    for a, b in zip(there, plain, strict=True):
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-6, err_msg=a.name)


def test_no_gradient_is_left_behind_by_the_pass_that_was_given_up() -> None:
    model = Model(reversible=True, borrowed=False)
    analyze(model, [X] * 2, mean_square)
    assert all(p.grad is None for p in model.parameters())


class SelfChanging(nn.Module):
    """Counts its calls and replaces a part in its first one, which draws random numbers for it; and its
    output shares storage with what it is given and is changed in place, so that the step is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.view = nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity()
        self.calls, self.part = 0, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            self.part = nn.Linear(4, 4)
        return self.drop(self.view(self.fc(x)).mul_(self.calls))


def test_a_first_step_that_is_run_again_starts_from_the_model_as_it_was() -> None:
    torch.manual_seed(2)
    model = SelfChanging()
    state, part = torch.get_rng_state(), model.part
    record = analyze(model, [X] * 2, mean_square, seed=3)
    assert (model.calls, model.part is part) == (0, True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    losses = [mean_square(model(X)) for _ in range(2)]
    np.testing.assert_allclose(record.losses, [loss.item() for loss in losses], rtol=1e-6)
    losses[0].backward()
    assert model.fc.weight.grad is not None
    np.testing.assert_allclose(
        record.parameter("fc.weight").grad_norm[0], model.fc.weight.grad.norm().item(), rtol=1e-6
    )


def test_the_state_of_modules_can_be_put_back_twice() -> None:
    model = nn.Linear(1, 1)
    model.kept, model.seen = torch.zeros(2), [1]  # type: ignore[assignment]
    state = ModuleState([model])
    for _ in range(2):
        model.kept.resize_(3).fill_(7)  # type: ignore[operator]
        model.seen.append(2)  # type: ignore[union-attr]
        state.restore()
        assert model.kept.tolist() == [0, 0]
        assert model.seen == [1]
