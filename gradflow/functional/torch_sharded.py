"""All use of private names of PyTorch that concern models spread over processes; see `torch_private.py`.

| name | for | without it |
| --- | --- | --- |
| `FSDPModule._get_fsdp_state`, its groups, their parameters | which leaf stands for a shard | an error |
| `Module._distribute_module_applied` | which calls are taken with their hooks | more operations in graphs |
| `tensor._utils.compute_local_shape_and_global_offset` | where in the whole a shard lies | an error |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ShardedGroup",
    "is_parallel",
    "place_of",
    "replicated",
    "sees_through",
    "sharded_groups",
    "unsharded_class",
]


class ShardedGroup:
    """A module whose parameters `fully_shard` has spread over processes, and gathers while it runs.

    Args:
        module: the module.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self._state = module._get_fsdp_state()

    @property
    def _groups(self) -> list[Any]:
        several = getattr(self._state, "_fsdp_param_groups", None)  # one alone in older releases
        one = [] if several is not None else [self._state._fsdp_param_group]
        return [group for group in (several or one) if group is not None]

    def leaves(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each sharded parameter and the leaf that stands for it when gathered; None before that."""
        for group in self._groups:
            for held in group.fsdp_params:
                yield held.sharded_param, getattr(held, "_unsharded_param", None)

    @property
    def meshes(self) -> list[Any]:
        """The meshes of processes, of one dimension or, with replicas, two, over which they are spread."""
        return [group.mesh_info.mesh for group in self._groups]

    @property
    def is_gathered(self) -> bool:
        """Whether the parameters are whole at present."""
        return any(group.is_unsharded for group in self._groups)

    def rest(self) -> None:
        """Shard the parameters again, and forget a pass that has begun."""
        if self._state._is_root and hasattr(self.module, "reset_iter_state"):
            self.module.reset_iter_state()
        self.module.reshard()

    def set_aside(self) -> Callable[[], None]:
        """Put aside what an unfinished accumulation of gradients has left; return what puts it back.

        Gradients are reduced from now on, as in the last of the passes of an accumulation.
        """
        was = [(g, g.reduce_grads, g.all_reduce_grads, g._partial_reduce_output) for g in self._groups]
        sums = [(p, p.unsharded_accumulated_grad) for g in self._groups for p in g.fsdp_params]
        last = self._state._state_ctx.is_last_backward
        for group, *_ in was:
            group.reduce_grads = group.all_reduce_grads = True
            group._partial_reduce_output = None
        leaves = [(leaf, leaf.grad) for _, leaf in self.leaves() if leaf is not None]
        for held, _ in sums:
            held.unsharded_accumulated_grad = None
        for leaf, _ in leaves:
            leaf.grad = None
        self._state._state_ctx.is_last_backward = True

        def put_back() -> None:
            for group, reduced, all_reduced, partial in was:
                group.reduce_grads, group.all_reduce_grads = reduced, all_reduced
                group._partial_reduce_output = partial
            for held, total in sums:
                held.unsharded_accumulated_grad = total
            for leaf, gradient in leaves:
                leaf.grad = gradient
            self._state._state_ctx.is_last_backward = last

        return put_back


def sharded_groups(model: nn.Module) -> dict[str, ShardedGroup]:
    """Return the parts of a model that `fully_shard` was called on by name, the outermost first."""
    return {name: ShardedGroup(module) for name, module in model.named_modules() if is_sharded(module)}


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def is_parallel(module: nn.Module) -> bool:
    """Whether `parallelize_module` has given a module hooks that turn tensors into DTensors and back."""
    return "_distribute_module_applied" in vars(module)


def replicated() -> Any:
    """Return the placement of what all processes hold alike."""
    from torch.distributed.tensor import Replicate

    return Replicate()


def place_of(tensor: Any) -> tuple[slice, ...]:
    """Return where in a DTensor the part lies that this process holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if not offset:
        return (slice(0, 0),) * tensor.dim()
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def unsharded_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before `fully_shard` gave it one of its own."""
    names = [kind.__name__ for kind in type(module).__mro__[:2]]
    return type(module).__mro__[2] if names[1] == "FSDPModule" else type(module)


def sees_through(node: Any) -> bool:
    """Whether an autograd node is the identity, and only tells `fully_shard` that the gradient passes by."""
    custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    return custom and type(node).__name__ in _SEEN_THROUGH


_SEEN_THROUGH = ("RegisterPostBackwardFunctionBackward", "RegisterPreBackwardFunctionBackward")
