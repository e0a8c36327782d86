"""Which processes an analysis runs on, and what each of them has of the whole: a part of the batch, of the
model.

NOTE [What several processes measure]
A trainer's global loss is the mean of the losses of the processes that split the batch, L = 1/R Σ_r L_r. So
the gradient at what process r computes from its part is 1/R of that of L_r, and the norm of the whole is 1/R
√Σ_r ‖g_r‖²; the gradient of a parameter that all hold is the mean of theirs, as a trainer's all-reduce makes
it. What is of the forward pass, a sum of squares or a count, is added up. An output that does not come from
the batch (an embedding of positions, a scalar loss) is one and the same thing on all of them: its gradient is
the mean of theirs, like that of a parameter.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradflow.errors import ModelInputError

Ranks = tuple[int, ...]
_PATIENCE = datetime.timedelta(seconds=60)  # in which all must have asked for a group


@attrs.frozen(eq=False)
class Axis:
    """A direction in which processes are laid out.

    Args:
        name: of the axis, such as the name of a mesh dimension.
        group: the process group along it that this process is in.
        splits: what its processes have parts of: `batch`, `model` or `stages`.
    """

    name: str
    group: Any
    splits: str = "batch"

    @property
    def size(self) -> int:
        """How many processes lie along it."""
        return int(dist.get_world_size(self.group))

    @property
    def ranks(self) -> Ranks:
        """The ranks of those along which this process lies, by which an axis is known."""
        return tuple(dist.get_process_group_ranks(self.group))


@attrs.frozen(eq=False)
class Processes:
    """The processes that an analysis runs on; none but this one, where there are no axes.

    Args:
        axes: in which directions they are laid out.
        group: all of them.
        spread: by name of a parameter of which each process holds a part, the axes along which it is split.
        reduced: names of the parameters whose gradients the model itself averages.
    """

    axes: tuple[Axis, ...] = ()
    group: Any = None
    spread: Mapping[str, Collection[Ranks]] = attrs.field(factory=dict)
    reduced: Collection[str] = ()

    @property
    def batch_axes(self) -> tuple[Axis, ...]:
        """Those along which the batch is split."""
        return tuple(axis for axis in self.axes if axis.splits == "batch")

    @property
    def model_axes(self) -> tuple[Axis, ...]:
        """Those along which layers are split."""
        return tuple(axis for axis in self.axes if axis.splits == "model")

    @property
    def place(self) -> tuple[int, ...]:
        """Which part of the batch this process has: its place along each axis that splits it."""
        return tuple(axis.ranks.index(dist.get_rank()) for axis in self.batch_axes)

    @property
    def num_parts(self) -> int:
        """Into how many parts the batch is split."""
        number = 1
        for axis in self.batch_axes:
            number *= axis.size
        return number

    def parameter_axes(self, name: str) -> tuple[Axis, ...]:
        """Return the axes over which the numbers of a parameter are added up.

        None, where each process holds all of it and its gradient is averaged.
        """
        held = self.spread.get(name, ())
        return tuple(axis for axis in self.axes if axis.ranks in held)

    def call_axes(self, split: Collection[Ranks] = ()) -> tuple[Axis, ...]:
        """Return the axes over which the numbers of a call's output are added up.

        Args:
            split: those along which the model splits the output; see `shards.split_of`.
        """
        return (*self.batch_axes, *(axis for axis in self.model_axes if axis.ranks in split))


def _checked_rank(told: OnRank, field: attrs.Attribute[int], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelInputError(
            f"OnRank takes the rank of a process, a whole number from 0 on, got {value!r:.100}: "
            "`processes=gradflow.OnRank(0)`."
        )


def _several(told: OnRank, field: attrs.Attribute[Any], value: Any) -> None:
    if isinstance(value, OnRank) or (isinstance(value, str) and value == "alone"):
        raise ModelInputError(
            f"OnRank says which of several processes has what they show together, and was given {value!r}. "
            "Pass 'auto' or a process group; what a process measures alone, it has itself."
        )


@attrs.frozen
class OnRank:
    """One process that is to have what several show together: may be passed as `processes`.

    All of them call and take part, as without it. That one gets the record or the report, the others get
    None: they send their part of the record to it alone, and neither join the parts nor judge.

    Args:
        rank: of that process, as `torch.distributed.get_rank()` has it.
        processes: which take part: `auto` or a process group, as they may be passed without it.

    Raises:
        ModelInputError: if `rank` is none, or `processes` is `alone`.

    >>> OnRank(0)
    OnRank(rank=0, processes='auto')
    """

    rank: int = attrs.field(default=0, validator=_checked_rank)
    processes: Any = attrs.field(default="auto", validator=_several)


_MADE: dict[Ranks, tuple[Any, Any]] = {}  # groups of our own, each with the default group of its time


def group_of(ranks: Ranks) -> Any:
    """Return a process group of some ranks, made once; each of them must ask for it, and no other."""
    default, made = _MADE.get(ranks, (None, None))
    if default is not dist.group.WORLD:
        made = dist.new_group(list(ranks), timeout=_PATIENCE, use_local_synchronization=True)
        _MADE[ranks] = dist.group.WORLD, made
    return made


def is_told(asked: Any) -> bool:
    """Whether this process is to have what an analysis shows.

    Args:
        asked: what was passed as `processes`.
    """
    return not isinstance(asked, OnRank) or asked.rank == _own_rank()


def check_told(asked: Any, processes: Processes) -> None:
    """Raise if the one process that is to have what an analysis shows takes no part in it.

    Args:
        asked: what was passed as `processes`.
        processes: that take part.

    Raises:
        ModelInputError: if it does not.
    """
    if not isinstance(asked, OnRank):
        return
    alone = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    ranks: Sequence[int] = () if alone else (0,)
    if processes.axes:
        ranks = dist.get_process_group_ranks(processes.group)
    if asked.rank in ranks:
        return
    raise ModelInputError(
        f"process {asked.rank} is to have the report, and takes no part in the analysis, which runs on "
        + (f"{', '.join(map(str, ranks))}." if ranks else "each process by itself.")
        + f" Pass the processes that do, as in `processes=gradflow.OnRank({asked.rank}, "
        "torch.distributed.group.WORLD)`."
    )


def _own_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def processes_of(model: nn.Module, asked: Any = "auto") -> Processes:
    """Return the processes that an analysis of a model runs on.

    Args:
        model: the model.
        asked: `auto` for those that a `DistributedDataParallel` in the model averages gradients over, `alone`
            for this one, or a process group that splits the batch.

    Raises:
        ModelInputError: if it is none of these, or this process is not in the group.
    """
    if isinstance(asked, str) and asked in ("auto", "alone"):
        group = _averaged_over(model) if asked == "auto" else None
    elif dist.is_available() and isinstance(asked, dist.ProcessGroup):
        group = asked
    else:
        raise ModelInputError(
            f"processes is {asked!r:.100}: expected 'auto', 'alone', or a process group whose processes "
            "split "
            "the batch, such as `torch.distributed.group.WORLD`."
        )
    if group is None or dist.get_world_size(group) == 1:
        return Processes()
    if dist.get_rank(group) < 0:
        raise ModelInputError(
            "processes is a process group that this process is not in. Call gradflow in those alone that are."
        )
    return Processes((Axis("data", group),), group)


def _averaged_over(model: nn.Module) -> Any:
    """Return the process group that parts of a model average their gradients over; None without any."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    parts = (module for module in model.modules() if isinstance(module, DistributedDataParallel))
    return next((part.process_group for part in parts), None)
