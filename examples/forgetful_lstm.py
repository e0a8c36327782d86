"""An LSTM that is told a bit at the first step and asked for it 200 steps later; and what makes it remember.

python examples/forgetful_lstm.py

At PyTorch's initialisation the forget gates keep about a half at every step, so the gradient of the answer is
gone within some thirty. What it takes is forget gates that keep for as long as the sequence is; and, so that
the noise of 200 steps does not drown the bit, input gates that let little in (both are what chrono
initialisation does: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf

LENGTH, SAMPLES, WIDTH, RATE, UPDATES = 200, 64, 32, 5e-3, 80


class Rememberer(nn.Module):
    """An LSTM, of which the last step alone is read."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the bit."""
        return self.head(self.lstm(x)[0][:, -1])


def batches() -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a source of (sequence, bit): the bit as ±1 in the first step, and noise in the others."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        bit = torch.randint(0, 2, (SAMPLES,), generator=generator)
        x = torch.zeros(SAMPLES, LENGTH, 2)
        x[:, 0, 0] = 2.0 * bit - 1.0
        x[:, 1:, 1] = torch.randn(SAMPLES, LENGTH - 1, generator=generator)
        return x, bit

    return draw


def started(forget: float | None = None, write: float = 0.0) -> nn.Module:
    """Return a model whose forget and input gates start at a bias; None for PyTorch's initialisation."""
    torch.manual_seed(0)
    model = Rememberer()
    if forget is not None:
        with torch.no_grad():
            model.lstm.bias_hh_l0[: 2 * WIDTH] = 0.0
            model.lstm.bias_ih_l0[:WIDTH] = write
            model.lstm.bias_ih_l0[WIDTH : 2 * WIDTH] = forget
    return model


def build() -> tuple:
    """Return the sick model."""
    model = started()
    return model, batches(), F.cross_entropy, torch.optim.Adam(model.parameters(), RATE)


def repaired() -> tuple:
    """Return the repair."""
    model = started(math.log(LENGTH - 1), -2.0)
    return model, batches(), F.cross_entropy, torch.optim.Adam(model.parameters(), RATE)


def learned(model: nn.Module) -> float:
    """Train a model for some updates, and return what share of the last ten batches' answers was right."""
    optimizer, draw, right = torch.optim.Adam(model.parameters(), RATE), batches(), []
    for _ in range(UPDATES):
        x, bit = draw()
        answer = model(x)
        optimizer.zero_grad()
        F.cross_entropy(answer, bit).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right.append(float((answer.argmax(1) == bit).float().mean()))
    return sum(right[-10:]) / 10


def main() -> None:
    """Print what gradflow says of the sick model and of the repair, and what either learns."""
    for name, builder in (("sick", build), ("repaired", repaired)):
        model, draw, loss_fn, optimizer = builder()
        analyzer = gf.RecurrentAnalyzer(model)
        results = analyzer.analyze(draw, loss_fn, steps=5, optimizer=optimizer)
        print(f"{name}: {'no illness found' if results.report.ok else 'sick'}")
        for cause in results.report.causes:
            print(f"  cause: {cause.issue_type.value} in {cause.layer}: {cause.mechanism}")
        found = results.reservoir_dynamics
        print(f"  radius {found.spectral_radius:.2f}, Lyapunov exponent {found.lyapunov:.2f}")
        print(f"  of {LENGTH} steps: memory {found.memory_depth}, recall {found.recall_depth}")
    print(f"after {UPDATES} updates:")
    long = math.log(LENGTH - 1)
    for text, forget, write in (
        ("PyTorch's initialisation", None, 0.0),
        ("forget bias 1", 1.0, 0.0),
        ("forget bias 3", 3.0, 0.0),
        (f"forget bias {long:.1f}", long, 0.0),
        (f"forget bias {long:.1f}, input bias -2", long, -2.0),
    ):
        print(f"  {text}: {'remembers' if learned(started(forget, write)) > 0.9 else 'guesses'}")


if __name__ == "__main__":
    main()
