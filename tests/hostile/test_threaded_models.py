"""Models that call their layers in threads of their own: refused, but for autograd's own threads."""

from __future__ import annotations

import contextlib
import threading
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
from gradflow.functional import Jacobian
from tests.functional.snapshots import difference, snapshot
from tests.hostile.runs import BATCH, run_of
from tests.models import GUESSES, squares


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
    assert len(seen) == 12 + GUESSES
    for layer in alone:
        np.testing.assert_array_equal(record[layer.name].grad_norm, layer.grad_norm)


@pytest.mark.filterwarnings("ignore:`torch.jit.(fork|wait)` is deprecated")
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
