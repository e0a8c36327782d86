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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradflow.functional.torch_private import (
    ShardedGroup,
    place_of,
    preserved_writes,
    replicated,
    sharded_groups,
)
from gradflow.records import Floats

Tensors = dict[str, Tensor]
Ranks = tuple[int, ...]  # of the processes along one dimension of a mesh


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, on the same memory; the tensor, if it is whole."""
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


def settled(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return what this process holds of a tensor, when the parts of a sum are summed.

    Args:
        tensor: any.
        like: of the same shape, in whose placement it is to be; None for its own, but for the sums.
    """
    return local(summed(tensor, like))


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
        if placement.is_shard() and mesh.size(dim) > 1
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

    @classmethod
    def of(cls, *models: nn.Module) -> Shards:
        """Return those of some models; there are none in most."""
        groups: dict[str, ShardedGroup] = {}
        gathered: Tensors = {}
        spread: Tensors = {}
        for model in models:
            own = sharded_groups(model)
            for group in own.values():
                group.module.reshard()
            ids = {id(shard) for group in own.values() for shard, _ in group.leaves()}
            groups |= own
            gathered |= {name: p for name, p in model.named_parameters() if id(p) in ids}
            spread |= {name: p for name, p in model.named_parameters() if is_distributed(p)}
        return cls(groups, gathered, spread)

    def __bool__(self) -> bool:
        return bool(self.spread)

    def leaves(self) -> Tensors:
        """Return, by name, the leaves that have stood for the slices in autograd's graph."""
        whole = {id(s): leaf for group in self.groups.values() for s, leaf in group.leaves() if leaf is not None}
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
        saved = [(p, local(p).clone()) for p in self.gathered.values()] if stepped else []
        undo = [group.set_aside() for group in self.groups.values()]
        try:
            yield
        finally:
            self.rest()
            for put_back in undo:
                put_back()
            for parameter, values in saved:
                with torch.no_grad(), preserved_writes(here := local(parameter)):
                    here.copy_(values)

    @contextlib.contextmanager
    def handing_out(self) -> Iterator[None]:
        """Take the gradients of the slices from their `.grad` within the context, and put back what was there."""
        saved = [(p, p.grad) for p in self.gathered.values()]
        try:
            for parameter, _ in saved:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in saved:
                parameter.grad = gradient

    def total(self, sums: Floats) -> Floats:
        """Return the sums of numbers over all processes."""
        if not self.spread:
            return sums
        found = torch.tensor(sums, device=local(next(iter(self.spread.values()))).device)
        dist.all_reduce(found)
        return found.cpu().numpy()

    def whole(self, masks: Mapping[str, Tensor | None], names: Iterable[str]) -> dict[str, Tensor | None]:
        """Return masks of whole parameters, made of those that the processes have of their slices.

        Args:
            masks: by name; on the host, None for a mask that would be full. Those that are empty are left out.
            names: of all parameters that any process may have one of, alike on all of them.
        """
        names = list(names)
        found = self._largest([0 if n not in masks else 2 if masks[n] is None else 1 for n in names])
        kinds = dict(zip(names, found.tolist(), strict=True))
        partly = {name: self.spread.get(name) for name, kind in kinds.items() if kind == 1}
        pieces = []
        for name, shard in partly.items():
            mask = masks.get(name)
            if shard is not None:
                piece = torch.zeros(shard.shape, dtype=torch.uint8)
                if mask is not None:
                    piece[place_of(shard)] = mask.to(torch.uint8)
            else:
                assert mask is not None
                piece = mask.to(torch.uint8)
            pieces.append(piece)
        flat = self._largest(torch.cat([piece.reshape(-1) for piece in pieces])) if pieces else torch.empty(0)
        sizes = [piece.numel() for piece in pieces]
        joined: dict[str, Tensor | None] = {name: None for name, kind in kinds.items() if kind == 2}
        for name, piece, part in zip(partly, pieces, flat.split(sizes) if sizes else (), strict=True):
            joined[name] = part.reshape(piece.shape).bool()
        return {name: joined[name] for name in names if name in joined}

    def _largest(self, values: Sequence[int] | Tensor) -> Tensor:
        """Return, of each of some small numbers, the largest that any process has, on the host."""
        device = local(next(iter(self.spread.values()))).device
        found = torch.as_tensor(values, dtype=torch.uint8).to(device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.cpu()

    def any(self, *flags: bool) -> Sequence[bool]:
        """Return which flags are set on any process, where the processes must take the same way."""
        if not self.spread:
            return flags
        return [flag > 0 for flag in self._largest([int(flag) for flag in flags]).tolist()]
