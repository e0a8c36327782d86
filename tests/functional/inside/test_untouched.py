"""A training that is looked into at every step is the same, bit for bit, as one that is not."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.functional.inside.look import InsideLook
from gradflow.functional.inside.passes import Passes
from gradflow.functional.inside.recorder import OwnRecorder
from tests.functional.inside.loops import CANNOT, LOOPS, MODELS, Loop, batch, plain
from tests.functional.snapshots import content

CASES = [(loop, model) for loop in LOOPS for model in MODELS if (loop, model) not in CANNOT]


def trained(loop: Loop, model: nn.Module, steps: int, *, watched: bool, hand: bool = True) -> Any:
    """Return all that a training leaves, and what the looks have found wrong with themselves."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    failed: list[str] = []
    overflows = 0

    @contextlib.contextmanager
    def around(now: int) -> Iterator[Any]:
        nonlocal overflows
        if not watched:
            yield None
            return
        with InsideLook.of(model).listening() as passes:
            yield passes.hand if hand else None
        failed.extend(filter(None, [passes.failed]))
        overflows += passes.overflowed

    loop(model, steps, around)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    modules = {name: sorted(vars(module)) for name, module in model.named_modules()}
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    return (state, gradients, modules, drawn), failed, overflows


def check_same(a: Any, b: Any) -> None:
    for one, other in zip(a[:2], b[:2], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            same = one[name] is other[name] if one[name] is None else torch.equal(one[name], other[name])
            assert same, name
    assert a[2:] == b[2:]


@pytest.mark.parametrize(("loop", "kind"), CASES)
def test_every_kind_of_loop_gives_the_same_weights(loop: str, kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    other = copy.deepcopy(model)
    without, _, _ = trained(LOOPS[loop], model, 12, watched=False)
    within, failed, overflows = trained(LOOPS[loop], other, 12, watched=True)
    check_same(without, within)
    assert failed == []
    assert (overflows > 0) == (loop == "scaled")


@pytest.mark.parametrize("kind", ["residual", "pictures"])
def test_so_they_are_after_three_hundred_steps_with_dropout_and_batch_norm(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    other = copy.deepcopy(model)
    without, _, _ = trained(plain, model, 300, watched=False)
    within, failed, _ = trained(plain, other, 300, watched=True)
    check_same(without, within)
    assert failed == []


def _break_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("a look's own")

    monkeypatch.setattr(OwnRecorder, "_forward_statistics", broken)


def _break_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = OwnRecorder._enter
    count = 0

    def broken(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count % 3 == 2:  # amid a pass
            raise ZeroDivisionError("a look's own")
        return enter(self, *args)

    monkeypatch.setattr(OwnRecorder, "_enter", broken)


def _break(method: str) -> Any:
    def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError("a look's own")

        monkeypatch.setattr(Passes, method, broken)

    return breaks


def _break_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a look's own")

    monkeypatch.setattr("gradflow.functional.tap.watch.Watch.heard", broken)


BREAKS = {
    "observe": _break_observe, "enter": _break_enter, "watch": _break_watch, "begin": _break("_begun"),
    "learn": _break("_learn"), "after": _break("_after"), "added": _break("_added"),
}  # fmt: skip


@pytest.mark.parametrize("where", BREAKS)
@pytest.mark.parametrize("kind", ["residual", "words", "reentrant"])
def test_a_look_that_raises_changes_nothing_and_says_so(
    where: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    other = copy.deepcopy(model)
    without, _, _ = trained(plain, model, 6, watched=False)
    BREAKS[where](monkeypatch)
    within, failed, _ = trained(plain, other, 6, watched=True)
    check_same(without, within)
    assert failed == ["ZeroDivisionError: a look's own"] * 6


def test_what_the_loop_raises_comes_through_and_all_is_put_back() -> None:
    model = MODELS["residual"]()
    before, forward, backward = content(model), nn.Linear.forward, torch.autograd.backward
    look = InsideLook.of(model)
    error = KeyError("the user's")
    caught: BaseException | None = None
    try:
        with look.listening() as passes:
            model(batch()[0])
            raise error
    except KeyError as found:
        caught = found
    assert caught is error
    assert passes.failed == "the step raised KeyError"
    assert nn.Linear.forward is forward
    assert torch.autograd.backward is backward
    model.norm.reset_running_stats()
    assert content(model)[2][0] == before[2][0]


class _Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.error = nn.Linear(8, 3), ValueError("of a layer")

    def forward(self, x: Tensor) -> Tensor:
        raise self.error from KeyError("its cause")


def test_what_a_layer_raises_comes_through_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), _Raises())
    with pytest.raises(ValueError, match="of a layer") as caught, InsideLook.of(model).listening():
        model(batch()[0])
    assert caught.value is model[1].error
    assert isinstance(caught.value.__cause__, KeyError)
    with InsideLook.of(model).listening() as passes:  # caught by the loop, which goes on
        with contextlib.suppress(ValueError):
            model(batch()[0])
        model[0](batch()[0]).sum().backward()
    assert passes.failed == ""
    assert len(passes.factors) == 1


def test_nothing_is_left_that_keeps_a_graph_alive() -> None:
    class Kept(torch.autograd.Function):
        alive = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.kept = _Counted()
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g

    class _Counted:
        def __init__(self) -> None:
            Kept.alive += 1

        def __del__(self) -> None:
            Kept.alive -= 1

    class Custom(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Kept.apply(super().forward(x))

    model = nn.Sequential(Custom(8, 8), nn.Tanh(), nn.Linear(8, 3))
    look = InsideLook.of(model)
    with look.listening() as passes:
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        passes.hand(loss)
        loss.backward()
    assert passes.failed == ""
    del loss, x, y
    gc.collect()
    assert Kept.alive == 0
    assert look.record().steps == 1


def test_hooks_of_the_user_are_called_as_often_as_ever() -> None:
    def calls(watched: bool) -> list[str]:
        torch.manual_seed(0)
        model, heard = MODELS["residual"](), []
        model.a.register_forward_pre_hook(lambda m, args: heard.append("before"))
        model.b.register_forward_hook(lambda m, args, out: heard.append("after"))
        model.head.register_full_backward_hook(
            lambda m, into, out: heard.append(f"{float(out[0].sum()):.6f}")
        )
        model.b.weight.register_hook(lambda g: heard.append(f"{float(g.norm()):.6f}"))
        with InsideLook.of(model).listening() if watched else contextlib.nullcontext():
            x, y = batch()
            out = model(x)
            out.register_hook(lambda g: heard.append(f"{float(g.norm()):.6f}"))
            F.cross_entropy(out, y).backward()
        return heard

    assert calls(True) == calls(False)
    assert len(calls(True)) == 6
