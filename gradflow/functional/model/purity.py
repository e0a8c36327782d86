"""The purity contract: whatever a run does, everything of the user's is put back bit for bit.

What may be changed by running a model: what its modules hold outside of parameters and buffers (counters,
stored activations, modes, a teacher in a list; see `memory.py`), the global random states, the grad mode and
the default dtype. Parameters and buffers are never touched: the run works on copies that are swapped in.
"""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.random  # NumPy loads it at its first use, which would be in the first run
import torch
from torch import Tensor, nn

from gradflow.errors import NotRestoredError
from gradflow.functional.model.memory import ModuleState


@contextlib.contextmanager
def preserved(*modules: nn.Module, also: Sequence[Any] = ()) -> Iterator[ModuleState]:
    """Put back, on any exit, what modules hold and the process's random and global states.

    What is given is the modules' state at the beginning.

    Args:
        modules: those that are run, with other parameters and buffers swapped in.
        also: what else is called, such as a loss.

    Raises:
        NotRestoredError: if something could not be put back. An exception of the run itself is raised as it
            is, with a note.
    """
    saved_modules = ModuleState(modules, also)
    saved_random = RandomState()
    grad_enabled, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    raised: BaseException | None = None
    try:
        yield saved_modules
    except BaseException as error:
        raised = error
        raise
    finally:
        torch.set_grad_enabled(grad_enabled)
        torch.set_default_dtype(dtype)
        saved_random.restore()
        if failures := saved_modules.restore():
            error = NotRestoredError.of(failures)
            if raised is None:
                raise error
            raised.add_note(f"gradflow: {error}")


class RandomState:
    """The random states of torch (every initialised device), numpy and Python.

    Args:
        torch: whether torch's are remembered.
        host: whether numpy's and Python's are.
    """

    def __init__(self, *, torch: bool = True, host: bool = True) -> None:
        self._torch = _torch_states() if torch else None
        self._host = (np.random.get_state(), random.getstate()) if host else None

    def now(self) -> RandomState:
        """Return the present states, of the same kinds."""
        return RandomState(torch=self._torch is not None, host=self._host is not None)

    def torch_moved(self) -> bool:
        """Whether any of torch's states has moved on since; False if they were not remembered."""
        if self._torch is None:
            return False
        now = _torch_states()
        return len(now) != len(self._torch) or not all(map(torch.equal, now, self._torch))

    def host_moved(self) -> bool:
        """Whether numpy's or Python's state has moved on since; False if they were not remembered."""
        if self._host is None:
            return False
        now: Any = np.random.get_state()
        then: Any = self._host[0]
        return now[2] != then[2] or not np.array_equal(now[1], then[1]) or random.getstate() != self._host[1]

    def restore(self) -> None:
        """Put the states back."""
        if self._torch is not None:
            _set_torch_states(self._torch)
        if self._host is not None:
            np.random.set_state(self._host[0])
            random.setstate(self._host[1])


def _torch_states() -> list[Tensor]:
    """Return the state of the CPU, then those of the CUDA devices that are in use, then that of MPS."""
    cuda = torch.cuda.get_rng_state_all() if _cuda_in_use() else []
    mps = [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else []
    return [torch.get_rng_state(), *cuda, *mps]


def _set_torch_states(states: list[Tensor]) -> None:
    cpu, *others = states
    torch.set_rng_state(cpu)
    if torch.backends.mps.is_available():
        torch.mps.set_rng_state(others.pop())
    if others:
        torch.cuda.set_rng_state_all(others)


def _cuda_in_use() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_available()


def seed_all(seed: int) -> None:
    """Seed torch on the devices that are in use, numpy and Python.

    `torch.manual_seed` would also seed devices that are not in use yet, when they come to be, long after the
    states were put back; and it formats a traceback for each of them, which takes a millisecond.

    Raises:
        ValueError: if `seed` is no whole number that torch takes.
    """
    seed = checked_seed(seed)
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def checked_seed(seed: Any) -> int:
    """Return a seed as an int, whatever kind of whole number it is (numpy's included).

    Raises:
        ValueError: if it is no whole number from -2**63 to 2**64 - 1, which are those that torch takes.
    """
    number = None if isinstance(seed, bool) or not hasattr(seed, "__index__") else operator.index(seed)
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(
            f"seed must be a whole number from -2**63 to 2**64 - 1, or None, got {seed!r:.100}. "
            "Of a larger one take the rest: `seed % 2**64`."
        )
    return number
