"""What differs between the processes of a run: noted while it runs, and held against one another at its end.

NOTE [Equal to the bit]
Whether a parameter is the same everywhere is told by two sums over it in double precision, one plain and one
weighted by a pattern, which processes of one kind take in the same order: equal bits give equal sums. The
    sums of all parameters and buffers are one vector, of which the largest and the smallest over the
    processes are compared, in one exchange; only where they differ is told whose. So it is with the tensors
    of a batch.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.model.supported import distributed
from gradflow.functional.processes.line import Line
from gradflow.functional.run.rows import Row, to_host
from gradflow.functional.torch_private import BatchNorm
from gradflow.records import DifferenceRecord, ProcessesRecord, SharesRecord

_PATTERN, _PIECE = 1009, 2**20
_MOST = 50  # differences that are told of


@attrs.define(eq=False)
class Facts:
    """What this process notes of itself, and of what it knows that others have otherwise."""

    differences: list[DifferenceRecord] = attrs.field(factory=list)
    partial: dict[str, int] = attrs.field(
        factory=dict
    )  # parameters that only some reached, and in how many steps
    reached: dict[str, int] = attrs.field(factory=dict)  # of those, the steps in which this process did
    batches: list[tuple[float, bool, tuple[float, ...]]] = attrs.field(factory=list)
    reducer: str = ""  # see `ProcessesRecord`
    num_samples: int = 0
    steps: list[int] = attrs.field(factory=list)  # that were looked at

    def compare(self, line: Line, model: nn.Module, tensors: Mapping[str, tuple[str, Tensor]]) -> None:
        """Find out which parameters and buffers are not equal on all processes.

        Args:
            line: to the others.
            model: that has them.
            tensors: by name, of what kind each is, and it itself.
        """
        if line.alone or not tensors:
            return
        written = {name for name, _ in _synchronised_buffers(model)}
        names = [
            name
            for name, (kind, tensor) in tensors.items()
            if _is_dense(tensor) and not (kind == "buffer" and name in written)
        ]
        sums = np.array(to_host([value for name in names for value in _sums(tensors[name][1])]))
        sums = np.nan_to_num(sums, nan=1e300, posinf=2e300, neginf=-2e300)
        largest, smallest = np.split(line.extremes(np.concatenate([sums, -sums])), 2)
        wrong = [i // 2 for i in np.flatnonzero(largest != -smallest)]
        wrong = list(dict.fromkeys(wrong))[:_MOST]
        if not wrong:
            return
        every = line.gathered([tuple(sums[2 * i : 2 * i + 2]) for i in wrong])
        for place, i in enumerate(wrong):
            values = [found[place] for found in every]
            usual = collections.Counter(values).most_common(1)[0][0]  # the first's, where none is more common
            ranks = [line.ranks[r] for r, value in enumerate(values) if value != usual]
            kind = tensors[names[i]][0]
            self.differences.append(DifferenceRecord(name=names[i], kind=kind, ranks=ranks))

    def note_reach(self, some: Mapping[str, bool]) -> None:
        """Hear which parameters only some processes have reached in a step, and whether this one has."""
        for name, own in some.items():
            self.partial[name] = self.partial.get(name, 0) + 1
            self.reached[name] = self.reached.get(name, 0) + own

    def look(self, step: int, inputs: Mapping[str, Tensor]) -> None:
        """Take the fingerprint of the batch of a step."""
        self.steps.append(step)
        floats = [t.detach() for t in inputs.values() if t.is_floating_point() and t.numel()]
        squares = [float(t.double().square().mean()) for t in floats]
        rms = math.sqrt(sum(squares) / len(squares)) if squares else math.nan
        if not self.batches:
            self.num_samples = next((int(t.shape[0]) for t in inputs.values() if t.dim()), 0)
        prints = tuple(value for t in inputs.values() for value in fingerprint(t))
        self.batches.append((rms, not squares or math.isfinite(rms), prints))

    def record(
        self, line: Line, model: nn.Module, rows: Sequence[Row], ran: Mapping[str, tuple[int, float]]
    ) -> ProcessesRecord:
        """Return what differs between the processes.

        Args:
            line: to the others.
            model: that was run.
            rows: of this process, before they were combined.
            ran: by name of the layer calls that only some processes have run, in how many steps this one has,
                and the share of the steps in which not all did.
        """
        losses = [row.loss for row in rows]
        gradients = [_gradient(row) for row in rows]
        mine = (
            losses,
            gradients,
            self.batches,
            self.num_samples,
            self.reached,
            {n: k for n, (k, _) in ran.items()},
            line.processes.place,
        )
        every = line.gathered(mine)
        told = [*self.differences]
        for name, steps in list(self.partial.items())[:_MOST]:
            ranks = [r for r, found in zip(line.ranks, every, strict=True) if found[4].get(name, 0)]
            told.append(
                DifferenceRecord(name=name, kind="gradient", ranks=ranks, share=steps / max(len(rows), 1))
            )
        for name, (_, share) in list(ran.items())[:_MOST]:
            ranks = [r for r, found in zip(line.ranks, every, strict=True) if found[5].get(name, 0)]
            told.append(DifferenceRecord(name=name, kind="layer", ranks=ranks, share=share))
        looks = min(len(found[2]) for found in every)
        parts = [found[2][:looks] for found in every]
        places = [found[6] for found in every]
        return ProcessesRecord(
            ranks=line.ranks,
            losses=np.array([found[0] for found in every]).T,
            gradients=np.array([found[1] for found in every]).T,
            data=SharesRecord(
                steps=self.steps[:looks],
                rms=np.array([[look[0] for look in part] for part in parts]).T,
                finite=np.array([[look[1] for look in part] for part in parts]).T,
                same=tuple(_same([tuple(look[2] for look in part) for part in parts], line.ranks, places)),
                num_samples=[found[3] for found in every],
            ),
            differences=told,
            unsynchronised=list(_unsynchronised(model)),
            reducer=self.reducer,
        )


def fingerprint(tensor: Tensor) -> tuple[float, ...]:
    """Return two sums over a tensor, see NOTE [Equal to the bit]; none of one that is not dense.

    >>> fingerprint(torch.tensor([1.0, 2.0])) == fingerprint(torch.tensor([2.0, 1.0]))
    False
    """
    return tuple(to_host(_sums(tensor))) if _is_dense(tensor) else ()


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta


def _sums(tensor: Tensor) -> list[Tensor]:
    """Return the plain sum and the weighted one, a piece at a time: each is copied in double precision."""
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
    pattern = torch.arange(min(_PIECE, flat.numel()), device=flat.device) % _PATTERN + 1
    weights, parts = pattern.double(), []
    for i, piece in enumerate(flat.split(_PIECE)):
        wide = piece.double()
        parts.append(torch.stack([wide.sum(), torch.dot(wide, weights[: len(wide)]) * (i + 1)]))
    return list(torch.stack(parts).sum(0).unbind())


def _gradient(row: Row) -> float:
    """Return the root of the sum of squares of a step's gradients at layer outputs."""
    at = [i for i, (kind, _) in enumerate(row.layout.places) if kind == "grad"]
    with np.errstate(over="ignore"):
        return float(np.sqrt(np.sum(np.square(row.values[at]))))


def _same(
    prints: Sequence[Any], ranks: Sequence[int], places: Sequence[tuple[int, ...]]
) -> Iterator[tuple[int, ...]]:
    """Yield groups of processes with the same fingerprints of their batches.

    Of those that should have the same part of the batch, since they split a layer, the first stands for all.
    """
    groups: dict[Any, list[int]] = {}
    for i, (rank, found) in enumerate(zip(ranks, prints, strict=True)):
        if places[i] not in places[:i]:
            groups.setdefault(repr(found), []).append(rank)
    known = any(any(look) for found in prints for look in found)
    yield from (tuple(group) for group in groups.values() if known and len(group) > 1)


def _synchronised_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that every forward pass in training takes over from the first process."""
    for name, module in model.named_modules():
        if module in distributed(model):
            own = vars(module)  # it has two names, by the release
            if own.get("forward_sync_buffers", own.get("broadcast_buffers", False)):
                yield from module.named_buffers(prefix=name)


def _unsynchronised(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        synced = any("SyncBatchNorm" in kind.__name__ for kind in type(module).__mro__)
        if isinstance(module, BatchNorm) and not synced and module.training:
            yield name


def reducer_of(model: nn.Module) -> str:
    """Return what the reducers of a model do with parameters that get no gradient; see `ProcessesRecord`."""
    parts = distributed(model)
    if not parts:
        return ""
    return "waits" if any(not (p.find_unused_parameters or p.static_graph) for p in parts) else "finds"
