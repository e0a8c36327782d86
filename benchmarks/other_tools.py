"""What the same step costs with other tools: each does a plain step and its own work, again and again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from workloads import Workload


def hooks(work: Workload) -> Iterator[None]:
    """A monitor written by hand: a hook on every layer that reads a norm with `.item()`."""
    norms: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def read(module: Any, grad_input: Any, grad_output: Any) -> None:
            norms[name] = grad_output[0].norm().item() if grad_output[0] is not None else 0.0

        return read

    leaves = [(n, m) for n, m in work.model.named_modules() if not any(True for _ in m.children())]
    handles = [module.register_full_backward_hook(hook(name)) for name, module in leaves]
    try:
        while True:
            work.plain_step()
            yield
    finally:
        for handle in handles:
            handle.remove()


def torchmortem(work: Workload) -> Iterator[None]:
    from torchmortem import Autopsy  # type: ignore[import-not-found]

    optimizer = torch.optim.SGD(work.model.parameters(), lr=0.0)
    with Autopsy(work.model, optimizer=optimizer) as autopsy:
        while True:
            work.plain_step(lambda loss: autopsy.step(loss=loss.item()))
            yield


def torchdiag(work: Workload) -> Iterator[None]:
    """Its two checks that tell of gradients and units; dead units take another forward pass."""
    import torchdiag as tool  # type: ignore[import-not-found]

    def check(_: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            tool.check_gradients(work.model)
            if not isinstance(work.batch, dict):
                tool.check_dead_neurons(work.model, work.batch)

    while True:
        work.plain_step(check)
        yield


def bare_sums(work: Workload) -> Iterator[None]:
    """No tool: the least that it takes to know the norm of every parameter's gradient."""

    def sums(_: Any) -> None:
        flat = [p.grad.view(-1) for p in work.model.parameters() if p.grad is not None]
        torch.stack([torch.dot(g, g) for g in flat]).tolist()

    while True:
        work.plain_step(sums)
        yield


OTHERS = {"bare sums": bare_sums, "hooks": hooks, "torchmortem": torchmortem, "torchdiag": torchdiag}


def installed(tool: str) -> bool:
    return tool in ("hooks", "bare sums") or importlib.util.find_spec(tool) is not None
