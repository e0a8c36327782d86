"""Gradients through policy and value heads, against separate backward passes and hand-made paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradflow.functional import head_gradients

D = torch.float64
Split = tuple[Tensor, Tensor, Tensor]


def backward(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of one plain backward pass; those that it does not reach are left out."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=1e-10, atol=1e-12)


class Two(nn.Module):
    """A trunk and two heads, double precision."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 8, dtype=D)
        self.pi, self.v = nn.Linear(8, heads, dtype=D), nn.Linear(8, 1, dtype=D)
        self.x = torch.randn(16, 4, dtype=D)

    def forward(self) -> tuple[Tensor, Tensor]:
        h = self.trunk(self.x).tanh()
        return self.pi(h), self.v(h)

    def named(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


def test_a_sum_of_losses_gives_what_two_backward_passes_give() -> None:
    net = Two()
    logits, value = net()
    policy = -(logits.log_softmax(-1)[:, 0] * (1.5 - value.detach().flatten())).mean()
    worth = (value - 2).square().mean()
    found = head_gradients(policy + 0.5 * worth, [logits], [value], net.named())
    assert_same(found.policy, backward(policy, net.named()))
    assert_same(found.value, backward(0.5 * worth, net.named()))
    assert found.shared == ("trunk.weight", "trunk.bias")
    assert found.policy_reached
    assert found.value_reached
    assert all(p.grad is None for p in net.parameters())


def test_both_parts_add_up_where_every_path_meets_a_head() -> None:
    net = Two()
    logits, value = net()
    loss = -(logits.log_softmax(-1)[:, 0] * (1.5 - value.flatten())).mean()  # the value is not detached
    found = head_gradients(loss, [logits], [value], net.named())
    whole = backward(loss, net.named())
    for name in found.shared:
        torch.testing.assert_close(found.policy[name] + found.value[name], whole[name])


def test_a_critic_that_judges_the_action_is_no_second_way_to_the_actor() -> None:
    torch.manual_seed(0)
    actor, critic, trunk = nn.Linear(4, 2, dtype=D), nn.Linear(6, 1, dtype=D), nn.Linear(4, 4, dtype=D)
    h = trunk(torch.randn(16, 4, dtype=D)).tanh()
    action = actor(h)
    q = critic(torch.cat([h, action.tanh()], -1))
    loss = (0.1 * action.square().sum(-1, keepdim=True) - q).mean()
    names = {"trunk": trunk.weight, "actor": actor.weight, "critic": critic.weight}
    found = head_gradients(loss, [action], [q], names)
    assert "actor" not in found.value
    assert found.shared == ("trunk",)
    cut = actor(h.detach())  # the value's own way to the trunk: through the states alone
    aside = (0.1 * cut.square().sum(-1, keepdim=True) - critic(torch.cat([h, cut.tanh()], -1))).mean()
    assert_same(found.value, backward(aside, {k: v for k, v in names.items() if k != "actor"}))
    whole = backward(loss, names)
    torch.testing.assert_close(found.policy["trunk"] + found.value["trunk"], whole["trunk"])
    torch.testing.assert_close(found.policy["actor"], whole["actor"])


def test_heads_that_feed_each_other_are_counted_once() -> None:
    torch.manual_seed(0)
    trunk = nn.Linear(4, 4, dtype=D)
    first, second, third = nn.Linear(4, 2, dtype=D), nn.Linear(6, 3, dtype=D), nn.Linear(5, 2, dtype=D)
    h = trunk(torch.randn(16, 4, dtype=D)).tanh()
    a = first(h)
    b = second(torch.cat([h, a], -1))
    c = third(torch.cat([a, b], -1))
    loss = a.square().mean() + b.exp().mean() + (c * 3).sin().mean()
    names = {"trunk": trunk.weight, "first": first.weight, "second": second.weight, "third": third.weight}
    for order in ([a, b, c], [c, a, b], [b, c, a, a]):
        assert_same(head_gradients(loss, order, [], names).policy, backward(loss, names))


def test_a_policy_that_is_told_the_value_keeps_the_parts_apart() -> None:
    net = Two()
    h = net.trunk(net.x).tanh()
    value = net.v(h)
    logits = net.pi(h) + value
    policy, worth = logits.exp().mean(), value.square().mean()
    found = head_gradients(policy + worth, [logits], [value], net.named())
    assert_same(found.policy, backward(policy, net.named()))
    assert_same(found.value, backward(worth, net.named()))


@pytest.mark.parametrize(
    ("make", "reached"),
    [
        (lambda p, v: v.sum(), (False, True)),
        (lambda p, v: p.detach().sum() + v.sum(), (False, True)),
        (lambda p, v: p.sum(), (True, False)),
    ],
)
def test_what_the_loss_does_not_reach(make: Callable[[Tensor, Tensor], Tensor], reached: Any) -> None:
    net = Two()
    logits, value = net()
    found = head_gradients(make(logits, value), [logits], [value], net.named())
    assert (found.policy_reached, found.value_reached) == reached
    assert bool(found.policy) == reached[0]
    assert bool(found.value) == reached[1]
    assert found.shared == ("trunk.weight", "trunk.bias")  # by the graph, not by this loss


def test_no_heads_no_gradients() -> None:
    net = Two()
    logits, value = net()
    frozen: Sequence[Tensor] = [torch.zeros(3)]
    found = head_gradients(logits.sum() + value.sum(), frozen, [], net.named())
    assert (found.policy, found.value, found.shared, found.policy_reached) == ({}, {}, (), False)
