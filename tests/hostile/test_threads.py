"""Threads: runs of several give what they give alone, and leave the states that threads share alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradflow as gf
from gradflow.errors import OtherThreadError
from gradflow.functional import Jacobian, call, layer_gain, levels_of
from tests.functional.snapshots import difference, process, snapshot
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


BATCH = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def run_of(model: nn.Module, **options: Any) -> Callable[[], gf.FlowRecord]:
    return lambda: gf.analyze(model, [BATCH] * 6, squares, steps=6, **options)


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


# ------------------------------------------------------------------------------- threads in a model


class Branches(nn.Module):
    """Branches that a subclass runs in some way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)
        )
        self.out = nn.Linear(12, 2)

    def run(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat(self.run(x), -1))


class Pooled(Branches):
    """By a pool, made anew in every call."""

    def run(self, x: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(lambda branch: branch(x), self.branches))


class OneOfThem(Branches):
    """The last branch alone in another thread, a layer of it at a time."""

    def run(self, x: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(1) as pool:
            first, second, third = self.branches
            hidden = pool.submit(third[0], x).result()
            return [first(x), second(x), third[2](torch.tanh(hidden))]


class Raising(Branches):
    """As `torch.nn.parallel.parallel_apply` does: the exception is kept, and raised by the caller."""

    def run(self, x: Tensor) -> list[Tensor]:
        found: dict[int, Any] = {}

        def work(i: int, branch: nn.Module) -> None:
            try:
                found[i] = branch(x)
            except Exception as error:
                found[i] = type(error)(f"in branch {i}: {error}")

        threads = [threading.Thread(target=work, args=item) for item in enumerate(self.branches)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for value in found.values():
            if isinstance(value, Exception):
                raise value
        return [found[i] for i in range(3)]


class Swallowing(Branches):
    """Goes on without the branch that failed."""

    def run(self, x: Tensor) -> list[Tensor]:
        def work(branch: nn.Module) -> Tensor:
            try:
                return branch(x)
            except Exception:
                return x[:, :4] * 0.0

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(work, self.branches))


class Failing(Branches):
    """Fails in its own way without what the other threads should have left."""

    def run(self, x: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def work(i: int) -> None:
            with contextlib.suppress(Exception):
                found[i] = self.branches[i](x)

        thread = threading.Thread(target=work, args=(0,))
        thread.start()
        thread.join()
        return [found[0], *(branch(x) for branch in self.branches[1:])]


THREADED = [Pooled, OneOfThem, Raising, Swallowing, Failing]
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "analyze": lambda m: run_of(m)(),
    "analyze, full": lambda m: run_of(m, detail="full")(),
    "analyze, vjp": lambda m: run_of(m, transform="vjp")(),
    "diagnose": lambda m: gf.diagnose(m, [BATCH] * 3, squares),
    "layer_function": lambda m: gf.layer_function(m, "", BATCH),
    "layer_jvp": lambda m: gf.layer_jvp(m, "", BATCH),
    "jacobian_between": lambda m: gf.jacobian_between(m, None, "out", BATCH),
    "Jacobian": lambda m: Jacobian(lambda x: m(x), BATCH),
    "vector_field": lambda m: gf.vector_field(m, squares, BATCH),
    "gradient_noise": lambda m: gf.gradient_noise(m, BATCH, squares, method="loop"),
    "attention_weights": lambda m: gf.attention_weights(m, BATCH),
}


@pytest.mark.parametrize("kind", THREADED)
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_is_called_in_another_thread_is_refused(kind: type[Branches], way: str) -> None:
    model = kind()
    before = snapshot(model)
    with pytest.raises(OtherThreadError, match=r"'branches\.\d.*called in the thread .* while '.*' measures"):
        WAYS[way](model)
    assert difference(before, snapshot(model)) == ""
    assert all("forward" not in vars(module) for module in model.modules())
    assert model(BATCH).shape == (5, 2)  # and the model works as ever


def test_a_threaded_loss_is_refused_where_it_calls_the_model() -> None:
    model = Branches()

    def loss(y: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return squares(y) + pool.submit(model.out, torch.ones(1, 12)).result().sum()

    with pytest.raises(OtherThreadError, match=r"'out' \(Linear\) was called in the thread"):
        run_of_loss(model, loss)


def run_of_loss(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> gf.FlowRecord:
    return gf.analyze(model, [BATCH] * 6, loss, steps=6)


def test_threads_that_call_no_layer_of_the_model_are_left_alone() -> None:
    """Another model in a thread of the step, and this one in a thread between the steps."""
    model, other, seen = Branches(), nn.Linear(2, 2), []
    alone = run_of(model)()

    def batches() -> Tensor:
        thread = threading.Thread(target=lambda: seen.append(model(BATCH)))
        thread.start()
        thread.join()
        return BATCH

    def loss(y: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(other, y.detach()).result())
        return squares(y)

    record = gf.analyze(model, batches, loss, steps=6)
    assert len(seen) == 12
    for layer in alone:
        np.testing.assert_array_equal(record[layer.name].grad_norm, layer.grad_norm)


@pytest.mark.filterwarnings("ignore:`torch.jit.(fork|wait)` is deprecated:DeprecationWarning")
def test_a_fork_that_runs_in_the_same_thread_is_measured() -> None:
    class Forked(Branches):
        def run(self, x: Tensor) -> list[Tensor]:
            futures = [torch.jit.fork(branch, x) for branch in self.branches]
            return [torch.jit.wait(future) for future in futures]

    record, plain = run_of(Forked())(), run_of(Branches())()
    for layer in plain:
        np.testing.assert_array_equal(record[layer.name].grad_norm, layer.grad_norm)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("depth", [1, 3, 70])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of inner ones
def test_checkpoints_that_autograd_runs_in_threads_of_its_own_are_measured(
    reentrant: bool, depth: int
) -> None:
    """Reverse passes nested deeper than sixty are each run in a thread of autograd's pool."""

    class Nested(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.inner = Nested(depth - 1) if depth > 1 else nn.Tanh()

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            return checkpoint(self.inner, y, use_reentrant=reentrant)

    torch.manual_seed(0)
    model, threads = Nested(depth), set()
    deepest = model.get_submodule(".".join(["inner"] * depth))
    forward = deepest.forward
    deepest.forward = lambda x: (threads.add(threading.get_ident()), forward(x))[1]
    record = gf.analyze(model, [BATCH] * 2, squares, steps=2)
    assert (len(threads) > 1) == (reentrant and depth == 70)
    squares(model(BATCH)).backward()
    for parameter in record.parameters:
        grad = model.get_parameter(parameter.name).grad
        assert grad is not None
        np.testing.assert_allclose(parameter.grad_norm, float(grad.norm()), rtol=1e-5)
