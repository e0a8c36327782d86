"""Small models for the tests of Jacobians, a slow Jacobian, and a fingerprint of all that stays as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Self-attention between two linear layers."""

    def __init__(self, *, batch_first: bool = True, need_weights: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.outer = nn.Linear(4, 2)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.outer(self.attention(x, x, x, need_weights=self.need_weights)[0])


class Recurrent(nn.Module):
    """A recurrent layer, its first output alone used."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.layer = kind(3, 4, **options)
        self.head = nn.Linear(4 * (1 + self.layer.bidirectional), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Residual(nn.Module):
    """A skip around one layer, and an activation that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5) for _ in range(3))
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        return self.third(h + self.act(self.second(h)))


class Stateful(nn.Module):
    """Counts its calls, keeps an activation, draws at random, normalises and writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)
        self.calls, self.kept = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.act(self.drop(self.norm(self.linear(x))))
        self.kept.append(h)
        self.last = h
        return self.head(h + 0.1 * torch.rand_like(h) + random.random() + np.random.rand())


class Memory(nn.Module):
    """A gate that depends on what was left on it before it is called."""

    class Gate(nn.Module):
        """Multiplies by a memory."""

        memory: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            return x if self.memory is None else x * self.memory

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(3, 3), self.Gate()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        self.gate.memory = h.sigmoid()
        return self.gate(h)


class Store:
    """A cache that grows with every call."""

    def __init__(self) -> None:
        self.items: list[Tensor] = []


class Cached(nn.Module):
    """A layer that is handed a cache and appends to it."""

    class Layer(nn.Module):
        """Adds all it has seen."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor, store: Store) -> Tensor:
            store.items.append(self.linear(x))
            return sum(store.items, torch.zeros(()))

    def __init__(self) -> None:
        super().__init__()
        self.one = self.Layer()

    def forward(self, x: Tensor) -> Tensor:
        store = Store()
        return self.one(self.one(x, store), store)


class OldSquare(torch.autograd.Function):
    """An autograd Function of the old style, which torch.func rejects."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class NewSquare(torch.autograd.Function):
    """An autograd Function of the new style without a `jvp`."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Squared(nn.Module):
    """x² by a custom Function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.linear(x))


class Checkpointed(nn.Module):
    """A block under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False)


def fingerprint(model: nn.Module) -> list[Any]:
    """Return all that a pure call must leave as it was, comparable by ==."""

    def held(value: Any) -> Any:
        if isinstance(value, Tensor):
            grad = held(value.grad) if value.is_leaf else None
            return (id(value), value.detach().double().numpy().tobytes(), value.requires_grad, grad)
        if isinstance(value, (list, tuple)):
            return (id(value), [held(item) for item in value])
        if isinstance(value, dict):
            return {key: held(item) for key, item in value.items() if not callable(item)}
        return value if isinstance(value, (int, float, str, bool)) else id(value)

    numpy_state: Any = np.random.get_state()
    return [
        {name: held(vars(module)) for name, module in model.named_modules()},
        torch.get_rng_state().numpy().tobytes(),
        (numpy_state[1].tobytes(), numpy_state[2]),
        random.getstate(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    ]


def naive(model: nn.Module, layer: str, batch: Any, *, call: int = 0) -> tuple[Tensor, Tensor]:
    """Return the input of a layer, and its Jacobian by plain autograd, one output at a time, in the model."""
    caught: list[tuple[Tensor, Tensor]] = []

    def forward_led(x: Tensor, *args: Any, forward: Callable[..., Any], **kwargs: Any) -> Any:
        x = x.detach().requires_grad_()
        args = (x * 1,) * (1 + len(args))  # the same tensor thrice, for self-attention
        output = forward(*args, **kwargs)
        caught.append((x, output[0] if isinstance(output, tuple) else output))
        return output

    module = model.get_submodule(layer)
    forward = module.forward
    module.forward = lambda x, *a, **k: forward_led(x, *a, forward=forward, **k)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        del module.forward
    x, y = caught[call]
    rows = [torch.autograd.grad(y.reshape(-1)[i], x, retain_graph=True)[0] for i in range(y.numel())]
    return x.detach(), torch.stack(rows).reshape(y.numel(), x.numel())
