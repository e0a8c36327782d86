"""A small forecaster, a metric learner and an acoustic model after public reports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .claims import Claim, flat, rises, training
from .data import choice, normal, seeded, setup, stack, uniform
from .registry import FLOAT32, Setup, sick


class _Forecast(nn.Module):
    """A recurrent forecaster whose outputs are the states of its last layer, or a linear map of them."""

    def __init__(self, width: int, mapped: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, width, batch_first=True)
        self.out = nn.LSTM(width, width if mapped else 2, batch_first=True)
        self.map = nn.Linear(width, 2) if mapped else None

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        states, _ = self.out(states)
        return states if self.map is None else 50 + 15 * self.map(states)


def _loads(g: torch.Generator) -> tuple[Tensor, Tensor]:
    t = torch.arange(25.0)[None, :, None]
    wave = torch.sin(0.5 * t + 6.3 * uniform(g, 16, 1, 1))
    y = torch.tensor([40.0, 60.0]) + torch.tensor([10.0, 15.0]) * wave + normal(g, 16, 25, 2)
    return (y[:, :-1] - 50) / 15, y[:, 1:]


@sick(
    "contact13b-forecast-states",
    [("SATURATION", "out")],
    flat("out", "tanh", 0.6, steps=18),
    allow=("VANISHING", "DEAD", "BOTTLENECK"),
    source="https://github.com/nicodjimenez/lstm/issues/37",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def forecast_states(sick: bool, width: int) -> Setup:
    """The states of the last recurrent layer, which lie between -1 and 1, are the forecasts themselves, while
    the targets are tens: the states run into their upper end and stay there. Repair: a linear layer after
    them, in the data's units."""
    return setup(_Forecast(width, not sick), _loads, F.mse_loss, 3e-2)


def gathered(module: str, below: float, *, steps: int = 20) -> Claim:
    """After some steps what differs between a module's outputs is a small part of what differed at first."""

    def claim(setup: Setup) -> tuple[bool, str]:
        spreads = []
        for step in training(setup, steps, (module,)):
            rows = step.outputs[module].detach()
            spreads.append(float((rows - rows.mean(0)).square().mean().sqrt()))
        ratio = spreads[-1] / spreads[0]
        return ratio < below, f"spread of {module} after {steps} steps / at first = {ratio:.2g}"

    return claim


class _Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


def _noisy(g: torch.Generator) -> tuple[Tensor, Tensor]:
    kind = torch.randperm(16, generator=g)[:8].repeat_interleave(4)
    return normal(seeded(44), 16, 24)[kind] + 1.5 * normal(g, 32, 24), kind


@sick(
    "contact13b-metric-hardest",
    [("BOTTLENECK", "*")],
    gathered("unit", 0.5),
    allow=("UNSTABLE", "VANISHING"),
    source="https://github.com/KevinMusgrave/pytorch-metric-learning/issues/20",
    widths=(64,),
    dtypes=(FLOAT32,),
)
def metric_hardest(sick: bool, width: int) -> Setup:
    """Of each anchor only the farthest of its kind and the nearest of the others count, from the start and on
    hard data: the quickest way down is to draw all embeddings together, and the loss stays at the margin.
    Repair: all triplets."""
    model = stack(a=nn.Linear(24, width), act=nn.ReLU(), b=nn.Linear(width, 32), unit=_Unit())

    def loss(rows: Tensor, kind: Tensor) -> Tensor:
        far = ((rows[:, None] - rows[None]).square().sum(-1) + 1e-12).sqrt()
        same = kind[:, None] == kind
        if sick:
            worst, best = far.masked_fill(~same, 0).amax(1), far.masked_fill(same, 9.0).amin(1)
            return (worst - best + 0.2).relu().mean()
        pairs = same & ~torch.eye(len(kind)).bool()
        chosen = pairs[:, :, None] & ~same[:, None, :]
        return (far[:, :, None] - far[:, None, :] + 0.2).relu()[chosen].mean()

    return setup(model, _noisy, loss, 1e-2)


class _Total(torch.autograd.Function):
    """The logarithm of the sum over all allowed paths of the exponential of their scores, frame by frame."""

    @staticmethod
    def forward(ctx, scores: Tensor, allowed: Tensor, scaled: bool) -> Tensor:
        masked = scores.masked_fill(~allowed, -1e30)
        ctx.save_for_backward(masked.softmax(-1))
        ctx.scaled = scaled
        return masked.logsumexp(-1).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (posterior,) = ctx.saved_tensors
        return (posterior * grad[:, None, None] if ctx.scaled else posterior), None, None


class _Acoustic(nn.Module):
    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        self.net = stack(
            a=nn.Conv1d(8, width, 3, padding=1),
            act1=nn.ReLU(),
            b=nn.Conv1d(width, width, 3, padding=1),
            act2=nn.ReLU(),
        )
        self.head = nn.Linear(width, 12)
        self.scaled = scaled

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        scores = self.head(self.net(x.transpose(1, 2)).transpose(1, 2))
        right = _Total.apply(scores, allowed, self.scaled)
        return _Total.apply(scores, torch.ones_like(allowed), self.scaled) - right


def _utterances(g: torch.Generator) -> tuple[tuple[Tensor, Tensor], None]:
    phone = choice(g, 6, 16, 20)
    x = normal(seeded(45), 6, 8)[phone] + 0.4 * normal(g, 16, 20, 8)
    return (x, torch.arange(12) // 2 == phone[..., None]), None  # two units a phone


@sick(
    "contact13b-autograd-total",
    [("UNSTABLE", "*")],
    rises(2.0),
    allow=("EXPLODING",),
    source="https://github.com/k2-fsa/k2/issues/341",
    widths=(32,),
    dtypes=(FLOAT32,),
)
def autograd_total(sick: bool, width: int) -> Setup:
    """The backward pass of the function that sums over paths returns the posteriors and leaves out the
    gradient that it was handed, and with it the sign: the right paths are pushed down with all the others,
    and the loss climbs. Repair: posteriors times that gradient."""
    return setup(_Acoustic(width, not sick), _utterances, lambda gap, _: gap.mean() / 20, 1e-2)
