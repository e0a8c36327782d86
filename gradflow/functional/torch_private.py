"""All use of PyTorch's private names: what each is for, since which release, and what is done without it.

A private name may change with any release of PyTorch. So no other file uses one, and each is wrapped here in
a function that says what it means; a test looks for others, and looks up every name of this table in the
release that it runs on. All are there in 2.6, the oldest release that gradflow works with; 2.4 has no
`Node._input_metadata`.

| name | for | without it |
| --- | --- | --- |
| `autograd._get_sequence_nr`, `Node._sequence_nr` | which layer call made a node | an error |
| `Node._input_metadata` | shape and dtype that a cotangent must have | an error |
| `Tensor._version`, `Tensor._is_view` | whether a tensor was written to | an error |
| `autograd._unsafe_preserve_version_counter` | probes on outputs that are changed in place | an error |
| `Function._backward_cls` | telling the nodes of probes from others | an error |
| `Tensor._backward_hooks`, `Module._backward_pre_hooks` | hooks that act on a gradient | taken for none |
| `Tensor._post_accumulate_grad_hooks` | telling that they are not run | taken for none |
| `Optimizer._optimizer_step_pre_hooks`, `..._post_hooks` | running or telling of them | taken for none |
| `Tensor._lazy_clone`, `_C._is_cow_tensor` | working copies that take no memory | real copies |
| `UntypedStorage._new_with_weak_ptr` | whether somebody still holds such a copy | an error |
| `UntypedStorage._cdata` | whether tensors are on one memory | an error |
| `Tensor._make_subclass` | a copy of a parameter of a class of the user's | an error |
| `_C.DisableTorchFunction` | operations of ours that our watch need not see | an error |
| `_C._functorch`, `_functorch.pyfunctorch` | transforms that are active, their tensors | an error |
| `torch._foreach_norm` | the norms of many tensors in a few calls of a device | one by one |
| `autograd.graph._engine_run_backward` | a reverse pass, without a look at each input | `autograd.grad` |
| `_C._current_graph_task_id` | a reverse pass inside another | an error |
| `utils._pytree` | nested values, those of Hugging Face included | an error |
| `Module._parameters`, `Module._buffers` | swapping copies in | an error |
| `_BatchNorm`, `_NormBase`, `_InstanceNorm` | which layers keep running statistics | an error |
| `Module._compiled_call_impl` | telling a compiled module | taken for none |
| `DataLoader._iterator` | fresh workers, where a loader keeps its own | those it keeps |
| `distributed_c10d._get_default_store` | how processes tell one another that one has failed | an error |
| `distributed_c10d._set_pg_timeout`, `ProcessGroup._get_backend` | a bound on how long one waits | an error |
| `ProcessGroup._device_types` | of which backends that is asked | an error |
| `DistributedDataParallel._comm_hooks` | telling that they are not run | taken for none |
| the frames of `torch.utils.checkpoint` | telling one running checkpoint from another | taken for one |
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import pyfunctorch
from torch.distributed import distributed_c10d
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormWithStatistics
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

__all__ = [
    "Aside",
    "BatchNorm",
    "InstanceNorm",
    "NormWithStatistics",
    "address",
    "as_class",
    "checkpoint_segment",
    "communication_hooks",
    "default_store",
    "gradient_hooks",
    "has_gradient_hooks",
    "has_post_accumulate_hooks",
    "in_checkpoint",
    "in_reverse_pass",
    "input_metadata",
    "is_compiled",
    "is_view",
    "is_wrapped",
    "lazy_clone",
    "node_class",
    "node_number",
    "norms_of",
    "num_writes",
    "outside_transforms",
    "own_memory",
    "plain_gradients",
    "preserved_writes",
    "pytree",
    "sequence_number",
    "set_timeout",
    "step_hooks",
    "stores",
    "timeout_of",
    "transform_level",
    "transforms",
    "unwatched",
    "unwrapped",
    "without_workers",
]

# ------------------------------------------------------------------------------------ nodes of autograd


# Asked at every layer call: without a frame of Python's.
sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
"""Return the number that autograd gives to the next node of this thread."""

node_number: Callable[[Any], int] = operator.methodcaller("_sequence_nr")
"""Return the number that a node was given when it was made."""


def input_metadata(node: Any) -> tuple[Any, ...]:
    """Return what autograd knows of the gradients that a node takes: shape and dtype of each."""
    return node._input_metadata


def node_class(function: type[torch.autograd.Function]) -> type:
    """Return the class of the nodes that a custom function makes."""
    return function._backward_cls  # type: ignore[attr-defined]


def in_reverse_pass() -> bool:
    """Whether this thread is in a reverse pass of autograd's."""
    return torch._C._current_graph_task_id() != -1


_run_backward = getattr(torch.autograd.graph, "_engine_run_backward", None)


def plain_gradients(loss: Tensor, inputs: Sequence[Any], *, retain_graph: bool) -> Sequence[Tensor | None]:
    """Return what `torch.autograd.grad` does for a scalar loss; None where no path leads.

    Args:
        loss: a plain tensor of one floating-point element, with a graph.
        inputs: plain tensors, and edges of the graph.
        retain_graph: whether the graph is kept.
    """
    if _run_backward is None or type(loss) is not Tensor or not inputs:
        return torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True)  # type: ignore
    return _run_backward(
        (loss,), (torch.ones_like(loss),), retain_graph, False, tuple(inputs), True, accumulate_grad=False
    )


# ------------------------------------------------------------------------------------------- tensors


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of tensors of one device and dtype in single precision, in a few calls."""
    together = getattr(torch, "_foreach_norm", None)
    if together is None:
        return [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return list(together(list(tensors), 2, dtype=torch.float32))


num_writes: Callable[[Tensor], int] = operator.attrgetter("_version")
"""Return how often a tensor, or another one on the same memory, has been written to."""


def is_view(tensor: Tensor) -> bool:
    """Whether autograd holds a tensor for a view of another."""
    return tensor._is_view()


def preserved_writes(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which writes to a tensor are not counted."""
    return torch.autograd._unsafe_preserve_version_counter(tensor)  # type: ignore[attr-defined]


def as_class(kind: type, values: Tensor, requires_grad: bool) -> Any:
    """Return a leaf of a tensor class of the user's, on the memory of `values`."""
    return Tensor._make_subclass(kind, values, requires_grad)


def gradient_hooks(tensor: Tensor | None) -> tuple[Callable[[Tensor], Any], ...]:
    """Return the hooks on a tensor that may change its gradient."""
    return tuple((getattr(tensor, "_backward_hooks", None) or {}).values())


def has_gradient_hooks(owner: Tensor | nn.Module) -> bool:
    """Whether a tensor or a module has hooks that may change a gradient."""
    return bool(getattr(owner, "_backward_hooks", None) or getattr(owner, "_backward_pre_hooks", None))


def has_post_accumulate_hooks(parameter: Tensor) -> bool:
    """Whether a parameter has hooks that run after its gradient was accumulated."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def step_hooks(optimizer: Any) -> tuple[Callable[..., Any], ...]:
    """Return the hooks before and after an optimizer's step."""
    return tuple(hook for name in _STEP_HOOKS for hook in (getattr(optimizer, name, None) or {}).values())


def clear_step_hooks(optimizer: Any) -> None:
    """Take the hooks off an optimizer's step."""
    for name in _STEP_HOOKS:
        (getattr(optimizer, name, None) or {}).clear()


def lazy_clone(tensor: Tensor) -> Tensor | None:
    """Return a copy that takes memory only when one of the two is written to or asked for its raw pointer.

    None where that cannot be: there is no memory, or it is not PyTorch's own but numpy's, or several
    processes share it, or it is such a copy already.
    """
    if not hasattr(Tensor, "_lazy_clone") or torch._C._is_cow_tensor(tensor):  # type: ignore[attr-defined]
        return None
    try:
        return tensor._lazy_clone()  # type: ignore[attr-defined]
    except RuntimeError:
        return None


def address(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor from others; a lazy copy is left one, unlike by `data_ptr`."""
    return tensor.untyped_storage()._cdata


def own_memory(storage_of_copy: StorageWeakRef) -> None:
    """Give a lazy copy memory of its own, if somebody still holds it."""
    storage = torch.UntypedStorage._new_with_weak_ptr(storage_of_copy.cdata)  # type: ignore[attr-defined]
    if storage is not None:
        storage.data_ptr()


# ------------------------------------------------------------------------------------------- modules


def stores(module: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Return the very dicts that hold a module's own parameters and buffers."""
    return module._parameters, module._buffers  # type: ignore[return-value]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs as `torch.compile` has made it."""
    wrapped = type(module).__name__ == "OptimizedModule"  # by its name: to import its class takes a second
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def without_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a copy of a loader that will start workers of its own."""
    loader = copy.copy(loader)
    vars(loader)["_iterator"] = None
    return loader


# ------------------------------------------------------------------------- transforms and what is watched

unwatched = torch._C.DisableTorchFunction


class Aside:
    """A context without grad mode, in which nobody watches functions; for one use."""

    __slots__ = ("_enabled", "_unheard")

    def __enter__(self) -> None:
        self._enabled, self._unheard = torch.is_grad_enabled(), unwatched()
        self._unheard.__enter__()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *exception: Any) -> None:
        torch._C._set_grad_enabled(self._enabled)
        self._unheard.__exit__(*exception)


def transform_level() -> int:
    """Return how deep in transforms of `torch.func` we are.

    What a model runs in transforms of its own (a derivative by its input, samples in a `vmap`) holds tensors
    that mean nothing outside of them. It is left alone; the gradients of its parameters are as exact as ever.
    """
    top = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    return 0 if top is None else top.level()


def transforms() -> list[Any]:
    """Return the transforms of `torch.func` that are active, outermost first."""
    return list(torch._C._functorch.get_interpreter_stack() or ())  # type: ignore[attr-defined]


def outside_transforms() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no transform of `torch.func` is active."""
    return pyfunctorch.temporarily_clear_interpreter_stack()


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor is one of a transform of `torch.func`, around another."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers that derivatives of `torch.func` put around it; a batch stays."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


# --------------------------------------------------------------------------------------- checkpointing


def _checkpoint_frames() -> Iterator[Mapping[str, Any]]:
    for frame, _ in traceback.walk_stack(None):
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            yield frame.f_locals


def checkpoint_segment() -> int:
    """Return what tells the running reentrant checkpoint from others, 0 if none is running."""
    return next((id(found["ctx"]) for found in _checkpoint_frames() if "ctx" in found), 0)


def in_checkpoint() -> bool:
    """Whether activation checkpointing is running the present code."""
    return next(_checkpoint_frames(), None) is not None


# ------------------------------------------------------------------------------------------- processes


def default_store() -> Any:
    """Return the store through which the processes of the default group have found one another."""
    return distributed_c10d._get_default_store()


def timeout_of(group: Any) -> datetime.timedelta:
    """Return how long a collective of a process group may take."""
    options = getattr(next(iter(_backends(group))), "options", None)
    return getattr(options, "_timeout", distributed_c10d.default_pg_timeout)


def set_timeout(group: Any, timeout: datetime.timedelta) -> None:
    """Set how long a collective of a process group may take from now on."""
    distributed_c10d._set_pg_timeout(timeout, group)


def _backends(group: Any) -> list[Any]:
    return [group._get_backend(device) for device in group._device_types]


def communication_hooks(model: nn.Module) -> list[Any]:
    """Return the communication hooks of a `DistributedDataParallel`."""
    return list(getattr(model, "_comm_hooks", ()))
