"""A model held at one moment, so that it can be evaluated again and again as a pure function.

Jacobian products call a model, or a part of it, many times. Each call must see the same parameters, buffers,
modes and random numbers, whatever the user does to the model in between, and leave nothing behind.

NOTE [Kernels that can be differentiated twice]
Fused attention has no forward-mode derivative and no second one, nor have the fused recurrent kernels of
cuDNN and oneDNN. For the length of an evaluation attention runs PyTorch's math kernel, the fast path of the
transformer layers is off, and so are cuDNN and oneDNN where the model holds recurrent layers. The values are
the same up to rounding.

NOTE [BatchNorm in training]
In training the running statistics do not take part in the output, yet they are updated in place, which the
transforms of `torch.func` refuse. They are taken away for the length of an evaluation: the same output.

NOTE [Whose state is held]
A loss may have layers of its own, be it a module or a function that holds some. Their state is held as the
model's is: copies stand in their place for the length of an evaluation. What they share with the model is
held once, as the model's.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradflow.functional.model.closures import modules_in, tensors_in
from gradflow.functional.model.layers import callable_modules
from gradflow.functional.model.purity import RandomState, preserved, seed_all
from gradflow.functional.model.state import Swap, Tensors, copy_buffers, copy_parameters
from gradflow.functional.model.supported import check_plain
from gradflow.functional.model.threads import exclusive, one_thread
from gradflow.functional.torch_private import BatchNorm, InstanceNorm, NormWithStatistics, stores


@attrs.frozen(eq=False)
class Setting:
    """Parameters, buffers, modes and random state of a module at one moment.

    Args:
        module: what is evaluated: a model, or a layer of it.
        others: further modules whose state is held; see NOTE [Whose state is held].
        parameters: copies, by qualified name; names of the others' begin with a number and a colon.
        required: names of those that require a gradient.
        buffers: copies, by qualified name; None for statistics that are taken away.
        modes: train (True) or eval of every module in it.
        random: the random state that every evaluation starts from.
        plain_recurrent: whether fused recurrent kernels are avoided too.
    """

    module: nn.Module
    others: tuple[nn.Module, ...]
    parameters: Tensors
    required: frozenset[str]
    buffers: dict[str, Tensor | None]
    modes: tuple[tuple[nn.Module, bool], ...]
    random: RandomState
    plain_recurrent: bool
    _swaps: tuple[Swap, ...]

    @classmethod
    @exclusive()
    def of(
        cls,
        module: nn.Module,
        *holders: Any,
        parameters: Tensors | None = None,
        random: RandomState | None = None,
        seed: int | None = None,
        plain_recurrent: bool = True,
    ) -> Setting:
        """Return the present setting, once no other thread runs the module.

        Args:
            module: what is evaluated.
            holders: modules, functions and objects; the state of all modules in them is held too.
            parameters: put in the place of the module's own; copies of those by default.
            random: the random state to start from; the present one by default.
            seed: seeds torch, numpy and Python instead.
            plain_recurrent: whether fused recurrent kernels are avoided too. First derivatives do not need
                that, and `vmap` over them takes a fused LSTM, but not a plain one.

        Raises:
            ModelInputError: if a tensor in any of them belongs to a transform of `torch.func`.
        """
        check_plain([*(t for _, t in _tensors(module)), *tensors_in(*holders)])
        if random is None:
            with preserved():
                if seed is not None:
                    seed_all(seed)
                random = RandomState()
        own = set(module.modules())
        others = tuple(part for part in modules_in(*holders) if part not in own)
        swaps, known = [Swap(module)], {id(t): name for name, t in _tensors(module)}
        with torch.inference_mode(False):
            buffers: dict[str, Tensor | None] = dict(copy_buffers(module))
            if parameters is None:
                parameters = {name: p.detach() for name, p in copy_parameters(module).items()}
            parameters = dict(parameters)
            for number, part in enumerate(others):
                prefix = f"{number}:"  # no qualified name has a colon
                shared = {name for name, t in _tensors(part) if id(t) in known}
                held = {n: p for n, p in copy_parameters(part).items() if n not in shared}
                parameters |= {prefix + name: p for name, p in held.items()}
                left = {n: b for n, b in copy_buffers(part).items() if n not in shared}
                left |= dict.fromkeys(name for name in _unused_statistics(part) if name in left)
                buffers |= {prefix + name: b for name, b in left.items()}
                swaps.append(Swap(part, prefix, dict(known)))
                known |= {id(t): prefix + name for name, t in _tensors(part) if id(t) not in known}
        buffers |= dict.fromkeys(_unused_statistics(module))
        modes = tuple((part, part.training) for root in (module, *others) for part in root.modules())
        required = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
        return cls(
            module, others, parameters, required, buffers, modes, random, plain_recurrent, tuple(swaps)
        )

    @property
    def trainable(self) -> Tensors:
        """The copies of the parameters that require a gradient."""
        return {name: p for name, p in self.parameters.items() if name in self.required}

    @contextlib.contextmanager
    def evaluating(
        self, tensors: Mapping[str, Tensor] | None = None, *, random: RandomState | None = None
    ) -> Iterator[None]:
        """Put the setting in place, for the length of the context.

        Args:
            tensors: parameters and buffers to take the place of its own.
            random: a random state to start from instead of its own.
        """
        buffers = {name: b if b is None else b.clone() for name, b in self.buffers.items()}
        state: Any = {**self.parameters, **buffers, **(tensors or {})}
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive())
            stack.enter_context(preserved(self.module, *self.others))
            stack.enter_context(plain_kernels(self.module, *self.others, recurrent=self.plain_recurrent))
            for swap in self._swaps:
                stack.enter_context(swap(state))
            for root in (self.module, *self.others):
                stack.enter_context(one_thread(callable_modules(root)))
            for part, mode in self.modes:
                part.training = mode
            (random or self.random).restore()
            yield

    def held(self, function: Callable[[Tensor], Tensor]) -> Held:
        """Return a function of one tensor that is evaluated in this setting."""

        def evaluated(x: Tensor) -> Tensor:
            with self.evaluating():
                return function(x)

        return Held(evaluated, self)


@attrs.frozen(eq=False)
class Held:
    """A function with the setting that it is evaluated in.

    Args:
        function: of one tensor.
        setting: put in place by the function itself, and for a reverse pass that runs parts of it again.
    """

    function: Callable[[Tensor], Tensor]
    setting: Setting

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function's value."""
        return self.function(x)

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of an evaluation."""
        return self.setting.evaluating()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _unused_statistics(module: nn.Module) -> Iterator[str]:
    """Yield the names of running statistics that no output depends on; see NOTE [BatchNorm in training]."""
    for name, part in module.named_modules():
        known = type(part).forward in (BatchNorm.forward, InstanceNorm.forward)
        if isinstance(part, NormWithStatistics) and known and part.training:
            yield from (f"{name}.{key}" if name else key for key in stores(part)[1])


@contextlib.contextmanager
def plain_kernels(*roots: nn.Module, recurrent: bool) -> Iterator[None]:
    """Use kernels with all derivatives; see NOTE [Kernels that can be differentiated twice]."""
    recurrent = recurrent and any(isinstance(part, nn.RNNBase) for root in roots for part in root.modules())
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn) if recurrent else ()
    fast, enabled = torch.backends.mha.get_fastpath_enabled(), [library.enabled for library in libraries]
    with sdpa_kernel(SDPBackend.MATH):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for library in libraries:
                library.enabled = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for library, was in zip(libraries, enabled, strict=True):
                library.enabled = was


@functools.cache
def load_forward_mode() -> None:
    """Take a first forward-mode product, without the deprecation warning of what torch loads for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit")  # its category differs between releases
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
