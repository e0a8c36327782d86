"""No step waits for its device: nothing reads a value between the model call and the end of the reverse pass.

On a GPU, a value that Python asks for makes the program wait for all that was queued before. Operations that
read values are counted by a dispatch mode, in the measured step and in a plain one. Where there is a GPU,
PyTorch itself is asked to raise at every wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradflow.functional import analyze
from gradflow.functional.run import loop, step
from gradflow.functional.run.program import Program
from gradflow.functional.run.step import Request
from tests.models import CASES, Case, squares

# Operations whose result, or whose shape, a program can only go on with once values are known.
READS = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_static",
    "masked_select", "unique", "unique2", "_unique2", "unique_dim", "unique_consecutive",
)  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts the operations that run, those that read values and those that copy to another device apart."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.all: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        self.all[name] += 1
        moved = name in ("_to_copy", "copy_", "_copy_from") and "device" in (kwargs or {})
        boolean_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype is torch.bool for t in args[1]
        )
        if name in READS or moved or boolean_mask:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def plain(case: Case) -> Reads:
    """Count the plain forward pass, loss and backward pass."""
    model, batch = case.build().train(), case.batch()
    with Reads() as reads:
        output = model(*batch) if isinstance(batch, tuple) else model(batch)
        loss = case.loss(output)
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return reads


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[int, Reads]:
    """Count what runs in each step, from the model call to the end of the reverse pass, by its number."""
    found: dict[int, Reads] = {}
    original: Callable[..., Any] = step.run_step

    def run_step(program: Program, request: Request) -> Any:
        found[request.step] = Reads()
        with found[request.step]:
            return original(program, request)

    monkeypatch.setattr(loop, "run_step", run_step)
    return found


def run(case: Case, **options: Any) -> None:
    batch = case.batch()
    analyze(case.build(), lambda: batch, case.loss, steps=6, **options)


NAMES = [name for name in CASES if name != "loop"]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_no_value_that_a_plain_step_does_not(name: str, counted: dict[int, Reads]) -> None:
    run(CASES[name])
    expected = plain(CASES[name])
    assert sorted(counted) == list(range(6))
    for number in range(1, 6):  # plain steps, and steps that are looked at closely
        assert counted[number].reads - expected.reads == Counter(), number
        assert counted[number].all.total() >= expected.all.total()  # the mode has seen both passes


@pytest.mark.parametrize("name", ["relu modules", "cnn", "lstm", "transformer", "attention"])
def test_nor_does_a_step_in_full_detail_but_for_ranks(name: str, counted: dict[int, Reads]) -> None:
    """The effective rank takes a decomposition on the host; it is left to the steps that are looked at."""
    run(CASES[name], detail="full")
    expected = plain(CASES[name])
    for number in (2, 3):
        assert counted[number].reads - expected.reads == Counter(), number


def test_a_step_under_an_optimizer_and_with_rectifiers_that_are_functions(counted: dict[int, Reads]) -> None:
    case = CASES["relu functions"]
    model, batch = case.build(), case.batch()
    analyze(model, lambda: batch, squares, steps=6, optimizer=torch.optim.Adam(model.parameters()))
    assert all(not counted[number].reads for number in range(1, 6))


def test_values_that_the_model_itself_reads_are_seen(counted: dict[int, Reads]) -> None:
    """The check itself: a model that reads a value is told, in both counts."""
    run(CASES["loop"])
    assert plain(CASES["loop"]).reads == Counter({"_local_scalar_dense": 1})
    assert all(counted[number].reads == Counter({"_local_scalar_dense": 1}) for number in range(1, 6))


class Reading(nn.Module):
    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.read = nn.Linear(4, 2), read

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.read(y.detach())
        return y


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y[0, 0].item(), lambda y: bool((y > 0).any()), lambda y: float(y.sum()), lambda y: y[y > 0],
        lambda y: torch.equal(y, y + 1), lambda y: y.nonzero(), lambda y: int(y.argmax()),
    ],
)  # fmt: skip
def test_the_mode_sees_every_kind_of_read(read: Callable[[Tensor], Any]) -> None:
    case = Case(lambda: Reading(read), lambda: torch.randn(3, 4), squares)
    assert plain(case).reads.total() >= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("detail", ["cheap", "full"])
@pytest.mark.parametrize("name", ["relu modules", "relu functions", "cnn", "resnet", "lstm", "transformer"])
def test_a_step_does_not_wait_for_a_gpu(name: str, detail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = step.run_step

    def run_step(program: Program, request: Request) -> Any:
        forbidden = not request.look if detail == "full" else request.step > 0
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
        try:
            return original(program, request)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "run_step", run_step)
    case = CASES[name]
    model, batch = case.build().cuda(), case.batch().cuda()

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    record = analyze(model, lambda: batch, loss, steps=6, detail=detail)
    assert all(p.reached.all() for p in record.parameters)
