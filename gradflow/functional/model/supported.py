"""Which models are refused before they run, and notes on what of the others is not measured or put back."""

from __future__ import annotations

import gc
import io
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradflow.errors import LossError, ModelInputError
from gradflow.functional.model.layers import is_scripted
from gradflow.functional.model.optimizers import runs_hooks
from gradflow.functional.model.undo import python_module
from gradflow.functional.processes.shards import is_distributed
from gradflow.functional.torch_private import (
    communication_hooks,
    has_post_accumulate_hooks,
    is_wrapped,
)


def check_supported(model: nn.Module, *, spread: bool = False) -> None:
    """Raise if a model is of a kind whose gradients cannot be measured.

    Args:
        model: the model.
        spread: whether its parameters may be spread over processes.

    Raises:
        ModelInputError: if parts of it are sharded over processes, quantised, spread over devices by
            `nn.DataParallel` or split for a pipeline, or if a transform of `torch.func` has put its own
            tensors into it.
    """
    for name, module in model.named_modules():
        place = f"{name or '(model)'!r} is a {type(module).__name__}"
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise ModelInputError(
                f"{place} over {len(module.device_ids)} devices, whose copies of the layers cannot be "
                "followed. Pass the module inside, on one device: `model.module`."
            )
        if "Pipe" in _pipelining(type(module)):
            raise ModelInputError(
                f"{place}, split into stages that no gradient passes between when it is called. {_UNSPLIT}"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ModelInputError(f"{place}: {_SHARDED}")
        if ".quantized" in python_module(type(module)):
            raise ModelInputError(f"{place}: {_QUANTISED}")
    for name, tensor in _tensors(model):
        check_not_wrapped(repr(name), tensor)
        if is_distributed(tensor) and not spread:
            raise ModelInputError(f"{name!r} is a DTensor: {_SPREAD}")
        if tensor.is_quantized:
            raise ModelInputError(f"{name!r} has dtype {tensor.dtype}: {_QUANTISED}")


def check_not_wrapped(what: str, tensor: Tensor) -> None:
    """Raise if a tensor belongs to a transform of `torch.func` that the analysis is called in.

    Raises:
        ModelInputError: if it does.
    """
    if is_wrapped(tensor):
        raise ModelInputError(
            f"{what} belongs to a transform of torch.func (`grad`, `vmap`, ...) that the analysis is called "
            "in. A record holds plain numbers, which no transform follows: analyse outside of it."
        )


def check_module(model: Any) -> None:
    """Raise unless `model` is a module.

    Raises:
        ModelInputError: if it is not.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        if hasattr(model, "submod") and _pipelining(type(model)):
            raise ModelInputError(
                f"model is a {kind}, one of the parts of a model that run one behind the other. {_STAGED}"
            )
        if _pipelining(type(model)):
            raise ModelInputError(
                f"model is a {kind}, which calls stages and runs their backward passes itself. {_STAGED}"
            )
        raise ModelInputError(
            f"model is a {type(model).__name__}, not a torch.nn.Module. Pass the module itself, built: "
            "`MyModel()`, not the class; for a function of modules, wrap them in one."
        )


def check_plain(tensors: Iterable[Tensor]) -> None:
    """Raise if a tensor belongs to a transform of `torch.func`.

    Raises:
        ModelInputError: if one does.
    """
    if any(map(is_wrapped, tensors)):
        raise ModelInputError(
            "a tensor that was passed, or that the model or a function holds, belongs to a transform of "
            "`torch.func` around this call (grad, vjp, jvp, vmap), which cannot go through it: call it "
            "outside of the transform, or transform the layer itself, as in "
            "`torch.func.jvp(layer_function(model, layer, batch), (x,), (v,))`."
        )


def check_model(model: Any) -> None:
    """Raise unless `model` is a module whose tensors have values.

    Raises:
        ModelInputError: if it is no module, is lazy or is on the meta device.
    """
    check_module(model)
    check_supported(model)
    for name, parameter in model.named_parameters():
        check_has_values(name, parameter)


def check_has_values(name: str, tensor: Tensor) -> None:
    """Raise if a parameter or buffer has no values yet (lazy modules, the meta device)."""
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise ModelInputError(
            f"{name!r} belongs to a lazy module that has not seen a batch yet, so it has no shape. "
            "Run the model once on a batch before it is analysed: `model(x)`."
        )
    if tensor.is_meta:
        raise ModelInputError(
            f"{name!r} is on the meta device and has no values. Materialise the model first: "
            "`model.to_empty(device=...)` and then its initialisation. Its graph can be had without values: "
            "`gradflow.outline(model, batch, loss_fn)`."
        )


def check_stage_loss(model: nn.Module) -> None:
    """Raise if the model is a stage of a pipeline, and not the last; for losses that sum its output plainly.

    Raises:
        LossError: if it is.
    """
    for index, number in _stages(model):
        raise LossError(
            f"the loss is the plain sum or mean of what the model hands on, and the model is stage {index} "
            f"(from 0) of the {number} of a pipeline, so nothing would be told of its training. {_UNSPLIT} "
            "Or weigh the output by the gradient that the next stage sends back: "
            "`loss_fn=lambda output: (output * gradient).sum()`."
        )


_SHARDED = (
    "its values are sharded over processes in a form that PyTorch gives up, in which parameters are slices "
    "of one long vector. Shard it with `torch.distributed.fsdp.fully_shard`, or pass the model as it was "
    "before it was sharded, with a batch that one process can hold."
)
_SPREAD = (
    "its values are sharded over processes. `analyze` and `diagnose` take such models, when they are called "
    "on every process; what was called here does not. Pass the model as it was before it was sharded "
    "(`fully_shard`, tensor parallelism), with a batch that one process can hold."
)
_UNSPLIT = (
    "Pass the whole model, as it was before it was split into stages, with the loss of its training and a "
    "batch that one process can hold."
)
_STAGED = (
    "`analyze`, `diagnose` and the monitor take it, called on the process of every stage; what was called "
    "here does not. "
    f"{_UNSPLIT}"
)
_PIPELINING = "torch.distributed.pipelining"
_QUANTISED = (
    "quantised layers carry no gradient, so there is no flow to measure. Pass the model as it was before it "
    "was quantised."
)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def distributed(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the parts of a model that exchange gradients with other processes."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def standing_notes(
    model: nn.Module, optimizers: Iterable[Any], *, alone: bool = True, staged: bool = False
) -> Iterator[str]:
    """Yield what a reader must know of what is not run, not seen or not put back.

    Args:
        model: the model.
        optimizers: those that were given.
        alone: whether the analysis is of this process alone.
        staged: whether it is of all stages of a pipeline, of which the model is one.
    """
    modules, exchanging = dict(model.named_modules()), distributed(model)
    scripted = [name for name, module in modules.items() if is_scripted(module)]
    inside = {n for n in scripted for m in scripted if n != m and n.startswith(f"{m}." if m else "")}
    if outermost := [name for name in scripted if name not in inside]:
        yield (
            f"TorchScript shows nothing of its inside: {_names(outermost)} is taken for one layer. Analyse "
            "the module that it was made from to see the layers in it."
        )
    for index, number in () if staged else _stages(model):
        yield (
            f"The model is stage {index} (from 0) of the {number} of a pipeline, and its output is for the "
            "next. The loss given stands for that of training only if it hands the output the gradient which "
            "the next stage sends back, as `lambda output: (output * gradient).sum()` does. With any other, "
            "no verdict here is on training."
        )
    if exchanging and alone:
        yield "Gradients are those of this process alone: an analysis exchanges nothing with the others."
    if any(map(communication_hooks, exchanging)):
        yield (
            "A communication hook of DistributedDataParallel is not run: gradients are averaged as they are, "
            "without what it does to them (compression, a power iteration)."
        )
    if hooked := [name for name, p in model.named_parameters() if has_post_accumulate_hooks(p)]:
        yield (
            f"The hooks on {_names(hooked)} that run after a gradient was accumulated are not run: gradients "
            "are as such a hook is handed them."
        )
    for optimizer in itertools.filterfalse(runs_hooks, optimizers):
        yield (
            f"The step hooks of the {type(optimizer).__name__} are not run, since they may act on the model "
            "itself: the steps after the first are those of training without them."
        )
    attributes = ((n, k, v) for n, module in modules.items() for k, v in vars(module).items())
    if iterators := [f"{n}.{k}" if n else k for n, k, v in attributes if _spent(v)]:
        yield f"{_names(iterators)} is an iterator, which cannot be put back: it may be further on."


def _pipelining(kind: type) -> list[str]:
    """Return the names of the classes of `torch.distributed.pipelining` that a class is derived from."""
    return [c.__name__ for c in kind.__mro__ if python_module(c).startswith(_PIPELINING)]


def _stages(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield (index, number of stages) of the stages that the model is, the last of a pipeline excepted.

    A stage knows its module and not the other way round, so stages are looked for among all that refer to
    their classes; that takes a second where millions of objects live, and nothing where no stage can be.
    """
    public = getattr(sys.modules.get(f"{_PIPELINING}.stage"), "PipelineStage", None)
    if public is None or not dist.is_available() or not dist.is_initialized():
        return  # a stage cannot be made outside a process group
    kinds = [kind for kind in public.__mro__ if python_module(kind).startswith(_PIPELINING)]
    for kind in kinds:  # grows while it is walked
        kinds += [derived for derived in kind.__subclasses__() if derived not in kinds]
    for thing in gc.get_referrers(*kinds):
        if not isinstance(thing, tuple(kinds)) or not isinstance(thing.submod, nn.Module):
            continue
        module = thing.submod
        if (module is model or getattr(module, "module", None) is model) and not thing.is_last:
            yield thing.stage_index, thing.num_stages


def _spent(value: object) -> bool:
    if not hasattr(type(value), "__next__"):  # nearly all: `Iterator` asks the same, by a longer way
        return False
    return isinstance(value, Iterator) and not isinstance(value, (nn.Module, io.IOBase))


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name or "(model)") for name in names[:3])
    return shown + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
