"""The losses of a batch's samples, each by itself: what gradients of single samples are taken of."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.errors import (
    LossError,
    ModelCallError,
    ModelInputError,
    NoTrainableParametersError,
)
from gradflow.functional.jacobian.jacobian import check_count
from gradflow.functional.model.batches import (
    checked_loss,
    detached_loss,
    invoke,
    make_objective,
    private_batch,
)
from gradflow.functional.model.purity import RandomState, preserved
from gradflow.functional.model.setting import Setting
from gradflow.functional.model.state import Tensors
from gradflow.functional.model.supported import check_model
from gradflow.functional.model.threads import measuring
from gradflow.functional.model.trees import iter_tensors, map_tensors, shapes
from gradflow.functional.torch_private import BatchNorm
from gradflow.records import Floats


@measuring()
def sample_losses(model: nn.Module, batch: Any, loss_fn: Callable[..., Any] | None = None) -> Floats:
    """Return the loss of every sample of a batch, as a batch of one, in eval mode and without gradients.

    Which samples carry a batch's loss: where one batch throws a training off, these are the ones to look at.

    Args:
        model: the model; its modes are put back.
        batch, loss_fn: as for `per_sample_gradients`.

    Returns:
        The losses, shape (samples,).

    Raises:
        ModelInputError: if the model, the batch or the loss cannot be used as such.
        LossError: if the loss of a sample is no scalar.
        NoTrainableParametersError: if no parameter requires a gradient.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> sample_losses(model, x, lambda y: y.square().mean()).tolist()
    [1.0, 9.0]
    """
    program = SampleLosses.of(model, batch, loss_fn, method="loop", seed=None, mode="eval")
    with torch.inference_mode(False), torch.no_grad():
        losses = [
            program.loss(program.trainable, [t[index] for t in program.split])
            for index in range(program.num_samples)
        ]
        return np.array(torch.stack(losses).double().tolist())


@attrs.define(eq=False)
class _Stream:
    """A random state that goes on from call to call, so that every sample draws its own numbers."""

    random: RandomState


@attrs.frozen(eq=False)
class SampleLosses:
    """A model and a loss at a batch, sample by sample.

    Args:
        setting: the model held at one moment.
        split: the batch's tensors that are split, by position among all of them.
        loss: (trainable parameters, the split tensors of one sample) → that sample's loss.
        num_samples: in the batch.
        method: `vmap` or `loop`.
        stream: the random state that the next call starts from.
    """

    setting: Setting
    split: list[Tensor]
    loss: Callable[[Tensors, list[Tensor]], Tensor]
    num_samples: int
    method: str
    stream: _Stream

    @property
    def trainable(self) -> Tensors:
        """The parameters that require a gradient."""
        return self.setting.trainable

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Any,
        loss_fn: Any,
        *,
        method: str,
        seed: int | None,
        mode: str = "keep",
    ) -> SampleLosses:
        """Return the losses of a batch's samples, in the present modes or, all of it, in `eval`."""
        check_model(model)
        if method not in ("vmap", "loop"):
            raise ValueError(f"method must be 'vmap' or 'loop', got {method!r}.")
        objective = make_objective(loss_fn)
        if mode == "keep":
            _check_no_batch_norm(model)
        batch = private_batch(model, batch)
        with contextlib.ExitStack() as stack:
            if mode == "eval":
                stack.enter_context(preserved(model))
                model.eval()
            setting = Setting.of(model, loss_fn, seed=seed, plain_recurrent=False)
        if not setting.trainable:
            raise no_trainable(model)
        tensors = list(iter_tensors(objective.inputs(batch))) + list(iter_tensors(batch))
        number = next((len(t) for t in tensors if t.dim()), 0)
        if not number:
            raise ModelInputError(
                f"the batch holds {shapes(batch)}, and no tensor with samples along its first axis. Pass "
                "tensors with a batch axis, `x.unsqueeze(0)` for one sample."
            )
        split = [t for t in iter_tensors(batch) if _is_split(t, number)]
        stream = _Stream(setting.random)

        def loss(trainable: Tensors, sample: list[Tensor]) -> Tensor:
            given = iter(sample)
            own = map_tensors(
                lambda t: next(given).unsqueeze(0) if _is_split(t, number) else t.clone(), batch
            )
            with setting.evaluating(trainable, random=stream.random):
                found = checked_loss(objective.loss(invoke(model, objective.inputs(own)), own))
                stream.random = RandomState()
            return found

        return cls(setting, split, loss, number, method, stream)

    def gradients(self, chunk_size: int) -> Iterator[Tensors]:
        """Yield gradients by parameter, of a chunk of samples at a time."""
        check_count("chunk_size", chunk_size)
        run = self._vectorised if self.method == "vmap" else self._looped
        self._check_loss()
        for start in range(0, self.num_samples, chunk_size):
            with torch.inference_mode(False), torch.enable_grad():
                found = run([t[start : start + chunk_size] for t in self.split])
            yield {name: gradient.detach() for name, gradient in found.items()}

    def _vectorised(self, chunk: list[Tensor]) -> Tensors:
        gradient = torch.func.vmap(torch.func.grad(self.loss), in_dims=(None, 0), randomness="different")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return gradient(self.trainable, chunk)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise ModelCallError(
                f"per_sample_gradients: vmap rejects {type(self.setting.module).__name__}: {error} The model "
                "runs on one sample alone, so the cause is something that vmap cannot do for all of them at "
                "once: a branch on a tensor's value, `.item()`, an in-place write to a tensor that was not "
                "made from the input, nn.GRU or nn.RNN, a custom autograd Function without `vmap`. Pass "
                "`method='loop'` to run the samples one by one."
            ) from error

    def _looped(self, chunk: list[Tensor]) -> Tensors:
        found: dict[str, list[Tensor]] = {name: [] for name in self.trainable}
        for index in range(len(chunk[0])):
            leaves = {name: p.clone().requires_grad_() for name, p in self.trainable.items()}
            loss = self.loss(leaves, [t[index] for t in chunk])
            gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                found[name].append(gradient)
        return {name: torch.stack(gradients) for name, gradients in found.items()}

    def _check_loss(self) -> None:
        """Run the first sample once: what the user's code raises is raised as it is, with a note."""
        try:
            with torch.inference_mode(False), torch.enable_grad():
                leaves = {name: p.clone().requires_grad_() for name, p in self.trainable.items()}
                loss = self.loss(leaves, [t[0] for t in self.split])
        except (LossError, ModelInputError):
            raise
        except Exception as error:
            error.add_note(
                "gradflow: raised by the model or the loss on one sample of the batch, given as a batch of "
                f"one ({', '.join(str([1, *t.shape[1:]]) for t in self.split)})."
            )
            raise
        if not loss.requires_grad:
            raise detached_loss()


def _is_split(tensor: Tensor, number: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == number


def _check_no_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and (module.training or module.running_mean is None):
            how = "in training" if module.training else "without running statistics"
            raise ModelInputError(
                f"per_sample_gradients: {name!r} ({type(module).__name__}) {how} normalises each sample by "
                "the others of the batch, so no gradient of one sample exists. Measure with `model.eval()`, "
                "which uses the running statistics; or replace it by nn.GroupNorm, which treats each sample "
                "alone."
            )


def no_trainable(model: nn.Module) -> NoTrainableParametersError:
    """Return the error for a model without a parameter that requires a gradient."""
    return NoTrainableParametersError(
        f"no parameter of {type(model).__name__} requires a gradient, so there is none to take. Unfreeze the "
        "part that is meant to train: `model.requires_grad_(True)`."
    )
