"""What differs between the processes that a run was on, and what they exchanged."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np

from gradflow.records.fields import Bools, Floats, array_field, to_tuple


def _groups(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(rank) for rank in group) for group in value)


@attrs.frozen(kw_only=True)
class DifferenceRecord:
    """Something that some processes have, or have otherwise.

    Args:
        name: of a parameter, a buffer or a layer call.
        kind: `parameter` or `buffer`, which is not equal on all; `layer`, which only some run; `gradient`, of
            a parameter that only some reach.
        ranks: those that differ from the most, or that run or reach it.
        share: the part of the steps in which that was seen; 1 for what was compared at the start.
    """

    name: str
    kind: str
    ranks: tuple[int, ...] = attrs.field(converter=to_tuple)
    share: float = 1.0


@attrs.frozen(kw_only=True)
class ExchangeRecord:
    """What a run exchanged between processes, counted on each of them, and over the stages of a pipeline.

    Args:
        gradients: all-reduces of gradients, in buckets, as training makes them.
        gradient_bytes: put into those.
        others: all other exchanges of the whole run.
        other_bytes: put into those.
        gathered_bytes: of these, what every process gets from every other; the rest is reduced.
        messages: from one stage of a pipeline to the next or the one before, of all its stages; what has no
            tensor is left out.
        message_bytes: of the tensors in them: activations, and their gradients.
    """

    gradients: int = 0
    gradient_bytes: int = 0
    others: int = 0
    other_bytes: int = 0
    gathered_bytes: int = 0
    messages: int = 0
    message_bytes: int = 0


@attrs.frozen(kw_only=True)
class SharesRecord:
    """The parts of the batch that processes get. Arrays have shape (looks, processes).

    Args:
        steps: the steps that were looked at.
        rms: root mean square of the floating-point inputs of the model; NaN where there are none, or one
            holds a NaN.
        finite: whether all of them are finite.
        same: groups of processes that got the same at every look.
        num_samples: samples in the batch of each process at the first step; 0 where unknown.
    """

    steps: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    rms: Floats = array_field(axes=2)
    finite: Bools = array_field(np.bool_, axes=2)
    same: tuple[tuple[int, ...], ...] = attrs.field(default=(), converter=_groups)
    num_samples: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)


@attrs.frozen(kw_only=True)
class ProcessesRecord:
    """The processes that a run was on, where there are several. The last axis of arrays is theirs, by rank.

    Args:
        ranks: of the processes that split the batch; one alone, where they only are stages of a pipeline.
        losses: of each process, shape (steps, processes).
        gradients: root of the sum of squares of the gradients at all layer outputs, of each process's own
            loss, shape (steps, processes).
        data: the parts of the batch that they got.
        differences: what differs between them.
        unsynchronised: names of batch norms in train mode that take statistics of one process alone.
        reducer: what a `DistributedDataParallel` of the model does with parameters that get no gradient:
            `waits`, `finds` where it was told to look for them, "" without one.
        exchanged: what the run exchanged.
    """

    ranks: tuple[int, ...] = attrs.field(converter=to_tuple)
    losses: Floats = array_field(axes=2)
    gradients: Floats = array_field(axes=2)
    data: SharesRecord
    differences: tuple[DifferenceRecord, ...] = attrs.field(default=(), converter=to_tuple)
    unsynchronised: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    reducer: str = ""
    exchanged: ExchangeRecord = attrs.field(factory=ExchangeRecord)
