"""Parameters that are spread over processes, and how a run works with them.

NOTE [Sharded parameters]
`fully_shard` keeps a slice of every parameter on each process. It gathers a module's parameters while the
module runs, forward and backward, and hands each process its slice of the mean gradient. All of that is the
model's own doing: a run calls the model as training does, `backward()` included, and finds the slices of the
gradient where training finds them. So no parameter is copied, and nothing is whole for longer than in
training. What was in `.grad`, and gradients that an accumulation has not handed out yet, are put aside.
Where an optimizer steps, it steps the slices, whose values are remembered and put back.

Gathering is an exchange between all processes. They must take part in the same order, so whatever decides
whether the model runs once more is decided by all of them together.

NOTE [Tensor parallel]
`parallelize_module` has each process hold a slice of some parameters and compute that slice of a layer's
output. Such parameters, and many of the activations, are DTensors: a part on each process, and a placement
that says what of the whole it is. A part of a sum (`Partial`) is no part of the whole: it is summed before
anything is taken of it. Numbers are taken of what a process holds, and added up over those that hold other
parts; of what all hold alike, those of one are taken. Working copies are DTensors of the same placement.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradflow.errors import ModelInputError
from gradflow.functional.processes.group import Axis, Processes, Ranks, group_of, processes_of
from gradflow.functional.processes.line import Line
from gradflow.functional.torch_private import preserved_writes
from gradflow.functional.torch_sharded import ShardedGroup, place_of, replicated, sharded_groups
from gradflow.records import Floats

Tensors = dict[str, Tensor]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, on the same memory; the tensor, if it is whole."""
    if type(tensor) is Tensor:
        return tensor
    if is_distributed(tensor):
        tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return arrived(tensor)


def arrived(tensor: Tensor) -> Tensor:
    """Return a tensor when it is there: what processes exchange may still be on its way."""
    if type(tensor).__name__ == "AsyncCollectiveTensor":
        return tensor.wait()  # type: ignore[attr-defined]
    return tensor


def of_parts(part: Tensor, like: Any) -> Tensor:
    """Return a DTensor of which this process holds a part, in the placement of another."""
    return type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def like_parts(part: Tensor, like: Tensor) -> Tensor:
    """Return what this process holds of a tensor in the form of another: a DTensor, where that is one."""
    return of_parts(part, like) if is_distributed(like) else part


def settled(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return what this process holds of a tensor, when the parts of a sum are summed.

    Args:
        tensor: any.
        like: of the same shape, in whose placement it is to be; None for its own, but for the sums.
    """
    return tensor if type(tensor) is Tensor else local(summed(tensor, like))


def summed(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return a tensor with the parts of a sum summed; a DTensor remains one. See `settled`."""
    if not is_distributed(tensor):
        return tensor
    found: Any = tensor
    if like is not None and is_distributed(like):
        wanted = list(like.placements)  # type: ignore[attr-defined]
    else:
        wanted = [replicated() if p.is_partial() else p for p in found.placements]
    return found if wanted == list(found.placements) else found.redistribute(placements=wanted)


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is spread over, or kept by, several processes as one (a DTensor)."""
    return type(tensor).__name__ == "DTensor"


def split_of(mesh: Any, placements: Sequence[Any]) -> dict[Ranks, int]:
    """Return over which processes a tensor of these placements is split, and along which of its axes."""
    return {
        tuple(dist.get_process_group_ranks(mesh.get_group(dim))): placement.dim
        for dim, placement in enumerate(placements)
        if "Shard" in type(placement).__name__ and mesh.size(dim) > 1  # the strided ones of two axes too
    }


@attrs.frozen(eq=False)
class Shards:
    """The parameters of a model that are spread over processes; see the notes above.

    Args:
        groups: the modules that gather theirs while they run, by qualified name, the outermost first.
        gathered: the slices that these hold, by qualified name.
        spread: these and all others.
    """

    groups: Mapping[str, ShardedGroup] = attrs.field(factory=dict)
    gathered: Tensors = attrs.field(factory=dict)
    spread: Tensors = attrs.field(factory=dict)
    _start: Tensors = attrs.field(factory=dict)  # copies of the slices, where an optimizer steps them

    @classmethod
    def of(cls, *models: nn.Module) -> Shards:
        """Return those of a model; there are none in most.

        Args:
            models: the model, and the module that is the loss, if it is one, which may hold the model.

        Raises:
            ModelInputError: if the loss has parameters of its own that are spread.
        """
        groups: dict[str, ShardedGroup] = {}
        gathered: Tensors = {}
        spread: Tensors = {}
        if not (dist.is_available() and dist.is_initialized()):  # there is nothing to spread over
            return cls()
        for model in models:
            own = sharded_groups(model)
            pairs = [pair for group in own.values() for pair in group.leaves()]
            slices = {id(t): shard for shard, leaf in pairs for t in (shard, leaf) if t is not None}
            known = {id(group.module) for group in groups.values()}
            groups |= {name: group for name, group in own.items() if id(group.module) not in known}
            shared = {id(tensor) for tensor in spread.values()}
            for name, parameter in model.named_parameters():
                if id(slices.get(id(parameter), parameter)) in shared:
                    continue
                if model is not models[0] and (id(parameter) in slices or is_distributed(parameter)):
                    raise ModelInputError(
                        f"{name!r} of the loss is spread over processes, which is understood of the model's "
                        "parameters alone. Make it a part of the model, or leave it whole on every process."
                    )
                if id(parameter) in slices:
                    gathered[name] = spread[name] = slices[id(parameter)]
                elif is_distributed(parameter):
                    spread[name] = parameter
        return cls(groups, gathered, spread)

    def __bool__(self) -> bool:
        return bool(self.spread)

    def leaves(self) -> Tensors:
        """Return, by name, the leaves that have stood for the slices in autograd's graph."""
        whole = {
            id(s): leaf for group in self.groups.values() for s, leaf in group.leaves() if leaf is not None
        }
        return {name: whole[id(p)] for name, p in self.gathered.items() if id(p) in whole}

    def rest(self) -> None:
        """Have all parameters sharded, and no pass under way."""
        for group in self.groups.values():
            group.rest()

    def group_of(self, module: str) -> ShardedGroup | None:
        """Return what gathers the parameters of a module: the nearest group that it is, or is in."""
        name = module
        while name not in self.groups and name:
            name = name.rpartition(".")[0]
        return self.groups.get(name)

    @contextlib.contextmanager
    def kept(self, *, stepped: bool) -> Iterator[None]:
        """Put back, on any exit, what a run may change of them.

        Args:
            stepped: whether an optimizer steps them.
        """
        whole = [group for group in self.groups.values() if group.is_gathered]
        for group in whole:
            group.module.reshard()
        self._start.update({name: local(p).clone() for name, p in self.gathered.items()} if stepped else {})
        undo = [group.set_aside() for group in self.groups.values()]
        try:
            yield
        finally:
            self.rest()
            for put_back in undo:
                put_back()
            self.reset()
            self._start.clear()
        for group in whole:
            group.module.unshard()

    def reset(self) -> None:
        """Have the slices that an optimizer steps as they were at the beginning."""
        for name, values in self._start.items():
            with torch.no_grad(), preserved_writes(here := local(self.gathered[name])):
                here.copy_(values)

    @contextlib.contextmanager
    def handing_out(self) -> Iterator[None]:
        """Have the gradients of the slices in their `.grad` for the context, and put back what was there."""
        saved = [(p, p.grad) for p in self.gathered.values()]
        try:
            for parameter, _ in saved:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in saved:
                parameter.grad = gradient

    def total(self, line: Line, sums: Floats) -> Floats:
        """Return the sums of numbers over all processes, where each has taken them of its slices alone.

        What several processes hold alike counts as often as they are, in numbers of entries too.
        """
        for axis in line.processes.axes if self.spread else ():
            sums = line.reduced(sums.reshape(-1), axis).reshape(sums.shape)
        return sums

    def whole(self, line: Line, parts: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Return small numbers, one for each element of parameters, of those that processes have of slices.

        Args:
            line: to the other processes.
            parts: by name, whole or of the slice of this process, on the host; of what is left out all are 0.
            names: of the parameters, alike on all processes.
        """
        pieces = {name: self._piece(name, parts.get(name)) for name in names}
        if not pieces:
            return {}
        flat = line.largest(torch.cat([piece.reshape(-1) for piece in pieces.values()]))
        found = flat.split([piece.numel() for piece in pieces.values()])
        return {name: part.reshape(pieces[name].shape) for name, part in zip(pieces, found, strict=True)}

    def _piece(self, name: str, part: Tensor | None) -> Tensor:
        """Return numbers of a whole parameter, with those of a slice in its place."""
        shard = self.spread.get(name)
        if shard is None or (part is not None and part.shape == shard.shape):
            assert part is not None
            return part.to(torch.uint8)
        whole = torch.zeros(shard.shape, dtype=torch.uint8)
        if part is not None:
            whole[place_of(shard)] = part.to(torch.uint8)
        return whole

    def largest(self, line: Line, numbers: Sequence[int]) -> list[int]:
        """Return the largest that any process has of every one of some numbers below 256."""
        return [int(number) for number in line.largest(torch.tensor(numbers, dtype=torch.uint8)).tolist()]

    def any(self, line: Line, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are set on any process, where the processes must take the same way."""
        return [bool(flag) for flag in self.largest(line, flags)]


def processes_with(asked: Any, *models: nn.Module, stages: int = 1) -> Processes:
    """Return the processes that have the same model; none but this one, where there are no axes.

    Args:
        asked: which, as `processes_of` and `processes_over` take it.
        models: the model, and the module that is the loss, if it is one.
        stages: of how many stages of a pipeline the model is one.
    """
    return processes_over(Shards.of(*models), asked, stages) or processes_of(models[0], asked)


def processes_over(shards: Shards, asked: Any, stages: int = 1) -> Processes | None:
    """Return the processes over which parameters are spread; None if none are.

    Those that gather a module's parameters split the batch, those that compute with parts of them do not.

    Args:
        shards: the model's.
        asked: `auto`, or a process group that splits the batch, if the meshes do not; see `processes_of`.
        stages: of how many stages of a pipeline the model is one.

    Raises:
        ModelInputError: if this process is asked for alone, or the meshes do not span all processes.
    """
    if not shards:
        return None
    if asked == "alone" and any(p.device_mesh.size() > 1 for p in shards.spread.values()):  # type: ignore[attr-defined]
        raise ModelInputError(
            f"processes='alone', but {next(iter(shards.spread))!r} is spread over processes, and no process "
            "has a model of its own. Pass processes='auto', and call gradflow on every process, each with "
            "its own part of the batch, as training is."
        )
    axes: dict[Ranks, Axis] = {}
    found = [(mesh, "batch") for group in shards.groups.values() for mesh in group.meshes]
    found += [(p.device_mesh, "model") for p in shards.spread.values()]  # type: ignore[attr-defined]
    for mesh, splits in found:
        for dim in range(mesh.ndim):
            name = (mesh.mesh_dim_names or ())[dim : dim + 1] or (f"{splits}{dim}",)
            axis = Axis(name[0], mesh.get_group(dim), splits)
            if axis.size > 1:
                axes.setdefault(axis.ranks, axis)
    number = math.prod(axis.size for axis in axes.values())
    if isinstance(asked, dist.ProcessGroup) and number * dist.get_world_size(asked) <= dist.get_world_size():
        axes = {(beside := Axis("data", asked)).ranks: beside, **axes}
    ordered = tuple(sorted(axes.values(), key=lambda axis: axis.splits != "batch"))
    if not ordered:  # of one process each
        return Processes()
    number = math.prod(axis.size for axis in ordered)
    if len(ordered) > 1 and number * stages != dist.get_world_size():
        of = f"the {stages} stages" if stages > 1 else "the model"
        raise ModelInputError(
            f"the parameters of {of} are spread over {number} processes each ({_sizes(ordered)}), of "
            f"{dist.get_world_size()} in all. Pass processes=GROUP, the process group over which the batch "
            "is split beside, so that the axes span all processes."
        )
    names = {name: frozenset(split_of(p.device_mesh, p.placements)) for name, p in shards.spread.items()}  # type: ignore[attr-defined]
    if len(ordered) == 1:
        group = ordered[0].group
    else:
        group = dist.group.WORLD if stages == 1 else group_of(_spanned([m for m, _ in found], number))
    return Processes(ordered, group, names, frozenset(shards.gathered))


def _spanned(meshes: Sequence[Any], number: int) -> Ranks:
    """Return the ranks of the processes that have the same stage of a pipeline, which one mesh spans.

    Raises:
        ModelInputError: if none does.
    """
    ranks = next((tuple(sorted(m.mesh.flatten().tolist())) for m in meshes if m.size() == number), None)
    if ranks is None:
        raise ModelInputError(
            "a stage of a pipeline is sharded and split over meshes that are not of one DeviceMesh, so it is "
            "not known which processes share it. Make one, as in `init_device_mesh(device, (2, 2, 2), "
            "mesh_dim_names=('pp', 'dp', 'tp'))`, and take its dimensions: `mesh['pp']`, `mesh['dp']`."
        )
    return ranks


def _sizes(axes: Sequence[Axis]) -> str:
    return ", ".join(f"{axis.name}: {axis.size}" for axis in axes)
