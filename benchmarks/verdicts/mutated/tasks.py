"""What the small transformers are trained on: grammars that take attention, and how well they learn them.

*Following*: a word follows from the one before it and the one four before it, by a table; with a little
noise. It takes attention to a fixed distance. *Asking*: a sequence of random length, padded; its first
position asks for one of the others. It takes attention by content, and pads must be left out: when it is
judged, there are more of them than in training.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import LENGTH, WORDS

BATCH, RATE = 32, 3e-3
STEPS = {"gpt": 120, "bert": 220, "llama": 120}
KINDS = ("gpt", "bert", "llama")


def following(g: torch.Generator, number: int, time: int = 16) -> tuple[Tensor, Tensor]:
    """Return tokens of shape (number, time), and for each the one that comes next."""
    table = torch.randint(WORDS, (WORDS,), generator=torch.Generator().manual_seed(7))
    words = torch.randint(WORDS, (number, time + 1), generator=g)
    noise = torch.rand(words.shape, generator=g) < 0.05
    for t in range(4, time + 1):
        words[:, t] = torch.where(noise[:, t], words[:, t], table[words[:, t - 4]])
    return words[:, :-1], words[:, 1:]


def asking(g: torch.Generator, number: int, pads: tuple[int, int] = (4, 12)) -> tuple[Tensor, Tensor]:
    """Return padded tokens of shape (number, 24), and the class of each row.

    The first position asks for one of four keys; behind it there is one word of each key, among fillers, and
    there are four words to a key. The class is which of them it was.
    """
    time = 24
    words = torch.randint(20, WORDS, (number, time), generator=g)
    asked = torch.randint(4, (number, 1), generator=g)
    classes = torch.randint(4, (number, 4), generator=g)
    length = time - torch.randint(pads[0], pads[1] + 1, (number, 1), generator=g)
    behind = torch.arange(1, time) < length
    order = torch.where(behind, torch.rand(number, time - 1, generator=g), -1.0).argsort(1, descending=True)
    words.scatter_(1, 1 + order[:, :4], 4 + 4 * torch.arange(4) + classes)
    words[:, :1] = asked
    words[torch.arange(time) >= length] = WORDS
    return words, classes.gather(1, asked)[:, 0]


def loss_of(kind: str, scores: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores."""
    return F.cross_entropy(scores if kind == "bert" else scores.flatten(0, 1), target.flatten())


def batches(kind: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of training without end."""
    g = torch.Generator().manual_seed(seed)
    while True:
        yield asking(g, BATCH) if kind == "bert" else following(g, BATCH)


def trained(model: nn.Module, kind: str, seed: int, steps: int | None = None) -> nn.Module:
    """Train a model in place, as long as all of its kind are, and return it."""
    model.train()
    steps = STEPS[kind] if steps is None else steps
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    source = batches(kind, seed)
    for _ in range(steps):
        tokens, target = next(source)
        optimizer.zero_grad()
        loss_of(kind, model(tokens), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that all are trained with."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


@torch.no_grad()
def judged(model: nn.Module, kind: str) -> float:
    """Return the loss on fresh data as the model will be used: in eval mode, and without what comes later.

    A language model is shown each sequence up to a position and asked for the next word alone, so that one
    that has learned to look ahead is found out; a classifier is shown more padding.
    """
    model.eval()
    g = torch.Generator().manual_seed(10_007)
    torch.manual_seed(0)
    if kind == "bert":
        words, target = asking(g, 512, pads=(10, 14))
        more = torch.full((len(words), LENGTH - words.shape[1]), WORDS)
        return float(F.cross_entropy(model(torch.cat([words, more], 1)), target))
    words, target = following(g, 256)
    lengths = range(6, words.shape[1] + 1, 3)
    losses = [F.cross_entropy(model(words[:, :n])[:, -1], target[:, n - 1]) for n in lengths]
    return float(torch.stack(losses).mean())
