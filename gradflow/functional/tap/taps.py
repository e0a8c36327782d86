"""Taps: for the length of a context, every module's `forward` is led past the recorder of the step.

The `forward` in a module's instance dict is swapped and put back, exceptions included; the class, the
module's hooks and `__call__` are not touched, so the user's own hooks run as ever.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from gradflow.functional.tap.tapped import TappedModel


@contextlib.contextmanager
def tapped(model: TappedModel) -> Iterator[None]:
    """Lead the calls of a model's modules past the recorder that it has, for the length of the context.

    The model is also told when a hook is put on a tensor.
    """
    missing = object()
    swapped: list[tuple[nn.Module, Any]] = []
    register_hook = Tensor.register_hook

    @functools.wraps(register_hook)
    def told_register_hook(self: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        model.saw_hook()
        return register_hook(self, hook)

    try:
        Tensor.register_hook = told_register_hook
        for name, module in model.modules.items():
            swapped.append((module, module.__dict__.get("forward", missing)))
            module.__dict__["forward"] = _tapped_forward(model, name, module.forward)
        yield
    finally:
        Tensor.register_hook = register_hook
        for module, old in swapped:
            if old is missing:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = old


def _tapped_forward(model: TappedModel, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def tapped_forward(*args: Any, **kwargs: Any) -> Any:
        recorder = model.recorder
        if recorder is None:
            return forward(*args, **kwargs)
        return recorder.run(name, forward, args, kwargs)

    return tapped_forward
