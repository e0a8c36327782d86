"""The slow way: one plain training step, with hooks and retained gradients."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Naive:
    """What `loss.backward()` leaves behind.

    `outputs` holds, for every call (`name`, `name@1`, ...) of every module that was called, the tensors it
    returned, each with its gradient retained.
    """

    model: nn.Module
    loss: Tensor
    parameters: dict[str, Tensor | None]
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def output_norm(self, name: str) -> float:
        """Return the norm of the gradient of a call's outputs; NaN where none arrived."""
        grads = [wide(t.grad) for t in self.outputs[name] if t.grad is not None]
        return float(torch.cat([g.flatten() for g in grads]).norm()) if grads else float("nan")

    def parameter_norm(self, name: str) -> float:
        """Return the norm of a parameter's gradient; NaN where there is none."""
        grad = self.parameters[name]
        if grad is None:
            return float("nan")
        return float(wide(grad.to_dense() if grad.is_sparse else grad).norm())


def wide(x: Tensor) -> Tensor:
    """Return a tensor in double precision."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def map_nested(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return `value` with `function` applied to the tensors in it, in containers of every kind."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return value._replace(data=function(value.data))
    if isinstance(value, Mapping):  # the `ModelOutput` of Hugging Face, a dataclass, takes names too
        return type(value)(**{k: map_nested(function, v) for k, v in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: map_nested(function, v) for k, v in parts.items()})
    if isinstance(value, (tuple, list)):
        parts = [map_nested(function, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def call_model(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, nn.utils.rnn.PackedSequence):
        return model(batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def naive_step(model: nn.Module, batch: Any, loss_fn: Callable[[Any], Tensor]) -> Naive:
    """Run one step of the model itself, and return what it left.

    Every output is handed on as a copy of itself, so that what is done to it in place does not touch the
    tensor whose gradient is retained.
    """
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    calls: Counter[str] = Counter()
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        names: list[str] = []

        def before(module: nn.Module, args: Any) -> None:
            number = calls[name]
            calls[name] += 1
            names.append(f"{name}@{number}" if number else name)
            inputs[names[-1]] = [a.detach().clone() for a in args if isinstance(a, Tensor)]

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            kept: dict[int, Tensor] = {}
            mine = outputs.setdefault(names.pop(), [])

            def keep(value: Tensor) -> Tensor:
                if not (value.is_floating_point() or value.is_complex()):
                    return value
                if not torch.is_grad_enabled():  # a copy would have no graph
                    mine.append(value.detach())
                    return value
                if id(value) not in kept:
                    watched = value.clone()  # what arrives at it by what was returned, and not otherwise
                    if watched.requires_grad:
                        watched.retain_grad()
                    mine.append(watched)
                    kept[id(value)] = watched.clone()
                return kept[id(value)]

            return map_nested(keep, output)

        handles.extend((module.register_forward_pre_hook(before), module.register_forward_hook(after)))

    for name, module in model.named_modules():
        if "parametrizations" not in name:
            watch(name, module)
    model.zero_grad(set_to_none=True)
    loss = loss_fn(call_model(model, batch))
    loss.backward()
    for handle in handles:
        handle.remove()
    return Naive(model, loss.detach(), {n: p.grad for n, p in model.named_parameters()}, outputs, inputs)
