"""Cases from public reports: embeddings, agents and diffusion."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .claims import no_gradient, rank_below, zero_at_first
from .contact6b_1 import ONE, digits
from .data import choice, normal, setup, sgd, trained, uniform
from .registry import Setup, healthy, sick

# ------------------------------------------------------------------------------------- embeddings


class _TwoViews(nn.Module):
    """Two noisy views of each picture: the prediction from either is to meet the projection of the other."""

    def __init__(self, width: int, stopped: bool) -> None:
        super().__init__()
        self.stopped = stopped
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU()
        )
        self.projector = nn.Sequential(
            nn.Linear(4 * width, 2 * width),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, 2 * width),
        )
        self.predictor = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 2 * width))

    def forward(self, one: Tensor, other: Tensor) -> list[tuple[Tensor, Tensor]]:
        a, b = self.projector(self.encoder(one)), self.projector(self.encoder(other))
        p, q = self.predictor(a), self.predictor(b)
        return [(p, b.detach()), (q, a.detach())] if self.stopped else [(p, b), (q, a)]


def _views(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], None]:
    picture, _ = digits(g, 128)
    return (picture + 0.2 * normal(g, *picture.shape), picture + 0.2 * normal(g, *picture.shape)), None


def _unlike(output: list[tuple[Tensor, Tensor]], _: None) -> Tensor:
    return sum((1 - F.cosine_similarity(p, z).mean() for p, z in output), torch.zeros(())) / 2


@sick(
    "contact6b-views-without-stop",
    [("BOTTLENECK", "*")],
    rank_below("projector", 2.0),
    source="https://github.com/lightly-ai/lightly/issues/559",
    **ONE,
)
def views_without_stop(sick: bool, width: int) -> Setup:
    """The projections that the predictions are to meet are not detached: both sides move to one direction for
    all pictures, the loss is near perfect, and neighbours among the projections tell ever fewer digits.
    Handed over after 200 steps. Repaired by detaching the projections."""
    ready = setup(_TwoViews(width, stopped=not sick), _views, _unlike, sgd(0.1, 0.9))
    return trained(ready, 200) if sick else ready


class _Embedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, picture: Tensor) -> Tensor:
        return F.normalize(self.net(picture), dim=1)


def _triplet(output: Tensor, kind: Tensor) -> Tensor:
    far = (2 - 2 * output @ output.T).clamp_min(1e-6).sqrt()
    same = kind[:, None] == kind
    terms = F.relu(far[:, :, None] - far[:, None, :] + 0.2)
    return terms[same[:, :, None] & ~same[:, None, :]].mean()


@healthy("contact6b-triplets-mostly-met", **ONE)
def triplets_mostly_met(width: int) -> Setup:
    """All triplets of a batch of digits count, and soon most are met and give nothing: the loss and its
    gradients become a small part of what they were, as the few that are left are what there is to learn."""
    return setup(_Embedding(width), digits, _triplet, 3e-3)


# ------------------------------------------------------------------------------------------ agents


class _Values(nn.Module):
    """The values of the moves of a game, with the copy that stays behind."""

    def __init__(self, inputs: int, moves: int, width: int) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(inputs, 4 * width), nn.ReLU(), nn.Linear(4 * width, moves))
        self.behind = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, seen: Tensor, move: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ahead = self.behind(after).amax(1, keepdim=True)
        return self.online(seen).gather(1, move), ahead


def _game(g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    seen, move = uniform(g, 64, 8), choice(g, 4, 64, 1)
    score = 10 + 20 * (seen.gather(1, move) > 0.5).float()
    return (seen, move, uniform(g, 64, 8)), score


def _clipped(output: tuple[Tensor, Tensor], score: Tensor) -> Tensor:
    value, ahead = output
    return (score + 0.9 * ahead - value).clamp(-1, 1).square().mean()


def _huber(output: tuple[Tensor, Tensor], score: Tensor) -> Tensor:
    value, ahead = output
    return F.smooth_l1_loss(value, score + 0.9 * ahead)


@sick(
    "contact6b-game-clipped-error",
    [("DEAD", "online")],
    no_gradient("*"),
    allow=("SATURATION",),
    source="https://github.com/devsisters/DQN-tensorflow/issues/16",
    **ONE,
)
def game_clipped_error(sick: bool, width: int) -> Setup:
    """The error of an agent's values is clipped before it is squared: as scores come in tens, each error is
    beyond the clip, where it has no gradient. Repaired by the loss that is straight there, so that the
    gradient is what is clipped."""
    return setup(_Values(8, 4, width), _game, _clipped if sick else _huber, 3e-2)


@cache
def _pole() -> tuple[Tensor, ...]:
    """Return what a random agent has seen at the pole, with its moves and whether it fell."""
    env = gymnasium.make("CartPole-v1")
    draw = torch.Generator().manual_seed(64)
    rows: list[Any] = []
    seen, _ = env.reset(seed=0)
    for _ in range(2000):
        move = int(choice(draw, 2))
        after, _, fell, _, _ = env.step(move)
        rows.append((seen, move, after, float(fell)))
        seen = env.reset()[0] if fell else after
    columns = list(zip(*rows, strict=True))
    seen, after = (torch.stack([torch.from_numpy(x) for x in columns[i]]) for i in (0, 2))
    return seen, torch.tensor(columns[1])[:, None], after, torch.tensor(columns[3])[:, None]


class _Pole(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.values = _Values(4, 2, width)

    def forward(self, seen: Tensor, move: Tensor, after: Tensor, fell: Tensor) -> tuple[Tensor, Tensor]:
        value, ahead = self.values(seen, move, after)
        return value, (1 - fell) * ahead


def _replay(g: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
    rows = choice(g, len(_pole()[0]), 64)
    return tuple(column[rows] for column in _pole()), torch.ones(64, 1)


@healthy("contact6b-pole-first-values", no_gradient("values.behind"), **ONE)
def pole_first_values(width: int) -> Setup:
    """An agent at the pole, before the first move of its target copy: the copy has no gradient, each sample
    trains one of the two values, and every reward is the same one; the values rise to their targets."""
    return setup(_Pole(width), _replay, _huber, 1e-3)


# --------------------------------------------------------------------------------------- diffusion


class _Denoiser(nn.Module):
    """Tells the noise in a noisy picture of a digit; the last layer starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(2, 2 * width), nn.SiLU())
        self.first, self.second = nn.Linear(64, 8 * width), nn.Linear(10 * width, 8 * width)
        self.out = nn.Linear(8 * width, 64)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
        h = F.silu(self.first(noisy.flatten(1)))
        time = self.time(torch.cat([torch.sin(3 * t), torch.cos(3 * t)], 1))
        return self.out(F.silu(self.second(torch.cat([h, time], 1))))


def _noised(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
    picture, _ = digits(g)
    t, noise = uniform(g, len(picture), 1), normal(g, len(picture), 64)
    return ((1 - t).sqrt() * (2 * picture.flatten(1) - 1) + t.sqrt() * noise, t), noise


@healthy("contact6b-noise-zero-start", zero_at_first("first", "second", "time"), **ONE)
def noise_zero_start(width: int) -> Setup:
    """A diffusion model whose last layer starts at zero: it predicts no noise at first, and in the first step
    no layer but the last has a gradient; all have one from the second."""
    return setup(_Denoiser(width), _noised, F.mse_loss, 3e-3)
