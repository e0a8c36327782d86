"""How a pass of the user's is listened to: its functions, its reverse passes; its own exceptions apart."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode


class Once:
    """A function of the user's, called once: what it gave or raised is known afterwards.

    Args:
        function: of the user's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.done, self.output = False, None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        try:
            self.output = self._function(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        self.done = True
        return self.output


class Hears(Protocol):
    """What listens to the functions and reverse passes of a pass; it raises nothing."""

    def heard(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> list[Callable[[Any], None]]:
        """Hear of a function that is about to be called; what is returned hears of its output."""
        ...

    def told(self, ends: list[Callable[[Any], None]], out: Any) -> None:
        """Tell those of the output."""
        ...

    def differentiates(self, plain: Callable[..., None], given: dict[str, Any]) -> None:
        """Run a reverse pass, `plain(**given)`."""
        ...


class Ear(TorchFunctionMode):
    """Tells a listener of every PyTorch function that is called; those themselves run as ever.

    Args:
        listener: is told.
    """

    def __init__(self, listener: Hears) -> None:
        super().__init__()
        self._listener = listener

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ends = self._listener.heard(func, args, kwargs)
        out = func(*args, **kwargs)
        if ends:
            self._listener.told(ends, out)
        return out


@contextlib.contextmanager
def reverse_passes(listener: Hears) -> Iterator[None]:
    """Let a listener run the reverse passes that accumulate, for the length of the context.

    `Tensor.backward` and those who call it go through `torch.autograd.backward`.

    Args:
        listener: is told.
    """
    plain = torch.autograd.backward
    names = inspect.signature(plain)

    @functools.wraps(plain)
    def backward(*args: Any, **kwargs: Any) -> None:
        try:
            given = names.bind(*args, **kwargs).arguments
        except TypeError:  # which `plain` will say better
            plain(*args, **kwargs)
            return
        listener.differentiates(plain, dict(given))

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = plain
