"""First layers that plain descent leaves where they are, as next to nothing of the gradient comes to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import Issue, IssueType

CENTRES = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    kinds = [torch.randint(4, (32,), generator=g) for _ in range(20)]
    return [(CENTRES[kind] + 0.5 * torch.randn(32, 16, generator=g), kind) for kind in kinds]


def stack(depth: int, act: type[nn.Module], *, norm: bool = False, gain: float = 0.0) -> nn.Sequential:
    """Return a plain network at PyTorch's usual start, or with weights of a gain."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth - 1):
        layers.append(nn.Linear(32 if i else 16, 32))
        layers += [nn.BatchNorm1d(32), act()] if norm else [act()]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    for module in model.modules():
        if gain and isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain)
    return model


def pictures(depth: int) -> nn.Sequential:
    """Return convolutions with sigmoids, over the sixteen numbers as a picture."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 4, 4))]
    for i in range(depth):
        layers += [nn.Conv2d(16 if i else 1, 16, 3, padding=1), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))


def told(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Issue]:
    report = gf.diagnose(model, batches(), F.cross_entropy, optimizer=optimizer)
    return [i for i in report.issues if i.severity.is_serious and i.issue_type is IssueType.VANISHING]


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: stack(5, nn.Sigmoid), "0"),
        (lambda: stack(6, nn.Sigmoid), "0"),
        (lambda: stack(5, nn.Hardsigmoid), "0"),
        (lambda: pictures(4), "1"),
        (lambda: stack(11, nn.ReLU), "0"),
    ],
)
def test_layers_that_no_step_moves_are_told(make: Callable[[], nn.Module], place: str) -> None:
    model = make()
    (issue, *_) = told(model, torch.optim.SGD(model.parameters(), 0.1))
    assert (issue.layer, issue.magnitude < 1e-3) == (place, True)


def test_what_is_told_is_what_was_measured() -> None:
    model = stack(5, nn.Sigmoid)
    (issue,) = told(model, torch.optim.SGD(model.parameters(), 0.1))
    optimizer, ratios = torch.optim.SGD(model.parameters(), 0.1), []
    watched = (model[0].weight, model[-1].weight)
    for x, kind in batches():
        before = [p.detach().clone() for p in watched]
        optimizer.zero_grad()
        F.cross_entropy(model(x), kind).backward()
        optimizer.step()
        ratios.append(
            [float((q.detach() - p).norm() / p.norm()) for p, q in zip(before, watched, strict=True)]
        )
    first, last = (sorted(r)[len(r) // 2] for r in zip(*ratios, strict=True))
    assert 0.3 < issue.metrics["update_ratio"] / first < 3
    assert 0.3 < issue.metrics["largest_ratio"] / last < 3
    assert "Replace the hidden sigmoid" in issue.recommended_actions[0]


@pytest.mark.parametrize(
    ("make", "rate", "momentum"),
    [
        (lambda: stack(4, nn.Sigmoid), 0.1, 0.9),
        (lambda: stack(6, nn.Sigmoid, norm=True), 0.1, 0.0),
        (lambda: stack(5, nn.Sigmoid, gain=4.0), 0.1, 0.0),
        (lambda: stack(2, nn.Sigmoid), 0.1, 0.0),
        (lambda: stack(8, nn.Tanh), 0.1, 0.0),
        (lambda: stack(8, nn.ReLU), 0.1, 0.9),
        (lambda: stack(7, nn.GELU), 0.1, 0.9),
    ],
)
def test_stacks_that_learn_are_not(make: Callable[[], nn.Module], rate: float, momentum: float) -> None:
    model = make()
    assert not told(model, torch.optim.SGD(model.parameters(), rate, momentum))


def test_steps_of_a_size_of_their_own_make_up_for_it() -> None:
    model = stack(6, nn.Sigmoid)
    assert not told(model, torch.optim.Adam(model.parameters(), 3e-3))
