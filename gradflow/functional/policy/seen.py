"""What a step does with a head's output: distributions made of it, softmax and similar functions of it.

NOTE [Distributions as they are used]
A distribution is no PyTorch function, but its methods call some, its constructor included. When a session
hears of a function that runs inside `torch.distributions`, the distribution is the `self` of the calling
frames. So every distribution of a step is seen, in the model or in the loss, with the tensors that its
constructor was given, and nothing is put in the place of a class of PyTorch's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import attrs
import torch
from torch import Tensor, distributions

from gradflow.functional.model.trees import is_differentiable, iter_tensors
from gradflow.functional.policy.statistics import parts_of
from gradflow.functional.torch_private import num_writes, pytree

Distribution = distributions.Distribution

# name of a function -> what its input must hold
USES = {
    **dict.fromkeys(("softmax", "log_softmax", "special_log_softmax", "logsumexp"), "logits"),
    **dict.fromkeys(("cross_entropy", "gumbel_softmax"), "logits"),
    **dict.fromkeys(("nll_loss",), "log-probabilities"),
    **dict.fromkeys(("multinomial",), "probabilities"),
    **dict.fromkeys(("logsigmoid", "binary_cross_entropy_with_logits"), "logits of yes or no"),
    **dict.fromkeys(("binary_cross_entropy",), "probabilities of yes"),
    **dict.fromkeys(("tanh", "tanh_", "sigmoid", "sigmoid_", "hardtanh"), "a bounded number"),
}


@attrs.frozen(eq=False)
class Seen:
    """A distribution, and the tensors that its constructor was given, by name."""

    distribution: Distribution
    given: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that it is made of, those of its parts included."""
        found = list(self.given.values())
        for d in (self.distribution, *parts_of(self.distribution)):
            found += [v for v in vars(d).values() if isinstance(v, Tensor) and is_differentiable(v)]
        return list({id(t): t for t in found}.values())


@attrs.frozen(eq=False)
class Use:
    """A function applied to a tensor that tells what the tensor holds.

    Args:
        function: its name.
        given: what the tensor holds by that, a value of `USES`.
        tensor: the tensor, its alternatives in the last dimension.
        version: of the tensor when the function read it.
    """

    function: str
    given: str
    tensor: Tensor
    version: int

    @property
    def tells(self) -> bool:
        """Whether it tells of a choice between alternatives, and the tensor still holds what was read."""
        return self.given != "a bounded number" and num_writes(self.tensor) == self.version


class Seer:
    """Collects the distributions and the uses of one step."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self._found: dict[int, Seen] = {}

    def hear(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, frames: Sequence[FrameType]
    ) -> None:
        """Note what the call of a PyTorch function tells.

        Args:
            func: the function.
            args: its arguments.
            kwargs: those given by name.
            frames: of `torch.distributions` that called it, see `distribution_frames`.
        """
        running = False
        for frame in frames:
            running = True
            this = frame.f_locals.get("self")
            if isinstance(this, Distribution):
                seen = self._found.setdefault(id(this), Seen(this, {}))
                if frame.f_code.co_name == "__init__":
                    for name, value in _arguments(frame):
                        seen.given.setdefault(name, value)
        if not running:
            self._note_use(getattr(func, "__name__", ""), args, kwargs)

    def add(self, output: Any) -> None:
        """Note the distributions in a module's output."""
        for distribution in distributions_in(output):
            self._found.setdefault(id(distribution), Seen(distribution, {}))

    @property
    def seen(self) -> list[Seen]:
        """The distributions that are no part of another one, in the order in which they were met."""
        found = list(self._found.values())
        parts = {id(part) for seen in found for part in parts_of(seen.distribution)}
        return [self._with_parts(seen) for seen in found if id(seen.distribution) not in parts]

    def _with_parts(self, seen: Seen) -> Seen:
        """Return what was seen with what its parts were given, where it was given no tensor itself."""
        given = dict(seen.given)
        for part in parts_of(seen.distribution) if not given else ():
            held = self._found.get(id(part))
            for name, value in (held.given if held is not None else {}).items():
                given.setdefault(name, value)
        return Seen(seen.distribution, given)

    def _note_use(self, name: str, args: tuple[Any, ...], kwargs: Any) -> None:
        given = USES.get(name)
        x = args[0] if args else kwargs.get("input")
        if given is None or not isinstance(x, Tensor) or not is_differentiable(x) or not x.dim():
            return
        dim = -1
        if name in ("softmax", "log_softmax", "special_log_softmax", "logsumexp"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        elif name in ("cross_entropy", "nll_loss"):
            dim = 1 if x.dim() > 1 else 0
        if isinstance(dim, (tuple, list)) and len(dim) == 1:
            dim = dim[0]
        if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
            dim = -1
        moved = x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)
        self.uses.append(Use(name.rstrip("_"), given, moved, num_writes(x)))


def distributions_in(output: Any) -> Iterator[Distribution]:
    """Yield the distributions in a module's output: by itself, in tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Distribution):
            yield leaf


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a module's output, those of distributions in it included."""
    found = [t for t in iter_tensors(output) if is_differentiable(t)]
    for distribution in distributions_in(output):
        found += Seen(distribution, {}).tensors()
    return found


def is_view(x: Tensor, source: Tensor) -> bool:
    """Whether a tensor shares the storage of another."""
    return x.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


def column(x: Tensor, outputs: Sequence[Tensor]) -> int:
    """Return at which column a tensor starts in the wider one that it is a slice of; 0 if it is none.

    This tells the parts of one head's output from each other: the logits of several choices, side by side.
    """
    wider = [x._base] if x._base is not None else []
    for whole in (*wider, *(t for t in outputs if is_view(x, t))):
        if x.dim() and whole.dim() and whole.is_contiguous() and x.shape[-1] < whole.shape[-1]:
            return int((x.storage_offset() - whole.storage_offset()) % whole.shape[-1])
    return 0


def is_normalised(x: Tensor) -> str:
    """Return `probabilities` or `log-probabilities` if the values say so, else nothing.

    A row of two or more numbers that are all in [0, 1] and add up to one is a distribution; by chance this
    does not happen in several rows at once.
    """
    if x.dim() < 1 or x.shape[-1] < 2 or not x.numel():
        return ""
    rows = x.detach().flatten(0, -2).double() if x.dim() > 1 else x.detach()[None].double()
    near = 0.02 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < near).all()):
        return "probabilities"
    if bool((rows <= near).all()) and bool((rows.logsumexp(-1).abs() < near).all()):
        return "log-probabilities"
    return ""


def distribution_frames() -> list[FrameType]:
    """Return the frames of `torch.distributions` that called the running function, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _module(frame).startswith("gradflow."):
        frame = frame.f_back
    found = []
    while frame is not None and (name := _module(frame)).startswith("torch"):
        if name.startswith("torch.distributions"):
            found.append(frame)
        frame = frame.f_back
    return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _arguments(frame: FrameType) -> Iterator[tuple[str, Tensor]]:
    held = frame.f_locals
    for name in frame.f_code.co_varnames[1 : frame.f_code.co_argcount]:
        value = held.get(name)
        if isinstance(value, Tensor) and is_differentiable(value):
            yield name, value
