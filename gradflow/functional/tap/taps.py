"""Taps: for the length of a context, the `forward` of every module is led past the recorder of the step.

Where a tap sits, and that nothing is left of it, is said in `model/layers.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

from torch import Tensor

from gradflow.functional.model.layers import led
from gradflow.functional.model.undo import python_module
from gradflow.functional.tap.tapped import TappedModel


@contextlib.contextmanager
def tapped(model: TappedModel) -> Iterator[None]:
    """Lead the calls of a model's modules past the recorder that it has, for the length of the context.

    The model is also told when a hook is put on a tensor.

    Raises:
        OtherThreadError: if a module is called in another thread while a recorder listens.
    """

    def lead(name: str) -> Callable[..., Any] | None:
        recorder = model.recorder
        if recorder is None:
            return None
        if get_ident() != model.thread.ident:
            model.thread.check(name, model.types[name])
        return recorder.run

    with (
        _told_of_hooks(model),
        led(model.modules, lead, model.saw_stranger, whole=model.parallel),
        model.thread.insisted(),
    ):
        yield


@contextlib.contextmanager
def _told_of_hooks(model: TappedModel) -> Iterator[None]:
    register_hook = Tensor.register_hook

    @functools.wraps(register_hook)
    def told_register_hook(self: Tensor, hook: Callable[[Tensor], Any]) -> Any:
        if not python_module(hook).startswith("torch.distributed"):  # which gather, and change nothing
            model.saw_hook()
        return register_hook(self, hook)

    Tensor.register_hook = told_register_hook
    try:
        yield
    finally:
        Tensor.register_hook = register_hook
