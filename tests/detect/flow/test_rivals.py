"""BOTTLENECK where a softmax runs over the samples of the batch; healthy where it weighs what is added up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf

N, T = 24, 7
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Layers, and what a test makes of them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.body, self.score, self.head = nn.Linear(5, 16), nn.Linear(16, 6), nn.Linear(16, 4)
        self.one, self.softmax = nn.Linear(16, 1), nn.Softmax(0)
        self.how = [forward]

    def forward(self, x: Tensor) -> Tensor:
        return self.how[0](self, x)


def told(forward: Forward, shape: tuple[int, ...], loss: Callable[[Tensor], Tensor]) -> list[str]:
    """Return the layers of which the report says that samples compete."""
    torch.manual_seed(0)
    model, drawn = Net(forward), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    report = gf.diagnose(
        model, lambda: torch.randn(shape, generator=drawn), loss, optimizer=optimizer, steps=6
    )
    kinds = ("softmax over samples", "probabilities over samples")
    return [i.layer for i in report.issues if i.severity.is_serious and i.metrics.get("misgiven") in kinds]


def over_time(net: Net, x: Tensor, axis: int) -> Tensor:
    """Attention over the steps of each sample, to be read off by one head."""
    h = net.body(x).tanh()
    weights = net.one(h)[..., 0].softmax(axis)
    return net.head((weights[:, :, None] * h).sum(1))


def over_steps_in_front(net: Net, x: Tensor) -> Tensor:
    h = net.body(x).tanh()
    return net.head((net.one(h).softmax(0) * h).sum(0))


def mixture(net: Net, x: Tensor, axis: int) -> Tensor:
    """Experts, weighed for each sample."""
    h = net.body(x).relu()
    return (net.score(h).softmax(axis)[:, :4] * net.head(h)).cumsum(1)


def by_module(net: Net, x: Tensor) -> Tensor:
    return net.head(net.body(x).relu()) * net.softmax(net.score(net.body(x)))[:, :4]


def pooled(net: Net, x: Tensor) -> Tensor:
    """Each point is given what all points of the set have in common, with weights over them."""
    h = net.body(x).tanh()
    common = net.one(h).expand(-1, 3).softmax(0).T @ h
    return net.head(h + common.mean(0))


def slots(net: Net, x: Tensor) -> Tensor:
    """Tokens of one sequence are dealt out to slots, and the slots back to tokens."""
    h = net.body(x).relu()
    scores = net.score(h)
    return net.head(scores.softmax(1) @ (scores.softmax(0).T @ h).relu())


def classes(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.arange(len(output)) % output.shape[1])


def of_some(axis: int) -> Callable[[Tensor], Tensor]:
    """A likelihood of half of the rows, as of the labelled nodes of a graph."""
    return lambda y: F.nll_loss(y.log_softmax(axis)[: len(y) // 2], torch.arange(len(y) // 2) % y.shape[1])


def both_ways(output: Tensor) -> Tensor:
    """Pictures against twice as many texts, asked along both axes."""
    scores = output @ torch.cat([output, output.flip(0)]).T
    mine = torch.arange(len(output))
    return -(scores.log_softmax(1)[mine, mine] + scores.log_softmax(0)[mine, mine]).mean()


def hard_samples(output: Tensor) -> Tensor:
    """Rows weigh by how wrong they are."""
    errors = (output - 1).square().mean(1)
    return (errors.detach().softmax(0) * errors).sum() + (errors.softmax(0) * errors).sum()


def of_actions(output: Tensor) -> Tensor:
    """A policy whose actions are worth what their number is."""
    policy = torch.distributions.Categorical(logits=output)
    action = policy.sample()
    return -(policy.log_prob(action) * (action - 1.5)).mean()


def plain(net: Net, x: Tensor) -> Tensor:
    return net.head(net.body(x).relu())


@pytest.mark.parametrize(
    ("forward", "shape", "loss", "layer"),
    [
        (lambda n, x: over_time(n, x, 0), (N, T, 5), classes, "one"),
        (lambda n, x: mixture(n, x, 0), (N, 5), classes, "score"),
        (by_module, (N, 5), classes, "softmax"),
        (plain, (N, 5), of_some(0), "head"),
        (lambda n, x: plain(n, x).softmax(0), (N, 5), of_actions, "head"),
        (
            lambda n, x: plain(n, x).log_softmax(0),
            (N, 5),
            lambda y: y[:, 0].square().mean() - y[0].sum(),
            "head",
        ),
    ],
)
def test_a_softmax_over_samples(
    forward: Forward, shape: tuple[int, ...], loss: Callable[[Tensor], Tensor], layer: str
) -> None:
    assert told(forward, shape, loss) == [layer]


@pytest.mark.parametrize(
    ("forward", "shape", "loss"),
    [
        (lambda n, x: over_time(n, x, 1), (N, T, 5), classes),
        (over_steps_in_front, (T, N, 5), classes),
        (over_steps_in_front, (N, N, 5), classes),
        (lambda n, x: mixture(n, x, 1), (N, 5), classes),
        (pooled, (N, 5), classes),
        (slots, (N, 5), classes),
        (plain, (N, 5), of_some(1)),
        (plain, (N, 5), of_actions),
        (plain, (N, 5), both_ways),
        (plain, (N, 5), hard_samples),
    ],
)
def test_a_softmax_over_what_is_added_up(
    forward: Forward, shape: tuple[int, ...], loss: Callable[[Tensor], Tensor]
) -> None:
    assert told(forward, shape, loss) == []


class Placed(nn.Module):
    """Weights of no layer, as many as there are samples, of which a softmax is taken along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Parameter(torch.randn(N, 5)), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.places.softmax(0))


def test_a_softmax_that_no_layer_stands_before() -> None:
    torch.manual_seed(0)
    model = Placed()
    report = gf.diagnose(
        model, lambda: torch.randn(N, 5), lambda y: (y - 1).square().mean(),
        optimizer=torch.optim.Adam(model.parameters(), 1e-3), steps=6,
    )  # fmt: skip
    assert not [i for i in report.issues if i.metrics.get("misgiven") == "softmax over samples"]
