"""Models put together at random from bad habits, failing at random places, through every way in.

After each run everything that can be reached from the model, the loss, the optimizer and the batch, and every
random state of the process, is compared with what it was, bit for bit. `GRADFLOW_FUZZ_RUNS` asks for more
runs than the suite has time for; each is seeded by its number alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.errors import NotRestoredError
from gradflow.functional import (
    analyze_custom,
    attention_weights,
    graph_of,
    hidden_gradients,
    layer_gain,
    per_sample_gradients,
    vector_field,
)
from tests.functional.snapshots import content, difference, process
from tests.hostile.pieces import PIECES, Boom, Fuse, Loss, OfOutput, Sharp, Threaded, plain_loss

RUNS = int(os.environ.get("GRADFLOW_FUZZ_RUNS", "48"))


CHUNK = 12  # runs to a test


def make_optimizer(rng: random.Random, parameters: list[nn.Parameter]) -> Any:
    kinds: list[Callable[[], Any]] = [
        lambda: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        lambda: torch.optim.AdamW(parameters, lr=0.01),
        lambda: torch.optim.LBFGS(parameters, max_iter=2),
        lambda: Sharp(parameters, {}),
    ]
    return rng.choice(kinds)()


def ways_in(rng: random.Random, model: nn.Module, loss: Any, x: Tensor, optimizer: Any) -> dict[str, Any]:
    """Return every way in, as a call."""

    def draw() -> Tensor:
        Fuse.light()
        return x

    def watch(done: int, steps: int) -> None:
        Fuse.light()

    def deepen(record: Any) -> bool:
        Fuse.light()
        return True

    lstm = nn.LSTM(4, 4)
    options: dict[str, Any] = {
        "steps": 2, "seed": rng.choice([None, 3]), "mode": rng.choice(["train", "eval", "keep"]),
        "progress": watch, "optimizer": optimizer,
    }  # fmt: skip
    return {
        "cheap": lambda: gf.analyze(model, draw, loss, deepen=deepen, **options),
        "full": lambda: gf.analyze(model, [x] * 2, loss, detail="full", **options),
        "vjp": lambda: gf.analyze(model, draw, loss, transform="vjp", **options),
        "custom": lambda: analyze_custom(model, lambda m, step: m(x) + m(x), loss, **options),
        "diagnose": lambda: gf.diagnose(model, [x] * 2, loss, steps=2, optimizer=optimizer),
        "graph": lambda: graph_of(model, x, loss),
        "noise": lambda: gf.gradient_noise(model, x, loss, method=rng.choice(["loop", "vmap"])),
        "samples": lambda: list(per_sample_gradients(model, x, loss, method="loop")),
        "gain": lambda: layer_gain(model, "0", x, num_probes=2),
        "field": lambda: vector_field(model, loss, x, num_probes=2, max_exact=2),
        "weights": lambda: attention_weights(model, x),
        "hidden": lambda: hidden_gradients(lstm, x[None], OfOutput(loss)),
    }


WAYS = ["cheap", "full", "vjp", "custom", "diagnose", "graph", "noise", "samples", "gain", "field", "weights",
        "hidden"]  # fmt: skip


def run(number: int) -> str:
    """Do one run, compare, and return how it ended."""
    rng = random.Random(number)
    torch.manual_seed(number)
    pieces = [rng.choice(PIECES)() for _ in range(rng.randint(1, 3))]
    model = nn.Sequential(nn.Linear(4, 4), *pieces, nn.Linear(4, 2)).train(rng.random() < 0.7)
    if rng.random() < 0.5:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    loss = rng.choice([Loss(), plain_loss])
    parameters = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    optimizer = make_optimizer(rng, parameters) if rng.random() < 0.5 else None
    x = torch.randn(5, 4)
    way = WAYS[number % len(WAYS)]
    call = ways_in(rng, model, loss, x, optimizer)[way]
    Fuse.lit, Fuse.limit = 0, rng.choice([0] * 8 + [1, 2, 3, 5, 8, 13])
    random.seed(number)
    np.random.seed(number)

    def look() -> Any:
        held = (model, loss, x, *([optimizer] if optimizer is not None else []))
        return [content(value) for value in held], process()

    before, ended = look(), "ran"
    try:
        call()
    except Boom:
        ended = "failed"
    except NotRestoredError:
        raise
    except Exception as error:
        ended = f"refused: {type(error).__name__}: {error}"
    names = [type(piece).__name__ for piece in pieces]
    assert difference(before, look()) == "", f"run {number}, {way} of {names}: {ended}"
    return ended


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("start", range(0, RUNS, CHUNK))
def test_everything_is_as_before_whatever_the_model_does(start: int) -> None:
    ended = [run(number) for number in range(start, min(start + CHUNK, RUNS))]
    # the check has a meaning only where models run: most of them must, some are made to fail
    assert ended.count("ran") >= len(ended) // 3, ended
    odd = [text for text in ended if "please report" in text or "AttributeError" in text]
    assert odd == []


@pytest.mark.parametrize("piece", range(len(PIECES) - 2))
def test_a_snapshot_sees_what_each_piece_does(piece: int) -> None:
    """The check itself: a plain call leaves a trace."""
    made = PIECES[piece]()
    x = torch.randn(5, 4)
    before = content([made, x])[2], process()
    Fuse.lit, Fuse.limit = 0, 0
    made(x)
    changed = difference(before, (content([made, x])[2], process())) != ""
    assert changed or isinstance(made, Threaded)
