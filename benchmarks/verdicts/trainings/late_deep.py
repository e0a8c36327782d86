"""Nets that attend, act and choose, which are well early and collapse late."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from .attention import Gpt
from .data import (
    choice,
    normal,
    passages,
    rows,
    scheduled,
    seeded,
    table,
    text,
    token_loss,
    training,
)
from .graphs import Experts
from .late_plain import dead_share, named, net, output_of
from .registry import Training, late


@late(
    "late-attention-falls-on-one-place",
    400,
    [("SATURATION", "blocks"), ("BOTTLENECK", "blocks"), ("VANISHING", "blocks")],
    early=0.2,
    at_most=0.05,
    source="https://arxiv.org/abs/2303.06296",
)
def attention_collapses() -> Training:
    """The rate of queries and keys is far too high after the warm-up: scores grow, and every position attends
    to one place."""
    model, sample = Gpt(text()[1], 32, 2, 24), passages(24, 16)
    sharp = [p for n, p in model.named_parameters() if ".q." in n or ".k." in n]
    rest = [p for n, p in model.named_parameters() if ".q." not in n and ".k." not in n]
    optimizer = torch.optim.AdamW([{"params": sharp}, {"params": rest}], lr=2e-3)

    def after(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 2e-3 if step < 100 else 0.3

    tokens = sample(seeded(98))[0]

    def entropy(_: nn.Module) -> float:
        shares = []
        for block in model.blocks:
            inner = block.get_submodule("attention")
            q, k = (
                output_of(model, inner.get_submodule(n), tokens).unflatten(-1, (4, -1)).transpose(1, 2)
                for n in "qk"
            )
            score = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))[:, :, -1]
            shares.append(Categorical(logits=score).entropy().mean() / math.log(score.shape[-1]))
        return float(torch.stack(shares).mean())

    return training(model, sample, token_loss, optimizer, entropy, after=after)


@late(
    "late-policy-is-sure-of-one-action",
    600,
    [("SATURATION", "policy"), ("SATURATION", "trunk"), ("VANISHING", "policy"), ("DEAD", "policy")],
    early=0.1,
    at_most=0.01,
)
def policy_collapses() -> Training:
    """Rewards grow a thousandfold in the course of the game, and no entropy is asked for: the policy becomes
    sure of one action in every state, and its gradient is gone."""
    w = normal(seeded(93), 8, 4)
    model = named(trunk=nn.Sequential(nn.Linear(8, 32), nn.Tanh()), policy=nn.Linear(32, 4))
    held = {"scale": 1.0}

    def after(step: int) -> None:
        held["scale"] = 1.0 if step < 150 else 1000.0

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = normal(g, 64, 8)
        with torch.no_grad():
            action = torch.multinomial(model(state).softmax(1), 1, generator=g)
        reward = (state @ w).gather(1, action) + 3.0
        return state, (action[:, 0], held["scale"] * reward[:, 0])

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        action, reward = target
        return (F.cross_entropy(output, action, reduction="none") * reward).mean()

    state = normal(seeded(98), 256, 8)

    def entropy(net_: nn.Module) -> float:
        return float(Categorical(logits=net_(state)).entropy().mean() / math.log(4))

    return training(model, sample, loss, torch.optim.SGD(model.parameters(), lr=0.02), entropy, after=after)


@late(
    "late-value-units-go-dormant",
    900,
    [("DEAD", "act2"), ("DEAD", "fc2"), ("DEAD", "act1"), ("DEAD", "fc1")],
    early=0.05,
    at_least=0.5,
    source="https://arxiv.org/abs/2302.12902",
)
def dormant() -> Training:
    """A value net whose targets move all the time, at a high rate: more and more of its units never fire
    again."""
    model = net(6, 64, 1)
    turn = [0]

    def after(step: int) -> None:
        turn[0] = step // 30

    def sample(g: Generator) -> tuple[Tensor, Tensor]:
        x = normal(g, 64, 6)
        w = normal(seeded(200 + turn[0]), 6)
        return x, 10 * torch.sign(x @ w)[:, None] * (1.0 if turn[0] % 2 else -1.0)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    after_rate = scheduled(optimizer, lambda step: 1.0 if step < 100 else 4.0)

    def both_after(step: int) -> None:
        after(step)
        after_rate(step)

    figure = dead_share(model.get_submodule("act2"), normal(seeded(98), 512, 6))
    return training(model, sample, F.mse_loss, optimizer, figure, after=both_after)


@late(
    "late-values-chase-themselves",
    900,
    [("EXPLODING", "*"), ("UNSTABLE", "*")],
    early=0.05,
    at_least=1e3,
)
def values_chase() -> Training:
    """Q values that are learned from their own maximum, without a target net, from moves that are not the
    policy's, and discounted by more than one after a change of the settings: they grow without end."""
    model = net(4, 48, 3)
    held = {"gamma": 0.9}

    def after(step: int) -> None:
        held["gamma"] = 0.9 if step < 300 else 1.1

    def sample(g: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state, action = normal(g, 64, 4), choice(g, 3, 64)
        after_state = 0.9 * state + 0.3 * normal(g, 64, 4)
        with torch.no_grad():
            value = model(after_state).amax(1)
        return state, (action, state[:, 0] * (action - 1.0) + held["gamma"] * value)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(output.gather(1, target[0][:, None])[:, 0], target[1])

    def size(net_: nn.Module) -> float:
        return float(net_(normal(seeded(98), 256, 4)).abs().mean())

    return training(model, sample, loss, torch.optim.Adam(model.parameters(), lr=3e-3), size, after=after)


@late(
    "late-router-picks-one-expert",
    600,
    [("DEAD", "experts"), ("SATURATION", "router")],
    early=0.16,
    at_least=0.98,
    source="https://arxiv.org/abs/2101.03961",
)
def router_picks_one() -> Training:
    """The price on uneven loads gets the wrong sign by a change of settings: one expert gets all."""
    x, y, xt, _ = table("digits")
    model = Experts(64, 24, 10, 4, 1)
    held = {"price": 0.2}

    def after(step: int) -> None:
        held["price"] = 0.2 if step < 100 else -0.5

    def loss(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + held["price"] * output[1]

    def load(_: nn.Module) -> float:
        return float(F.one_hot(model.router(xt).argmax(1), 4).float().mean(0).max())

    return training(model, rows(x, y, size=64), loss, 3e-3, load, after=after)


class Gated(nn.Module):
    """A highway: each layer passes on what its gate does not let it change."""

    def __init__(self, size: int, depth: int) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(64, size), nn.Linear(size, 10)
        self.change = nn.ModuleList(nn.Linear(size, size) for _ in range(depth))
        self.gate = nn.ModuleList(nn.Linear(size, size) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = torch.tanh(self.enter(x))
        for change, gate in zip(self.change, self.gate, strict=True):
            let = torch.sigmoid(gate(x))
            x = let * torch.tanh(change(x)) + (1 - let) * x
        return self.head(x)


@late(
    "late-gates-shut",
    1000,
    [("SATURATION", "gate"), ("VANISHING", "change"), ("DEAD", "change")],
    early=0.1,
    at_most=0.01,
)
def gates_shut() -> Training:
    """A price on open gates is far too high: all gates shut, and what is behind them learns no more."""
    x, y, xt, _ = table("digits")
    model = Gated(32, 3)
    held = {"price": 0.0}

    def after(step: int) -> None:
        held["price"] = 0.0 if step < 120 else 5.0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        price = torch.stack([gate.get_parameter("bias").mean() for gate in model.gate]).sum()
        return F.cross_entropy(output, target) + held["price"] * price

    def openness(_: nn.Module) -> float:
        outputs = [output_of(model, gate, xt) for gate in model.gate]
        return float(torch.sigmoid(torch.stack(outputs)).mean())

    return training(
        model, rows(x, y), loss, torch.optim.Adam(model.parameters(), lr=3e-2), openness, after=after
    )
