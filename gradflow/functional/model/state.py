"""The model's parameters and buffers as values: working copies, and a swap that puts them in place."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradflow.functional.model.memory import keyed_by, rekey
from gradflow.functional.model.purity import preserved
from gradflow.functional.model.supported import check_has_values
from gradflow.functional.model.threads import exclusive
from gradflow.functional.processes.shards import is_distributed, local, of_parts
from gradflow.functional.torch_private import (
    address,
    as_class,
    gradient_hooks,
    lazy_clone,
    own_memory,
    stores,
    unwrapped,
)

Tensors = dict[str, Tensor]
Copy = Callable[[Tensor], Tensor]
Place = tuple[dict[str, Any], str, str]  # a store of tensors, a key in it, and the name of what is there


# NOTE [Copies on write]
# A model may write to its parameters, so a run works on copies of them. Most models never do: then a copy
# need not exist. PyTorch's lazy clone is a tensor on the same memory, which is copied as soon as one
# of the two is written to or asked for its raw pointer, by whatever operation. At the end of a run the
# originals must be what they were, at the address where they were: a copy that somebody still holds is given
# memory of its own, and then the original, asked for its pointer, keeps its own.


class LazyCopies:
    """Makes copies that take memory only when they are written to; see NOTE [Copies on write].

    It is a context: at its end the originals have their memory for themselves again. Copies of tensors whose
    memory overlaps, such as a weight that is tied to the transpose of another, overlap likewise.

    Args:
        models: whose tensors will be copied.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._common = dict.fromkeys(_overlapping(models))  # the copies of their memory, once made
        self._shared: list[tuple[Tensor, StorageWeakRef]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor; a real one, where its memory cannot be shared in this way."""
        if is_distributed(tensor):
            return of_parts(self(local(tensor)), tensor)
        if self._common and (key := _memory(tensor)) in self._common:
            held = self._common[key]
            if held is None:
                held = self._common[key] = tensor.untyped_storage().clone()
            return tensor.new_empty(0).set_(held, tensor.storage_offset(), tensor.shape, tensor.stride())
        copy = lazy_clone(tensor) if _can_be_shared(tensor) else None
        if copy is None:
            return tensor.clone()
        self._shared.append((tensor, StorageWeakRef(copy.untyped_storage())))
        return copy

    def __enter__(self) -> LazyCopies:
        return self

    def __exit__(self, *exception: object) -> None:
        for original, copy in self._shared:
            own_memory(copy)
            original.data_ptr()
        self._shared.clear()


def _memory(tensor: Tensor) -> int:
    """Return the address of a plain tensor's memory; 0 for any other kind of tensor."""
    plain = tensor.layout is torch.strided and not tensor.is_nested and type(tensor) in (Tensor, nn.Parameter)
    return address(tensor) if plain and not tensor.is_meta else 0


def _overlapping(models: Sequence[nn.Module]) -> Iterator[int]:
    """Yield the addresses of memory in which tensors of the models overlap, each tensor counted once."""
    sharing: dict[int, list[Tensor]] = {}
    modules = (module for model in models for module in model.modules())
    tensors = {id(t): t for module in modules for store in stores(module) for t in store.values()}
    for tensor in tensors.values():
        if tensor is not None and (key := _memory(tensor)) and tensor.numel():
            sharing.setdefault(key, []).append(tensor)
    for key, found in sharing.items():
        spans = sorted(map(_span, found)) if len(found) > 1 else ()
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            yield key


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return where in its memory a tensor begins and ends, in bytes."""
    size, first = tensor.element_size(), int(tensor.storage_offset())
    last = first + sum((int(n) - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return first * size, (last + 1) * size


def _can_be_shared(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one that fills its memory, on a CPU.

    On a GPU the copy would be made on the default stream, unseen by a model that runs on another one.
    """
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.is_inference() or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() > 0
    )


def copy_parameters(
    model: nn.Module, copy_of: Copy = torch.clone, kept: Container[int] = frozenset(), *, valued: bool = True
) -> Tensors:
    """Return leaf copies of the parameters by qualified name; a tied parameter appears once.

    Args:
        model: the model.
        copy_of: makes the copy of a detached tensor.
        kept: ids of those that are taken as they are.
        valued: whether all must have values.

    Raises:
        ModelInputError: if a parameter has no values (lazy modules, the meta device).
    """
    copies: Tensors = {}
    for name, parameter in model.named_parameters():
        if valued:
            check_has_values(name, parameter)
        if id(parameter) in kept:
            copies[name] = parameter
            continue
        values, kind = copy_of(parameter.detach()), type(parameter)
        if kind is nn.Parameter or not issubclass(kind, nn.Parameter):
            copy = nn.Parameter(values, requires_grad=parameter.requires_grad)
        else:  # a class of the user's
            copy = as_class(kind, values, parameter.requires_grad)
        vars(copy).update(vars(parameter))
        if copy.requires_grad:
            for hook in gradient_hooks(parameter):  # which act on the gradient
                copy.register_hook(hook)
        copies[name] = copy
    return copies


def copy_buffers(model: nn.Module, copy_of: Copy = torch.clone, *, valued: bool = True) -> Tensors:
    """Return copies of the buffers by qualified name; a shared buffer appears once."""
    buffers: Tensors = {}
    for name, buffer in model.named_buffers():
        if valued:
            check_has_values(name, buffer)
        buffers[name] = copy_of(buffer.detach())
    return buffers


def loss_prefix(model: nn.Module) -> str:
    """Return a prefix for the names of a loss module's parameters, which no name of the model's has."""
    prefix = "loss_fn."
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    while any(name.startswith(prefix) for name in names):
        prefix = f"_{prefix}"
    return prefix


class Swapped:
    """Some tensors in a model's places, for the length of the context. It is made anew in every step.

    Args:
        places: a module's store of tensors, the key in it, and the qualified name of what is there.
        keyed: dicts and sets with such tensors for keys, or with their ids.
        tensors: by qualified name.
    """

    __slots__ = ("_keyed", "_old", "_placed", "_places", "_tensors")

    def __init__(self, places: Sequence[Place], keyed: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
        self._places, self._keyed, self._tensors = places, keyed, tensors
        self._old: list[tuple[dict[str, Any], str, Tensor]] = []
        self._placed: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        try:
            for store, key, name in self._places:
                if name not in self._tensors:
                    continue
                tensor, was = self._tensors[name], store[key]
                self._old.append((store, key, was))
                store[key] = tensor
                if type(tensor) is Tensor and isinstance(was, nn.Parameter):
                    _copy_as_parameter(tensor, requires_grad=was.requires_grad)
            if self._keyed:
                self._placed = [(tensor, store[key]) for store, key, tensor in self._old]
            for container in self._keyed:
                rekey(container, {id(was): new for was, new in self._placed})
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        for container in self._keyed:
            rekey(container, {id(new): was for was, new in self._placed})
        for store, key, tensor in self._old:
            store[key] = tensor


class Swap:
    """A reusable swap of a model's parameters and buffers, tied names included.

    It does what `torch.func.functional_call` does, with the names resolved once for a whole run, and it
    can be held open while the caller's closures draw a batch, so that a policy rolled out between two
    steps acts with the parameters of that step. Dicts and sets of the model with these tensors for keys, or
    with their ids, follow the swap: `self.importance[p]` finds its entry.

    Args:
        model: whose parameters and buffers are swapped.
        prefix: put before their qualified names.
        known: names that tensors already have, by the tensor's id; they get no prefix.
    """

    def __init__(self, model: nn.Module, prefix: str = "", known: Mapping[int, str] | None = None) -> None:
        self._places: list[Place] = []
        first = dict(known or {})
        for module_name, module in model.named_modules():
            for store in stores(module):
                for key, tensor in store.items():
                    if tensor is not None:
                        qualified = f"{module_name}.{key}" if module_name else key
                        name = first.setdefault(id(tensor), prefix + qualified)
                        self._places.append((store, key, name))
        self._keyed = keyed_by(model, first)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Swapped:
        """Put `tensors` in place for the length of the context; names it lacks stay as they are."""
        return Swapped(self._places, self._keyed, tensors)

    def current(self, names: Mapping[str, Tensor]) -> Tensors:
        """Return the tensors that the model now holds under `names` (it may have replaced a buffer)."""
        found: Tensors = {}
        for store, key, name in self._places if names else ():
            if name in names and name not in found and store.get(key) is not None:
                found[name] = store[key]
        return found


def _copy_as_parameter(tensor: Tensor, *, requires_grad: bool) -> None:
    """Make `deepcopy` of a tensor that stands in for a parameter return a parameter with its values.

    A model may copy its modules while it runs, but a tensor that is part of a graph, as it is under a
    transform, cannot be copied. The copy belongs to the transform as well, so that the model may write to it.
    """
    values = unwrapped(tensor)  # no reference to the tensor itself, which would never be freed
    vars(tensor)["__deepcopy__"] = functools.partial(_as_parameter, values, requires_grad)


def _as_parameter(values: Tensor, requires_grad: bool, memo: Any) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=requires_grad)


@exclusive()
def call(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Tensors]:
    """Call a model as a pure function of its parameters and buffers.

    Args:
        model: the model; it is left as it was, its own buffers included, and so are the random states.
        parameters: tensors by qualified name; missing names keep the model's own.
        buffers: tensors by qualified name; missing names take the model's own. The model works on copies of
            them.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.

    Returns:
        The output, and the buffers after the call.

    >>> import torch
    >>> bn = nn.BatchNorm1d(2)
    >>> out, new = call(bn, dict(bn.named_parameters()), dict(bn.named_buffers()), (torch.ones(4, 2),))
    >>> new["running_mean"], bn.running_mean
    (tensor([0.1000, 0.1000]), tensor([0., 0.]))
    """
    swap = Swap(model)
    working = {name: buffer.clone() for name, buffer in {**dict(model.named_buffers()), **buffers}.items()}
    with preserved(model), swap({**parameters, **working}):
        output = model(*args, **(kwargs or {}))
        return output, swap.current(working)
