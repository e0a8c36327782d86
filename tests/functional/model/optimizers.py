"""Optimizers of the users, each with a state or a way of stepping of its own, and a model to step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS = 6


class Net(nn.Module):
    """Batch norm, dropout, a tied weight, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.b, self.out, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(self.drop(self.bn(self.a(x))))))


def make_net() -> Net:
    torch.manual_seed(1)
    return Net()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(8, 4, generator=generator) for _ in range(STEPS)]


class Lookahead(Optimizer):
    """An optimizer that wraps another: every second step the weights go half way back to a slow copy."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)  # which shares the groups
        self.base, self.count = base, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.count += 1
        if self.count % 2 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    s.lerp_(p, 0.5)
                    p.copy_(s)


class Wrapper:
    """A wrapper that is no `Optimizer` itself, as mixed-precision libraries have."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()


class Sharpness(Optimizer):
    """Takes the gradient at a point that is worse (SAM): it needs a closure, and evaluates the loss twice."""

    def __init__(self, parameters: Any, base: type[Optimizer], **options: Any) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base = base(self.param_groups, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        moves = [p.grad * (0.05 / norm) for p in held]
        for p, move in zip(held, moves, strict=True):
            p.add_(move)
        with torch.enable_grad():
            closure()
        for p, move in zip(held, moves, strict=True):
            p.sub_(move)
        self.base.step()


class Bare(Optimizer):
    """A wrapper that never calls `Optimizer.__init__` and borrows the attributes of the one inside."""

    def __init__(self, base: Optimizer) -> None:
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, {}

    def zero_grad(self, set_to_none: bool = True) -> None:  # that of `Optimizer` changes the class
        self.base.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


class Perturbing(Optimizer):
    """SAM as it is published: the closure is an option, and is called where the weights have been moved."""

    def __init__(self, parameters: Any, base: Optimizer, *, by_data: bool) -> None:
        super().__init__(parameters, {})
        self.base, self.by_data, self.moves = base, by_data, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None
        closure = torch.enable_grad()(closure)
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for sign in (1.0, -1.0):
            for p in held:
                self.moves.setdefault(p, 0.05 * p.grad)
                (p.data if self.by_data else p).add_(self.moves[p], alpha=sign)
            if sign > 0:
                self.zero_grad()
                closure()
        self.moves.clear()
        self.base.step()


class Quantised(Optimizer):
    """Keeps its momentum in integers and its scales in a list, beside what cannot be copied."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.lock, self.generator = threading.Lock(), torch.Generator().manual_seed(1)
        self.rounded = torch.round  # a function
        self.scales = [torch.full((), 0.01)] * 2
        self.noted: Any = None
        self.slotted = Slotted(self.param_groups)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        with self.lock:
            for p in self.slotted.groups[0]["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault("momentum", torch.zeros(p.shape, dtype=torch.int8))
                    noise = torch.rand(p.shape, generator=self.generator) - 0.5
                    wanted = kept * self.scales[0] * 0.9 + p.grad
                    kept.copy_(self.rounded(wanted / self.scales[0] + noise).clamp(-127, 127))
                    p.sub_(kept * self.scales[1], alpha=0.05)


class Slotted:
    """Refers to the groups of an optimizer from a slot."""

    __slots__ = ("groups",)

    def __init__(self, groups: Any) -> None:
        self.groups = groups


class Averaging(Optimizer):
    """Holds the model, which keeps what it computes, and draws its weights towards their average."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        self.model, self.names = model, dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.kept = model.out(torch.ones(1, 4))  # with a graph, so it has no deep copy
        self.then = self.shrink

    def shrink(self) -> None:
        for name, p in self.model.named_parameters():
            self.average[name].lerp_(p, 0.5)
            self.names[name].lerp_(self.average[name], 0.5)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)
        self.then()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    return [{"params": others, "lr": 0.05}, {"params": biases, "lr": 0.5, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.05),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.05, amsgrad=True, foreach=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.3),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True),
    "maximizing": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True),
    "tensor rate": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.05), capturable=False),
    "groups": lambda m: torch.optim.AdamW(groups(m), weight_decay=0.2),
    "some": lambda m: torch.optim.SGD(m.out.parameters(), lr=0.1),
    "wrapping": lambda m: Lookahead(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, fused=True),
    "bare": lambda m: Bare(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)),
    "bare twice": lambda m: Bare(Bare(torch.optim.Adam(m.parameters(), lr=0.05))),
    "quantised": lambda m: Quantised(m.parameters()),
    "averaging": Averaging,
    "wrapped": lambda m: Wrapper(torch.optim.Adam(m.parameters(), lr=0.05)),
}
if hasattr(torch.optim, "Muon"):  # since 2.9
    OPTIMIZERS["muon"] = lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.05)
