"""Threads: runs of several give what they give alone, and leave the states that threads share alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional import call, layer_gain, levels_of
from tests.functional.snapshots import difference, process, snapshot
from tests.hostile.runs import BATCH, run_of
from tests.models import CASES as MODELS
from tests.models import squares


class Slow(nn.Module):
    """Draws random numbers of every kind, and gives other threads a chance between them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.calls = nn.Linear(6, 6), nn.Linear(6, 2), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        h = nn.functional.dropout(self.a(x), 0.5) + float(np.random.rand())
        time.sleep(0.002)
        return self.b(nn.functional.dropout(h, 0.5)) * (1 + torch.rand(()))


def together(*runs: Callable[[], Any]) -> list[Any]:
    """Run functions in a thread each, started at one moment, and return what they return or raise."""
    results: list[Any] = [None] * len(runs)
    start = threading.Barrier(len(runs))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = runs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("transform", ["fused", "vjp"])
@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_two_models_in_two_threads_give_what_they_give_alone(seed: Any, transform: Any, detail: Any) -> None:
    options = {"seed": seed, "transform": transform, "detail": detail}
    models = [Slow(1), Slow(2), Slow(3)]
    torch.manual_seed(5)
    alone = [run_of(model, **options)() for model in models]
    before = [snapshot(model) for model in models]
    at_once = together(*(run_of(model, **options) for model in models))
    assert at_once == alone
    for model, was in zip(models, before, strict=True):
        assert difference(was, snapshot(model)) == ""


@pytest.mark.parametrize("detail", ["cheap", "full"])
def test_one_model_in_several_threads_gives_one_record(detail: Any) -> None:
    model = Slow(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    torch.manual_seed(5)
    alone = run_of(model, detail=detail, optimizer=optimizer)()
    before = snapshot(model, optimizer)
    assert together(*[run_of(model, detail=detail, optimizer=optimizer)] * 4) == [alone] * 4
    assert difference(before, snapshot(model, optimizer)) == ""
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_run_that_fails_does_not_hold_up_the_others() -> None:
    class Failing(Slow):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.calls == 3:
                raise ValueError("on the way")
            return y

    torch.manual_seed(5)
    alone, before = run_of(Slow(1))(), process()
    torch.manual_seed(5)
    failed, record = together(run_of(Failing(2)), run_of(Slow(1)))
    torch.manual_seed(5)
    assert isinstance(failed, ValueError)
    assert before["grad mode"] == process()["grad mode"]
    # each thread starts from the one global state, which the runs leave as it was
    assert record == alone


def test_ways_in_of_different_kinds_wait_for_one_another() -> None:
    model, other = Slow(1), MODELS["cnn"].build()
    batch = MODELS["cnn"].batch()
    torch.manual_seed(5)
    runs = [
        run_of(model),
        lambda: gf.diagnose(other, [batch] * 3, squares, steps=3).record,
        lambda: layer_gain(model, "b", BATCH, seed=1),
    ]
    alone = [run() for run in runs]
    assert together(*runs) == alone


def test_what_threads_share_is_left_as_it_was() -> None:
    compiled: Any = torch.compile(nn.Linear(6, 2), backend="eager")
    stance = torch._dynamo.eval_frame._stance.stance  # type: ignore[attr-defined]
    runs = [run_of(model) for model in (Slow(1), compiled, Slow(2), compiled)]
    before = process()
    together(*runs)
    assert difference(before, process()) == ""
    assert torch._dynamo.eval_frame._stance.stance == stance  # type: ignore[attr-defined]


def test_grad_and_inference_mode_are_each_threads_own() -> None:
    torch.manual_seed(5)
    model = Slow(1)
    alone = run_of(model)()

    def inside(mode: Any) -> Callable[[], Any]:
        def run() -> Any:
            with mode():
                record = run_of(model)()
                return record, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        return run

    found = together(inside(torch.no_grad), inside(torch.enable_grad), inside(torch.inference_mode))
    assert [f[0] for f in found] == [alone] * 3
    assert [f[1:] for f in found] == [(False, False), (True, False), (False, True)]


def test_a_run_within_a_run_of_one_thread_goes_on() -> None:
    inner, outer = Slow(1), Slow(2)
    records: list[gf.FlowRecord] = []
    torch.manual_seed(5)
    alone = run_of(outer, seed=4)()

    def loss(y: Tensor) -> Tensor:
        records.append(run_of(inner, seed=3)())
        return squares(y)

    record = gf.analyze(outer, [BATCH] * 6, loss, steps=6, seed=4)
    assert all(r == records[0] for r in records)
    np.testing.assert_array_equal(record.losses, alone.losses)
    assert [layer.grad_norm.tolist() for layer in record] == [layer.grad_norm.tolist() for layer in alone]


class Recurrent(nn.Module):
    """A recurrent layer, dropout, attention and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.drop = nn.GRU(6, 4, batch_first=True), nn.Dropout(0.5)
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.rnn(x[:, None])[0])
        return self.out(self.attention(h, h, h)[0])[:, 0]


LOOKS: dict[str, Callable[[Any], Any]] = {
    "layer_gain": lambda m: layer_gain(m, "", BATCH, seed=1).gain,
    "layer_vjp": lambda m: gf.layer_vjp(m, "out", BATCH, seed=1)[1].tolist(),
    "jacobian_between": lambda m: gf.jacobian_between(m, "rnn", "out", BATCH).singular_values().tolist(),
    "gradient_noise": lambda m: gf.gradient_noise(m, BATCH, squares, seed=1, method="loop").noise_scale,
    "vector_field": lambda m: gf.vector_field(m, squares, BATCH, seed=1, num_probes=1).divergence,
    "attention_weights": lambda m: gf.attention_weights(m, BATCH)["attention"].tolist(),
    "hidden_gradients": lambda m: gf.hidden_gradients(m.rnn, BATCH[None], lambda r: squares(r[0]))[
        "l0"
    ].tolist(),
    "levels_of": lambda m: levels_of(m.rnn)[0].weight_ih.tolist(),
    "call": lambda m: call(m, {}, {}, (BATCH,))[0].tolist(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_a_model_that_another_thread_analyses_is_at_the_users_own(name: str) -> None:
    """The analysis swaps working copies in, steps them, switches modes and draws random numbers."""
    model, found, threads = Recurrent().eval(), [], []
    alone = LOOKS[name](model)

    def batches() -> Tensor:
        if not threads and batches.drawn == 3:
            threads.append(threading.Thread(target=lambda: found.append(LOOKS[name](model))))
            threads[0].start()
            threads[0].join(0.2)
        batches.drawn += 1
        return BATCH

    batches.drawn = 0
    gf.analyze(model, batches, squares, steps=6, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    threads[0].join(60)
    assert found == [alone]
