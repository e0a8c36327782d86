"""`parts`: the measurement of blocks, norm layers, matrices, equal slices, and operations between layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.measurement import Session, gradients
from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.parts.blocks import passes, siblings
from gradflow.functional.parts.choices import Answers, Choices
from gradflow.functional.parts.draws import Draws
from gradflow.functional.parts.ends import Ends
from gradflow.functional.parts.quotients import Quotients
from gradflow.functional.parts.turns import Turns
from gradflow.functional.parts.twins import SAME, Rows, Twins, apart, equal_rows, is_same, twins
from gradflow.functional.parts.weights import as_drawn, epsilon_of, is_fused, thirds, variance
from gradflow.functional.processes.shards import is_distributed
from gradflow.functional.tap.calls import Call, type_name, version
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.scans import Scan, Scans, faded_share
from gradflow.records import (
    BlockRecord,
    EndsRecord,
    Floats,
    MatrixRecord,
    NormRecord,
    PartsRecord,
    QuotientRecord,
    RowsRecord,
    ScanRecord,
    TurnsRecord,
    TwinsRecord,
)


@attrs.frozen
class Parts:
    """The measurement of a model's parts; see `parts`."""

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return PartsSession(model, modules)


def parts() -> Parts:
    """Return the measurement of what can be held against its like: `analyze` takes it in every run.

    Of blocks that a model repeats, what each keeps of its input and adds to it; of norm layers, what they
    add to the variance, and the variance; of weight matrices, the size of fused parts, and whether slices
    are equal to the bit; of divisions, divisors that are nothing beside their like; of loops of operations
    over a sequence, at which of its steps gradient arrives. The record has it as `record.parts`.

    >>> import gradflow as gf
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> record = gf.analyze(model, [torch.randn(16, 4)], lambda y: y.square().mean())
    >>> [norm.name for norm in record.parts.norms], record.parts.twins
    (['1'], ())
    """
    return Parts()


class PartsSession(Session):
    """Listens to blocks and norm layers, and looks at the parameters; see `parts`."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self._model, self._modules, self._groups = model, modules, siblings(modules)
        self._types = {name: type_name(module) for name, module in modules.items()}
        self._norms = {
            name: (module, epsilon)
            for name, module in modules.items()
            if (epsilon := epsilon_of(module)) is not None
        }
        self._steps: list[int] = []
        self._looks: list[dict[tuple[str, str], Any]] = []
        self._twins: list[TwinsRecord] = []
        self._drawn: dict[str, tuple[float, float]] = {}
        self._passes: dict[str, bool | None] = {}
        self._quotients: list[QuotientRecord] = []
        self._scans: list[ScanRecord] = []
        self._turns: list[TurnsRecord] = []
        self._ends: list[EndsRecord] = []
        self._rows: list[RowsRecord] = []
        self._kinds: Rows | None = None
        self._choices, self._draws, self._answers = Choices(), Draws(), Answers()
        self._forget()

    def listens(self, *, end: bool) -> bool:
        """In the first step and the last alone."""
        return end

    def beside(self, modules: Mapping[str, str]) -> None:
        """Take blocks for siblings of those in other stages."""
        self._groups = siblings(self._modules, modules)

    def hears_alone(self) -> bool:
        """All but the gradients is taken of what is heard."""
        return True

    def _forget(self) -> None:
        self._divided: Quotients | None = None
        self._scanned: Scans | None = None
        self._turned: Turns | None = None
        self._at_ends: Ends | None = None
        self._spread = False
        self._given: tuple[Any, ...] = ()
        self._last: tuple[str, Tensor] | None = None
        self._torn: tuple[str, Tensor] | None = None
        self._lost: dict[str, Tensor] = {}  # by layer call, what differs there between rows that end equal
        self._numbers: dict[tuple[str, str], Tensor] = {}
        self._entering: dict[int, tuple[Tensor, int]] = {}
        self._suspects: list[tuple[str, Tensor, Twins]] = []
        self._apart: list[Tensor] = []
        self._faded: list[tuple[Scan, Tensor]] = []
        self._sharded: list[tuple[str, nn.Module, str]] = []  # parameters not gathered so far

    def begin(self, step: int, recorder: Recorder) -> None:
        """Look at the parameters."""
        self._forget()
        self._step, self._divided, self._scanned = step, Quotients(recorder), Scans(recorder)
        self._turned = Turns(recorder)
        self._choices.begin(recorder)
        self._draws.begin(recorder)
        self._answers.begin(recorder)
        # A pass over what is spread exchanges: what one process alone sees may not ask for one.
        self._spread = any(map(is_distributed, self._model.parameters()))
        self._at_ends = None if self._spread else Ends(recorder)
        for name, parameter in self._model.named_parameters():
            self._look_at(name, parameter)

    def _look_at(self, name: str, parameter: Tensor) -> None:
        """Look at a parameter; at a sharded one, when the module that it belongs to has gathered it."""
        module, _, key = name.rpartition(".")
        if is_distributed(parameter):
            self._sharded.append((name, self._model.get_submodule(module), key))
            return
        if module in self._norms and key == "weight" and parameter.numel() and not self._steps:
            self._numbers["gain", module] = torch.stack([parameter.detach().min(), parameter.detach().max()])
        prefixes = tuple(f"{name}." for name in self._groups)
        if is_fused(parameter) and name.startswith(prefixes):
            self._numbers["rms", name] = thirds(parameter)
        if self._steps:
            return
        if parameter.requires_grad:
            self._suspects += [(name, parameter, found) for found in twins(parameter)]
        elif prefixes and name.startswith(prefixes):
            self._numbers["drawn", name] = as_drawn(parameter)

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what enters a block while it runs; take the variance of what enters a norm layer."""
        if not call.module:
            self._given = (args, dict(kwargs))
        waiting, self._sharded = self._sharded, []
        for name, module, key in waiting:
            self._look_at(name, getattr(module, key))
        if call.module in self._norms and (x := _first((args, dict(kwargs)))) is not None:
            self._numbers["variance", call.module] = variance(self._norms[call.module][0], x.detach())
        if call.module in self._groups and (x := _first((args, dict(kwargs)))) is not None:
            self._entering[call.index] = (x, version(x))

    def left(self, call: Call, output: Any) -> None:
        """Hold what leaves a block against what entered it."""
        x, before = self._entering.pop(call.index, (None, 0))
        y = _first(output)
        if y is not None and y.dim() == 3 and call.is_layer and _is_plain(self._modules.get(call.module)):
            self._last = (call.name, y)
        elif call.is_layer and not (self._last is not None and is_same(y, self._last[1])):
            self._last = None  # a layer that holds parts may hand on what the last of them gives
        if self._kinds is not None and y is not None and call.is_layer and self._kinds.fits(y):
            self._lost[call.name] = self._kinds.lost(y.detach())
        if x is None or y is None or x.shape != y.shape or version(x) != before:
            return
        if not self._steps:
            self._passes[call.module] = passes(x, y)
        x, y = x.detach().flatten().float(), y.detach().flatten().float()
        self._numbers["kept", call.module] = (x @ y) / (x @ x)
        self._numbers["growth", call.module] = y.norm() / x.norm()
        self._numbers["added", call.module] = (y - x).square().mean().sqrt()

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Hear of divisions, of choices, of draws, of sinusoids, and of steps that are taken one by one."""
        if self._scanned is not None:
            self._scanned.hear(func, args, kwargs)
        if self._turned is not None:
            self._turned.hear(func, args)
        listeners = (self._choices, self._draws, self._answers)
        heard = [one.hear(func, args, kwargs) for one in listeners]
        if self._at_ends is not None:
            heard.append(self._at_ends.hear(func, args, kwargs))
        if heard[0] is None and self._divided is not None:
            heard.append(self._divided.hear(func, args, kwargs))
        follow = [one for one in heard if one is not None]
        if len(follow) < 2:
            return follow[0] if follow else None
        return lambda out: [one(out) for one in follow][-1]

    def differentiate(self, loss: Tensor) -> None:
        """Take the gradients of parameters whose slices are equal: does the first step tell them apart? And
        those of what a loop takes step by step: do they reach the first steps?"""
        scans = self._scanned.whole() if self._scanned is not None else []
        if scans:
            found = gradients(loss, [scan.tensor for scan in scans])
            with torch.no_grad():
                pairs = [(scan, g) for scan, g in zip(scans, found, strict=True) if g is not None]
                self._faded = [(scan, faded_share(scan, gradient)) for scan, gradient in pairs]
        if self._at_ends is not None and (outputs := self._at_ends.outputs(read=not self._steps)):
            found = gradients(loss, outputs)
            with torch.no_grad():
                self._at_ends.weigh(found)
        if not self._spread and (codes := self._draws.codes()):
            found = gradients(loss, codes)
            with torch.no_grad():
                self._draws.weigh(found)
        if self._last is not None and not self._spread:
            self._hold_rows(loss, *self._last)
        if self._suspects:
            found = gradients(loss, [parameter for _, parameter, _ in self._suspects])
            with torch.no_grad():
                self._apart = [
                    torch.tensor(math.nan) if gradient is None else apart(equal, gradient)
                    for (_, _, equal), gradient in zip(self._suspects, found, strict=True)
                ]

    def _hold_rows(self, loss: Tensor, layer: str, output: Tensor) -> None:
        """Look for equal rows in the first step, and at what becomes of them in the last."""
        if not self._steps and min(output.shape) > 1 and _differ(self._given, output.shape[:2]):
            self._kinds = equal_rows(output)
        if self._kinds is None or self._kinds.shape != tuple(output.shape):
            return
        gradient = gradients(loss, [output])[0]
        if gradient is not None:
            with torch.no_grad():
                self._torn = (layer, self._kinds.torn_share(output, gradient))

    def end(self) -> None:
        """Read the numbers of the step, and let go of its tensors."""
        self._steps.append(self._step)
        if self._torn is not None and self._kinds is not None:
            lost = dict(zip(self._lost, _read([x[None] for x in self._lost.values()]), strict=True))
            self._rows = [_rows_record(self._kinds, *self._torn, {name: x[0] for name, x in lost.items()})]
        for (name, parameter, found), distance in zip(self._suspects, self._apart, strict=False):
            number = parameter.shape[found.axis]
            self._twins.append(
                TwinsRecord(
                    name=name, axis=found.axis, num_slices=number, num_different=found.num_different,
                    gradient_apart=float(distance),
                )
            )  # fmt: skip
        read = dict(zip(self._numbers, _read(list(self._numbers.values())), strict=True))
        self._drawn |= {name: (value[0], value[1]) for (what, name), value in read.items() if what == "drawn"}
        self._looks.append(read)
        self._choices.end()
        self._draws.end()
        self._answers.end()
        self._turns = self._turned.read() if self._turned else []
        self._ends = self._at_ends.read() if self._at_ends else []
        self._quotients, self._divided = self._divided.read() if self._divided else [], None
        self._scans = [
            ScanRecord(
                name=scan.module, num_steps=scan.tensor.shape[scan.axis], shape=scan.tensor.shape,
                faded_share=float(share),
            )
            for scan, share in self._faded
        ]  # fmt: skip
        self._scanned = None
        self._forget()

    def fields(self) -> Mapping[str, Any]:
        """Return the record."""
        fused = [name for (what, name) in self._looks[0] if what == "rms"] if self._looks else []
        matrices = [
            MatrixRecord(name=name, rms=np.stack([self._of(i, "rms", name, 3) for i in self._range]))
            for name in fused
        ]
        matrices += [
            MatrixRecord(name=name, rms=np.full((len(self._looks), 1), math.nan), kurtosis=k, dispersion=d)
            for name, (k, d) in self._drawn.items()
        ]
        return {
            "parts": PartsRecord(
                steps=self._steps,
                blocks=[
                    BlockRecord(
                        name=name, group=group, type=self._types[name], passes=self._passes.get(name),
                        **{what: self._series(what, name) for what in ("kept", "growth", "added")},
                    )
                    for name, group in self._groups.items()
                ],
                norms=[
                    NormRecord(
                        name=name, type=self._types[name], epsilon=epsilon,
                        variance=self._series("variance", name), smallest_gain=self._gains(name)[0],
                        largest_gain=self._gains(name)[1],
                    )
                    for name, (_, epsilon) in self._norms.items()
                ],
                matrices=matrices,
                twins=self._twins,
                rows=self._rows,
                quotients=self._quotients,
                choices=self._choices.read(),
                draws=self._draws.read(),
                answers=self._answers.read(),
                ends=self._ends,
                turns=self._turns,
                scans=self._scans,
            )
        }  # fmt: skip

    @property
    def _range(self) -> range:
        return range(len(self._looks))

    def _of(self, look: int, what: str, name: str, size: int) -> Sequence[float]:
        return self._looks[look].get((what, name), [math.nan] * size)

    def _gains(self, name: str) -> Sequence[float]:
        return self._of(0, "gain", name, 2) if self._looks else (math.nan, math.nan)

    def _series(self, what: str, name: str) -> Floats:
        return np.array([self._of(look, what, name, 1)[0] for look in self._range])


def _is_plain(module: nn.Module | None) -> bool:
    """Whether a layer applies a matrix to each row of what enters."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _differ(given: Any, shape: Sequence[int]) -> bool:
    """Whether no rows of what enters the model, for as many samples and rows, are equal: tokens may be."""
    rows = [t for t in iter_tensors(given) if t.dim() >= 2 and tuple(t.shape[:2]) == tuple(shape)]
    flat = [t.reshape(*shape, -1) for t in rows if t.is_floating_point()]
    return len(flat) == len(rows) and all(equal_rows(t) is None for t in flat)


def _rows_record(kinds: Rows, layer: str, torn: Tensor, lost: Mapping[str, float]) -> RowsRecord:
    number, different = kinds.shape[1], kinds.num_kinds / kinds.shape[0]
    names = list(lost)  # in the order of their calls
    differ = [i for i, name in enumerate(names) if lost[name] > SAME]
    since = names[max(differ, default=-1) + 1 :]
    return RowsRecord(
        layer=layer, num_rows=number, num_different=different, torn_share=float(torn),
        since=since[0] if since else "", from_the_start=bool(since) and not differ,
    )  # fmt: skip


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of floating-point numbers in a value."""
    return next((t for t in iter_tensors(value) if t.is_floating_point() and t.numel()), None)


def _read(values: list[Tensor]) -> list[list[float]]:
    """Return small tensors as lists of numbers, with one transfer for each device."""
    found: list[list[float]] = [[] for _ in values]
    by_device: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        by_device.setdefault(value.device, []).append(i)
    for places in by_device.values():
        flat = torch.cat([values[i].reshape(-1).float() for i in places]).tolist()
        for i in places:
            number = values[i].numel()
            found[i], flat = flat[:number], flat[number:]
    return found
