"""What a labelled case is, how it is registered, and how it is built at a width and in a dtype.

A case is a function that returns a `Setup`: a model, a source of batches, a loss and an optimizer. `sick`
registers a function of (sick, width), which builds the illness and its repair; `healthy` one of (width).
The function's docstring is the case's note. Protocol: call `make_batch`, then the model, then `loss_fn`, in
that order, since the loss looks at the targets of the latest batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .claims import Claim

TYPES = ("NUMERICAL", "DEAD", "VANISHING", "EXPLODING", "SATURATION", "UNSTABLE", "BOTTLENECK")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
WIDTHS = (16, 32, 64)
DTYPES = (FLOAT32, BFLOAT16)


@dataclass(frozen=True)
class Setup:
    """A model that is ready to be trained: the arguments of `gradflow.diagnose`.

    Args:
        model: the model.
        make_batch: returns the next batch of a sequence that the case's seed fixes.
        loss_fn: from the model's output to a scalar, with the targets of the latest batch.
        optimizer: returns a fresh optimizer over the parameters that are meant to train.
    """

    model: nn.Module
    make_batch: Callable[[], Any]
    loss_fn: Callable[[Any], Tensor]
    optimizer: Callable[[], Optimizer]


@dataclass(frozen=True)
class Case:
    """A labelled model.

    Args:
        id: its name, family first.
        note: what is wrong and what repairs it, or why it only looks sick.
        source: where this is known from; may be empty.
        expect: pairs (issue type, layer or prefix of layers, "*" for any) that a right report contains.
        allow: further issue types that are right to report.
        claim: evidence, taken with plain PyTorch, that the sick build has and the repaired one has not.
        looks: evidence that a healthy case looks as suspicious as it says; None for those that need none.
        steps: after how many steps of training a build without illness is judged to train, and
        falls_to: the part of the loss that is left by then.
        converged: whether it is at the end of its training, so that its loss must stay where it is.
        widths: the widths to build it at; the middle one is the usual.
        dtypes: the dtypes to build it in.
    """

    id: str
    note: str
    make: Callable[..., Setup]
    source: str
    expect: tuple[tuple[str, str], ...]
    allow: tuple[str, ...]
    claim: Claim | None
    looks: Claim | None
    steps: int
    falls_to: float
    converged: bool
    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def family(self) -> str:
        """The kind of model, which the id starts with."""
        return self.id.partition("-")[0]

    @property
    def healthy(self) -> bool:
        """Whether there is no illness in it, and so nothing to repair."""
        return not self.expect

    @property
    def width(self) -> int:
        """The usual width."""
        return self.widths[len(self.widths) // 2]

    def build(self, *, sick: bool = True, width: int | None = None, dtype: torch.dtype = FLOAT32) -> Setup:
        """Return the case's model, ready to be trained; the same one at every call."""
        torch.manual_seed(zlib.crc32(self.id.encode()) % 10_000)
        width = self.width if width is None else width
        setup = self.make(width) if self.healthy else self.make(sick, width)
        return setup if dtype == FLOAT32 else _cast(setup, dtype)


CASES: dict[str, Case] = {}


def sick(
    id: str,
    expect: Iterable[tuple[str, str]],
    claim: Claim,
    *,
    allow: Iterable[str] = (),
    source: str = "",
    steps: int = 120,
    falls_to: float = 0.8,
    widths: tuple[int, ...] = WIDTHS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Callable[[Callable[[bool, int], Setup]], Callable[[bool, int], Setup]]:
    """Register a function of (sick, width) as a sick case with its repair."""

    def register(make: Callable[[bool, int], Setup]) -> Callable[[bool, int], Setup]:
        expected = tuple(expect)
        unknown = {kind for kind, _ in expected} | set(allow)
        if not expected or unknown - set(TYPES):
            raise ValueError(f"{id}: expected issue types among {TYPES}, got {sorted(unknown)}")
        _add(
            Case(
                id=id,
                note=_note(make),
                make=make,
                source=source,
                expect=expected,
                allow=tuple(allow),
                claim=claim,
                looks=None,
                steps=steps,
                falls_to=falls_to,
                converged=False,
                widths=widths,
                dtypes=dtypes,
            )
        )
        return make

    return register


def healthy(
    id: str,
    looks: Claim | None = None,
    *,
    source: str = "",
    steps: int = 120,
    falls_to: float = 0.8,
    converged: bool = False,
    widths: tuple[int, ...] = WIDTHS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Callable[[Callable[[int], Setup]], Callable[[int], Setup]]:
    """Register a function of the width as a healthy case that looks suspicious."""

    def register(make: Callable[[int], Setup]) -> Callable[[int], Setup]:
        _add(
            Case(
                id=id,
                note=_note(make),
                make=make,
                source=source,
                expect=(),
                allow=(),
                claim=None,
                looks=looks,
                steps=steps,
                falls_to=falls_to,
                converged=converged,
                widths=widths,
                dtypes=dtypes,
            )
        )
        return make

    return register


def _note(make: Callable[..., Setup]) -> str:
    return " ".join((make.__doc__ or "").split())


def _add(case: Case) -> None:
    if case.id in CASES:
        raise ValueError(f"{case.id}: registered twice")
    if not case.note:
        raise ValueError(f"{case.id}: the docstring of its function is its note, and there is none")
    CASES[case.id] = case


def call(model: nn.Module, batch: Any) -> Any:
    """Return the model's output for a batch that is a tensor, a tuple or a mapping."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _cast(setup: Setup, dtype: torch.dtype) -> Setup:
    """Run the model in `dtype` and its loss in float32, as mixed-precision training does."""
    setup.model.to(dtype)
    return Setup(
        setup.model,
        lambda: _floating_to(setup.make_batch(), dtype),
        lambda output: setup.loss_fn(_floating_to(output, FLOAT32)),
        setup.optimizer,
    )


def _floating_to(tree: Any, dtype: torch.dtype) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {key: _floating_to(value, dtype) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_floating_to(value, dtype) for value in tree)
    return tree
