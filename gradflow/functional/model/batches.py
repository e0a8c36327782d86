"""What the user may pass as batches, as a batch and as a loss, made into plain calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gradflow.errors import EmptyBatchesError, LossError, ModelInputError
from gradflow.functional.model.supported import check_not_wrapped
from gradflow.functional.model.trees import private_copy, same_device, shapes
from gradflow.functional.model.undo import GeneratorStates
from gradflow.functional.torch_private import without_workers

_SHOW = (
    "Pass a function that returns the next batch (`lambda: next(it)`), a DataLoader, or a list of batches."
)


class Source:
    """Draws one batch at a time, never ahead; `None` when there are no more.

    The iterator is made with the first batch, inside the run, since making one draws torch's random numbers:
    a DataLoader seeds its workers and its sampler by them. A loader's own generators are put back by `close`.
    """

    def __init__(self, batches: Any) -> None:
        if isinstance(batches, (Tensor, Mapping)):
            raise ModelInputError(
                f"batches is one {type(batches).__name__}, which looks like a single batch. "
                f"Wrap it in a list to use it once, or in a function to use it at every step. {_SHOW}"
            )
        if isinstance(batches, tuple) and any(isinstance(item, Tensor) for item in batches):
            raise ModelInputError(
                f"batches is a tuple of tensors ({shapes(batches)}), which looks like a single batch. "
                f"Wrap it: `[batch]`, or `lambda: batch` for every step. {_SHOW}"
            )
        iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        if isinstance(batches, type) and iterable:
            raise ModelInputError(f"batches is the class {batches.__name__}, not an instance of it. {_SHOW}")
        if not (iterable or callable(batches)):
            raise ModelInputError(f"batches is a {type(batches).__name__}. {_SHOW}")
        self.length = _length(batches) if iterable else None
        self._batches: Any = batches
        self._call: Callable[[], Any] | None = None if iterable else self._batches
        self._iterator: Iterator[Any] | None = None
        self._generators = GeneratorStates(_with_generators(batches))

    def draw(self) -> Any:
        """Return the next batch, or None at the end."""
        if self._call is None and self._iterator is None:
            self._iterator = _fresh_iterator(self._batches)
        try:
            batch = self._call() if self._call is not None else next(self._iterator)  # type: ignore[arg-type]
        except StopIteration:
            return None
        if batch is None:
            raise ModelInputError(f"the batch drawn is None. {_SHOW}")
        if self._call is not None and isinstance(batch, Iterator):
            raise ModelInputError(
                "the function given as batches returned an iterator, not a batch. "
                "Pass the iterator itself: `batches=make_batches()`."
            )
        return batch

    def close(self) -> None:
        """Let go of the iterator, and put back the loader's own generators."""
        self._iterator = None
        self._generators.restore()


def _fresh_iterator(batches: Any) -> Iterator[Any]:
    """Return an iterator with new workers: persistent ones have already drawn random numbers."""
    if isinstance(batches, DataLoader) and batches.persistent_workers:
        return iter(without_workers(batches))
    return iter(batches)


def _with_generators(batches: Any) -> Iterator[Any]:
    """Yield what may hold generators: a loader, its samplers, its data set; nothing for an iterator."""
    if isinstance(batches, Iterator) or not hasattr(batches, "__iter__"):
        return
    yield batches
    for name in ("sampler", "batch_sampler", "dataset"):
        part = getattr(batches, name, None)
        yield from (part, getattr(part, "sampler", None))


def _length(batches: Any) -> int | None:
    """Return how many batches there are; None where that is not known before they are drawn."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):
        return None


def no_batches(source: object) -> EmptyBatchesError:
    """Return the error for a source that gave nothing."""
    return EmptyBatchesError(
        f"batches ({type(source).__name__}) gave no batch at all. An iterator may have been used up "
        "before: pass the list or the DataLoader itself, or a function that returns the next batch."
    )


@attrs.frozen
class Objective:
    """How a batch becomes a loss.

    Args:
        loss_fn: the user's loss, or None for the model's own.
        takes_target: whether a batch is (inputs, target) and the loss takes (output, target).
    """

    loss_fn: Callable[..., Any] | None
    takes_target: bool

    def inputs(self, batch: Any) -> Any:
        """Return the model's part of a batch.

        Raises:
            ModelInputError: if the loss needs a target and the batch is not (inputs, target).
        """
        if not self.takes_target:
            return batch
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0]
        kind = (
            f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        )
        raise ModelInputError(
            f"the loss takes (output, target), so a batch must be a pair (inputs, target); got a {kind}: "
            f"{shapes(batch)}. Regroup it, `((x1, x2), y)`, or pass a loss of one argument that finds its "
            "target itself: `loss_fn=lambda output: F.cross_entropy(output, y)`."
        )

    def loss(self, output: Any, batch: Any) -> Any:
        """Return the loss of an output."""
        if self.loss_fn is None:
            return own_loss(output)
        return self.loss_fn(output, batch[1]) if self.takes_target else self.loss_fn(output)


def make_objective(loss_fn: Any) -> Objective:
    """Return the objective for a loss of one argument (output), of two (output, target), or None.

    Raises:
        ModelInputError: if the loss is not callable or its number of arguments is neither.
    """
    if loss_fn is None:
        return Objective(None, takes_target=False)
    if not callable(loss_fn):
        raise ModelInputError(
            f"loss_fn is a {type(loss_fn).__name__}, which cannot be called. Pass the function, not its "
            "value: `nn.CrossEntropyLoss()`, `F.mse_loss`, or `lambda output: ...`."
        )
    if isinstance(loss_fn, type):
        raise ModelInputError(
            f"loss_fn is the class {loss_fn.__name__}, not an instance of it. Call it first: "
            f"`loss_fn={loss_fn.__name__}()`."
        )
    number = _num_required(loss_fn)
    if number in (1, 2):
        return Objective(loss_fn, takes_target=number == 2)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    raise ModelInputError(
        f"cannot tell how to call the loss {name}: it must take one argument (the output) or two (the output "
        f"and the target), and this one {f'takes {number}' if number is not None else 'has no signature'}. "
        "Wrap it: `loss_fn=lambda output: my_loss(output[0], output[1], extra)`."
    )


def _num_required(function: Any) -> int | None:
    """Return how many positional arguments a call needs; None where it cannot be seen."""
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if required == 0:  # `def loss(output=None)`, `lambda *a`: one argument fits, if any does
        return 1 if positional or any(p.kind is p.VAR_POSITIONAL for p in parameters) else 0
    return required


def own_loss(output: Any) -> Tensor:
    """Return the loss that a model computed itself.

    Raises:
        LossError: if the output is no scalar and holds none under `loss`.
    """
    if isinstance(output, Tensor) and output.numel() == 1:
        return output
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].numel() == 1:
        return output[0]
    raise LossError(
        "loss_fn=None means that the model computes its own loss, but its output holds none: "
        f"{type(output).__name__} with {shapes(output)}. Pass the labels in the batch so that the model "
        "returns a loss, or pass a loss: `loss_fn=nn.CrossEntropyLoss()` with (inputs, target) batches."
    )


def invoke(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model: `model(x)` for a tensor, `model(*x)` for a tuple, `model(**x)` for a mapping."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not _is_single(inputs):
        return model(*inputs)
    return model(inputs)


def _is_single(inputs: Any) -> bool:
    """Whether a tuple is one value, such as a packed sequence."""
    return isinstance(inputs, nn.utils.rnn.PackedSequence)


def prepared(batch: Any, device: torch.device | None) -> Any:
    """Return the batch on `device`; its tensors, but for those that require a gradient, are copied."""

    def place(tensor: Tensor) -> Tensor:
        check_not_wrapped("a tensor of the batch", tensor)
        if tensor.requires_grad:
            return tensor
        if device is not None and tensor.device != device:
            return tensor.to(device)
        return tensor.clone()

    return private_copy(place, batch)


def private_batch(model: nn.Module, batch: Any) -> Any:
    """Return the batch on the model's device, detached and copied.

    Raises:
        ModelInputError: if a tensor of it belongs to a transform of `torch.func`.
    """
    with torch.inference_mode(False):
        return private_copy(Tensor.detach, prepared(batch, same_device(model)))


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call the model on a copy of the batch; what it raises gets a note with the batch's shapes."""
    try:
        return invoke(model, private_copy(Tensor.clone, batch))
    except Exception as error:
        error.add_note(
            f"gradflow: raised by the model on a batch that holds {shapes(batch)}. The batch is what the "
            "model takes, `model(x)`, `model(*x)` or `model(**x)`: leave the target out."
        )
        raise


def checked_loss(loss: Any) -> Tensor:
    """Return the loss as a scalar tensor.

    Raises:
        LossError: if it is not a tensor with one floating-point element.
    """
    if not isinstance(loss, Tensor):
        raise LossError(
            f"the loss is a {type(loss).__name__}, not a tensor. Return the tensor itself: no `.item()`, "
            "no `float(...)`, no NumPy."
        )
    if loss.numel() != 1:
        raise LossError(
            f"the loss has shape {tuple(loss.shape)}, not one number. Reduce it: `.mean()` or `.sum()`, or "
            'drop `reduction="none"`.'
        )
    if not loss.dtype.is_floating_point:
        raise LossError(f"the loss has dtype {loss.dtype}; a gradient needs a floating-point loss.")
    return loss.reshape(()) if loss.dim() else loss


def detached_loss() -> LossError:
    """Return the error for a loss that no gradient can flow from."""
    return LossError(
        "the loss carries no gradient: no operation joins it to a parameter that requires one. Likely "
        "causes: `.detach()`, `.data`, `.item()` or NumPy between model and loss; `torch.no_grad()` around "
        "the call; `argmax`, `round` or a comparison as the last step; a loss of targets only."
    )
