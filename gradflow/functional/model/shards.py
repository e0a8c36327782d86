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
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradflow.functional.torch_private import ShardedGroup, place_of, preserved_writes, sharded_groups
from gradflow.records import Floats

Tensors = dict[str, Tensor]


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, on the same memory; the tensor, if it is whole."""
    if not is_distributed(tensor):
        return tensor
    return tensor.detach().to_local()  # type: ignore[attr-defined]


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is spread over, or kept by, several processes as one (a DTensor)."""
    return type(tensor).__name__ == "DTensor"


@attrs.frozen(eq=False)
class Shards:
    """The parameters of a model that its own machinery gathers; see NOTE [Sharded parameters].

    Args:
        groups: the modules that gather them, by qualified name, the outermost first.
        parameters: the slices, by qualified name.
    """

    groups: Mapping[str, ShardedGroup] = attrs.field(factory=dict)
    parameters: Tensors = attrs.field(factory=dict)

    @classmethod
    def of(cls, *models: nn.Module) -> Shards:
        """Return those of some models; there are none in most."""
        groups: dict[str, ShardedGroup] = {}
        parameters: Tensors = {}
        for model in models:
            own = sharded_groups(model)
            for group in own.values():
                group.module.reshard()
            ids = {id(shard) for group in own.values() for shard, _ in group.leaves()}
            groups |= own
            parameters |= {name: p for name, p in model.named_parameters() if id(p) in ids}
        return cls(groups, parameters)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def leaves(self) -> Tensors:
        """Return, by name, the leaves that have stood for the slices in autograd's graph."""
        whole = {id(s): leaf for group in self.groups.values() for s, leaf in group.leaves() if leaf is not None}
        return {name: whole[id(p)] for name, p in self.parameters.items() if id(p) in whole}

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
        saved = [(p, local(p).clone()) for p in self.parameters.values()] if stepped else []
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
        saved = [(p, p.grad) for p in self.parameters.values()]
        try:
            for parameter, _ in saved:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in saved:
                parameter.grad = gradient

    def total(self, sums: Floats) -> Floats:
        """Return the sums of numbers over all processes."""
        if not self.groups:
            return sums
        found = torch.tensor(sums, device=local(next(iter(self.parameters.values()))).device)
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
        partly = {name: self.parameters.get(name) for name, kind in kinds.items() if kind == 1}
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
        device = local(next(iter(self.parameters.values()))).device
        found = torch.as_tensor(values, dtype=torch.uint8).to(device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.cpu()

    def any(self, *flags: bool) -> Sequence[bool]:
        """Return which flags are set on any process, where the processes must take the same way."""
        if not self.groups:
            return flags
        return [flag > 0 for flag in self._largest([int(flag) for flag in flags]).tolist()]
