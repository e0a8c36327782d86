"""Mixtures of experts and other models that send samples down different ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import every, flat, no_gradient, stuck
from .data import Setup, clusters, normal, seeded, setup, stack
from .registry import healthy, sick

EXPERTS, SIZE, KINDS = 4, 12, 6


def expert(width: int) -> nn.Sequential:
    """Return one expert."""
    return stack(up=nn.Linear(SIZE, width), act=nn.GELU(), down=nn.Linear(width, SIZE))


class Mixture(nn.Module):
    """A hard mixture: each sample goes to its `top` experts, weighted by the router unless told."""

    def __init__(self, width: int, top: int = 1, *, weighted: bool = True) -> None:
        super().__init__()
        self.router = nn.Linear(SIZE, EXPERTS)
        self.experts = nn.ModuleList([expert(width) for _ in range(EXPERTS)])
        self.head = nn.Linear(SIZE, KINDS)
        self.top, self.weighted = top, weighted

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores and the router's probabilities."""
        share = self.router(x).softmax(-1)
        weight, chosen = share.topk(self.top, -1)
        rows = []
        for slot in range(self.top):
            out = torch.zeros_like(x)
            for i, one in enumerate(self.experts):
                mine = chosen[:, slot] == i
                if mine.any():
                    out = out.index_put((mine.nonzero().squeeze(1),), one(x[mine]))
            rows.append(out * weight[:, slot, None] if self.weighted else out)
        return self.head(x + sum(rows)), share


def balanced(output: tuple[Tensor, Tensor], kind: Tensor) -> Tensor:
    """Return the cross entropy and a price on sending most samples to the same experts."""
    scores, share = output
    return F.cross_entropy(scores, kind) + 0.1 * EXPERTS * share.mean(0).square().sum()


@sick(
    "moe-experts-without-tokens",
    [("DEAD", "experts")],
    no_gradient("experts.1", "experts.2", "experts.3"),
    allow=["SATURATION"],
    source="https://arxiv.org/abs/2101.03961",
)
def experts_without_tokens(sick: bool, width: int) -> Setup:
    """One expert starts ahead by a bias of the router, gets every sample and keeps its lead; the optimizer
    holds three that never run. A price on imbalance, and no bias, spreads them."""
    net = Mixture(width)
    if sick:
        with torch.no_grad():
            net.router.bias.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))
    loss = (lambda o, y: F.cross_entropy(o[0], y)) if sick else balanced
    return setup(net, clusters(SIZE, KINDS), loss, 5e-3)


@sick("moe-router-only-chooses", [("DEAD", "router")], no_gradient("router"))
def router_only_chooses(sick: bool, width: int) -> Setup:
    """The router's numbers choose the expert and do not weigh its output, and a choice has no gradient."""
    net = Mixture(width, weighted=not sick)
    return setup(net, clusters(SIZE, KINDS), lambda o, y: F.cross_entropy(o[0], y), 5e-3)


class Soft(nn.Module):
    """A soft mixture: all experts run, weighted by the router's softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router, self.share = nn.Linear(SIZE, EXPERTS), nn.Softmax(-1)
        self.experts = nn.ModuleList([expert(width) for _ in range(EXPERTS)])
        self.head = nn.Linear(SIZE, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        share = self.share(self.router(x))
        return self.head(x + sum(share[:, i, None] * one(x) for i, one in enumerate(self.experts)))


def ways(g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return samples of four groups, which two features tell, and classes by a rule that each group has."""
    x = normal(g, 64, SIZE)
    group = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    rules = normal(seeded(81), EXPERTS, KINDS, SIZE)
    return 2 * x, torch.einsum("nks,ns->nk", rules[group], x).argmax(-1)


@sick(
    "moe-router-too-sharp",
    [("SATURATION", "*")],
    every(flat("share", "softmax", 0.9), stuck(1.0, steps=200)),
    allow=["VANISHING", "DEAD"],
    steps=200,
)
def router_too_sharp(sick: bool, width: int) -> Setup:
    """The router is divided by its temperature twice, so its softmax is all or nothing from the start, and it
    cannot learn which of four linear experts to ask."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = stack(fc0=nn.Linear(SIZE, width), act=nn.Tanh(), fc1=nn.Linear(width, EXPERTS))
            self.share = nn.Softmax(-1)
            self.experts = nn.ModuleList([nn.Linear(SIZE, KINDS) for _ in range(EXPERTS)])

        def forward(self, x: Tensor) -> Tensor:
            share = self.share(self.router(x) / (0.0025 if sick else 1.0))
            return sum(share[:, i, None] * one(x) for i, one in enumerate(self.experts))

    return setup(Linear(), ways, F.cross_entropy, 1e-2)


@sick("moe-early-exit-never-taken", [("DEAD", "late")], no_gradient("late"))
def early_exit(sick: bool, width: int) -> Setup:
    """A confidence of zero is asked for at the early exit, so every batch leaves there and the late layers
    never run; in training both exits are to be taken."""

    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early = stack(fc=nn.Linear(SIZE, width), act=nn.ReLU())
            self.exit = nn.Linear(width, KINDS)
            self.late = stack(fc=nn.Linear(width, width), act=nn.ReLU(), out=nn.Linear(width, KINDS))

        def forward(self, x: Tensor) -> list[Tensor]:
            h = self.early(x)
            scores = self.exit(h)
            sure = scores.softmax(-1).amax(-1).mean() >= (0.0 if sick else 1.0)
            return [scores] if sure else [scores, self.late(h)]

    def loss(exits: list[Tensor], kind: Tensor) -> Tensor:
        return sum(F.cross_entropy(scores, kind) for scores in exits) / len(exits)

    return setup(Exits(), clusters(SIZE, KINDS), loss, 5e-3)


@sick(
    "moe-shared-passage-of-one-number",
    [("BOTTLENECK", "shared")],
    stuck(0.4, steps=150),
    allow=["VANISHING"],
    steps=150,
)
def shared_passage(sick: bool, width: int) -> Setup:
    """Tokens pass a shared projection of one number before they are sent to the experts, which so have
    nothing to tell them by; a projection as wide as the token has."""
    k = 1 if sick else SIZE

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.spread, self.mixture = nn.Linear(SIZE, k), nn.Linear(k, SIZE), Soft(width)

        def forward(self, x: Tensor) -> Tensor:
            return self.mixture(self.spread(self.shared(x)))

    return setup(Net(), clusters(SIZE, KINDS, number=64), F.cross_entropy, 5e-3)


@healthy("moe-ok-best-two-of-four")
def ok_best_two(width: int) -> Setup:
    """Two experts per sample in batches of eight: now and then one gets none, and no gradient."""
    return setup(Mixture(width, top=2), clusters(SIZE, KINDS, number=8), balanced, 3e-3)


@healthy("moe-ok-one-language-per-batch")
def ok_one_language(width: int) -> Setup:
    """Three languages have an adapter each, and a batch is in one of them: two adapters rest in each step."""

    class Adapters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = stack(fc=nn.Linear(SIZE, width), act=nn.GELU())
            self.languages = nn.ModuleDict({name: nn.Linear(width, width) for name in ("de", "fi", "sw")})
            self.head = nn.Linear(width, KINDS)

        def forward(self, x: Tensor, language: str) -> Tensor:
            h = self.trunk(x)
            return self.head(h + self.languages[language](h))

    inner, names, turn = clusters(SIZE, KINDS), ("de", "fi", "sw"), [0]

    def sample(g: torch.Generator) -> tuple[tuple[Tensor, str], Tensor]:
        x, kind = inner(g)
        turn[0] += 1
        return (x, names[turn[0] % 3]), (kind + turn[0] % 3) % KINDS

    return setup(Adapters(), sample, F.cross_entropy, 5e-3)
