"""Claims about a model's training that plain PyTorch can check: the evidence behind every label.

A claim takes a fresh `Setup`, trains it for some steps with its own optimizer, looks with hooks at what
matters, and returns whether it holds and what was seen. Nothing here is shared with gradflow, on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .registry import Setup

Claim = Callable[["Setup"], tuple[bool, str]]


@dataclass
class Step:
    """What one training step showed: the loss, every parameter's gradient, the watched outputs."""

    loss: float
    grads: dict[str, Tensor | None]
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def norm(self, prefix: str) -> float:
        """Return the norm of all parameter gradients under a prefix; zero where there is none."""
        parts = [g.double().norm() for n, g in self.grads.items() if under(n, prefix) and g is not None]
        return float(torch.stack(parts).norm()) if parts else 0.0


def under(name: str, prefix: str) -> bool:
    """Whether a name is the prefix or below it."""
    return prefix == "*" or name == prefix or name.startswith(prefix + ".")


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((t for t in map(first_tensor, parts) if t is not None), None)


def training(setup: Setup, steps: int, watch: tuple[str, ...] = ()) -> Iterator[Step]:
    """Train for some steps, and yield what each one showed before the optimizer used it."""
    optimizer = setup.optimizer()
    modules = dict(setup.model.named_modules())
    for _ in range(steps):
        seen: dict[str, Tensor] = {}
        handles = [modules[name].register_forward_hook(_keeper(name, seen)) for name in watch]
        optimizer.zero_grad()
        loss = loss_of(setup)
        for handle in handles:
            handle.remove()
        for output in seen.values():
            if output.requires_grad:
                output.retain_grad()
        if loss.requires_grad:
            loss.backward()
        grads = {n: p.grad for n, p in setup.model.named_parameters() if p.requires_grad}
        yield Step(loss.item(), grads, seen)
        optimizer.step()


def loss_of(setup: Setup) -> Tensor:
    """Return the loss of the next batch."""
    batch = setup.make_batch()
    model = setup.model
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    return setup.loss_fn(output)


def _keeper(name: str, seen: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            seen[name] = tensor

    return keep


def _last(setup: Setup, steps: int, watch: tuple[str, ...] = ()) -> Step:
    *_, last = training(setup, steps, watch)
    return last


def _rms(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.double().square().mean().sqrt())


# ------------------------------------------------------------------------------------- the claims


def no_gradient(*prefixes: str, after: int = 8) -> Claim:
    """Under each prefix all gradients are absent or exactly zero, still after some steps of the optimizer."""

    def claim(setup: Setup) -> tuple[bool, str]:
        last = _last(setup, after + 1)
        norms = {prefix: last.norm(prefix) for prefix in prefixes}
        return all(norm == 0 for norm in norms.values()), _told("gradient norm", norms)

    return claim


def zero_at_first(*prefixes: str) -> Claim:
    """Under each prefix all gradients are exactly zero, or absent, in the first step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        step = _last(setup, 1)
        norms = {prefix: step.norm(prefix) for prefix in prefixes}
        return all(norm == 0 for norm in norms.values()), _told("gradient norm at first", norms)

    return claim


def not_finite(steps: int = 12, *, loss: bool | None = None) -> Claim:
    """Some gradient or the loss is NaN or infinite within some steps; `loss` says whether the loss is."""

    def claim(setup: Setup) -> tuple[bool, str]:
        for number, step in enumerate(training(setup, steps)):
            bad = [n for n, g in step.grads.items() if g is not None and not bool(g.isfinite().all())]
            if bad or not math.isfinite(step.loss):
                holds = loss is None or loss != math.isfinite(step.loss)
                return holds, f"step {number}: loss {step.loss:.3g}, {len(bad)} gradients not finite"
        return False, f"all finite in {steps} steps"

    return claim


def fading(early: str, late: str, below: float, *, steps: int = 3) -> Claim:
    """The gradient of an early layer's output is below a part of a late layer's, element by element."""

    def claim(setup: Setup) -> tuple[bool, str]:
        ratio = _output_ratio(setup, early, late, steps)
        return ratio < below, f"output gradient {early} / {late} = {ratio:.2g}"

    return claim


def growing(early: str, late: str, above: float, *, steps: int = 1) -> Claim:
    """The gradient of an early layer's output is above a multiple of a late layer's."""

    def claim(setup: Setup) -> tuple[bool, str]:
        ratio = _output_ratio(setup, early, late, steps)
        return ratio > above, f"output gradient {early} / {late} = {ratio:.2g}"

    return claim


def _output_ratio(setup: Setup, early: str, late: str, steps: int) -> float:
    last = _last(setup, steps, (early, late))
    near, far = _rms(last.outputs[early].grad), _rms(last.outputs[late].grad)
    return near / far if far else math.nan


def fades_in_time(module: str, below: float, *, sound: int = 1) -> Claim:
    """The loss's gradient with respect to a recurrent module's input fades from the last real step to the
    first; `sound` is the number of steps at the start that carry the data."""

    def claim(setup: Setup) -> tuple[bool, str]:
        kept: list[Tensor] = []

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(inputs[0].detach().requires_grad_())
            return (kept[-1], *inputs[1:])

        handle = dict(setup.model.named_modules())[module].register_forward_pre_hook(keep)
        loss_of(setup).backward()
        handle.remove()
        profile = kept[0].grad.double().square().sum((0, 2)).sqrt()  # input is (batch, time, features)
        ratio = float(profile[:sound].max() / profile.max())
        return ratio < below, f"gradient at the first {sound} inputs / largest = {ratio:.2g}"

    return claim


def weak(part: str, whole: str, below: float, *, steps: int = 3) -> Claim:
    """A part's parameter gradient is small against that of another part."""

    def claim(setup: Setup) -> tuple[bool, str]:
        last = _last(setup, steps)
        ratio = last.norm(part) / max(last.norm(whole), 1e-300)
        return ratio < below, f"gradient norm {part} / {whole} = {ratio:.2g}"

    return claim


def strong(part: str, above: float, *, steps: int = 1) -> Claim:
    """A part's gradient norm is above a multiple of its parameters' own norm."""

    def claim(setup: Setup) -> tuple[bool, str]:
        own = math.sqrt(sum(_square(p) for n, p in setup.model.named_parameters() if under(n, part)))
        ratio = _last(setup, steps).norm(part) / max(own, 1e-12)
        return ratio > above, f"gradient norm of {part} / its parameters' = {ratio:.2g}"

    return claim


def tiny(part: str, below: float) -> Claim:
    """A part's gradient norm is small in absolute terms, in the first step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        norm = _last(setup, 1).norm(part)
        return norm < below, f"gradient norm of {part} = {norm:.2g}"

    return claim


def huge(part: str, above: float) -> Claim:
    """A part's gradient norm is large in absolute terms, in the first step."""

    def claim(setup: Setup) -> tuple[bool, str]:
        norm = _last(setup, 1).norm(part)
        return norm > above, f"gradient norm of {part} = {norm:.2g}"

    return claim


def _square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())


_FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda y: (y - 0.5).abs() > 0.49,
    "sigmoid of": lambda x: x.abs() > 4.6,
    "tanh": lambda y: y.abs() > 0.99,
    "tanh of": lambda x: x.abs() > 2.65,
    "softmax": lambda y: y.amax(-1) > 0.99,
    "softmax of": lambda x: x.softmax(-1).amax(-1) > 0.99,
    "clamp": lambda y: y.abs() >= 1.0,
    "one": lambda y: (y.abs() - 1).abs() < 0.1,
}


def flat(module: str, kind: str, share: float, *, steps: int = 3) -> Claim:
    """More than a share of a module's outputs lies where `kind` is flat ("sigmoid of": as its argument)."""

    def claim(setup: Setup) -> tuple[bool, str]:
        output = _last(setup, steps, (module,)).outputs[module].detach().float()
        seen = float(_FLAT[kind](output).float().mean())
        return seen > share, f"{seen:.0%} of {kind} {module} is flat"

    return claim


def silent(module: str, share: float, *, steps: int = 10) -> Claim:
    """More than a share of a module's units is never above zero, in any sample of some batches."""

    def claim(setup: Setup) -> tuple[bool, str]:
        fired = None
        for step in training(setup, steps, (module,)):
            on = step.outputs[module].detach().flatten(2) if step.outputs[module].dim() > 2 else None
            on = step.outputs[module].detach() > 0 if on is None else (on > 0).any(-1)
            fired = on.any(0) if fired is None else fired | on.any(0)
        seen = 1 - float(fired.float().mean()) if fired is not None else 0.0
        return seen > share, f"{seen:.0%} of the units of {module} never fire"

    return claim


def jumps(times: float, *, steps: int = 20) -> Claim:
    """Within some steps the largest gradient norm is a multiple of the median one."""

    def claim(setup: Setup) -> tuple[bool, str]:
        norms = torch.tensor([step.norm("*") for step in training(setup, steps)])
        if not norms.isfinite().all():
            return True, "gradients leave the range of numbers"
        ratio = float(norms.max() / norms.median().clamp_min(1e-30))
        return ratio > times, f"largest gradient / median = {ratio:.2g}"

    return claim


def rises(times: float, *, steps: int = 20) -> Claim:
    """Within some steps the loss rises to a multiple of what it was at first."""

    def claim(setup: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(setup, steps)]
        worst = max(losses[1:]) if all(map(math.isfinite, losses)) else math.inf
        return worst > times * losses[0], f"loss rises from {losses[0]:.2g} to {worst:.2g}"

    return claim


def stuck(above: float, *, steps: int = 120) -> Claim:
    """After some steps of training the loss is still above a value that the repaired model gets below."""

    def claim(setup: Setup) -> tuple[bool, str]:
        losses = [step.loss for step in training(setup, steps)]
        end = sum(losses[-10:]) / 10
        return not end < above, f"loss after {steps} steps = {end:.3g}"

    return claim


def rank_below(module: str, rank: float, *, steps: int = 1) -> Claim:
    """The effective rank of a module's centred outputs, samples by features, is below a number."""

    def claim(setup: Setup) -> tuple[bool, str]:
        output = _last(setup, steps, (module,)).outputs[module].detach().double()
        rows = output.flatten(2).mean(2) if output.dim() == 4 else output.reshape(-1, output.shape[-1])
        values = torch.linalg.svdvals(rows - rows.mean(0)).square()
        weights = values / values.sum().clamp_min(1e-300)
        seen = float(torch.exp(-(weights * weights.clamp_min(1e-300).log()).sum()))
        return seen < rank, f"effective rank of {module} = {seen:.2g}"

    return claim


def alike(module: str, below: float, *, dim: int = 0) -> Claim:
    """What differs along a dimension (samples, nodes, tokens) is a small part of a module's output."""

    def claim(setup: Setup) -> tuple[bool, str]:
        output = _last(setup, 1, (module,)).outputs[module].detach().double()
        share = _rms(output - output.mean(dim, keepdim=True)) / max(_rms(output), 1e-300)
        return share < below, f"what differs in {module} = {share:.2g}"

    return claim


def every(*claims: Claim) -> Claim:
    """All claims hold. Each gets a model of its own, so this takes builders: see `check_labels.py`."""

    def claim(setup: Setup) -> tuple[bool, str]:
        raise TypeError("a joint claim is asked part by part")

    claim.parts = claims  # type: ignore[attr-defined]
    return claim


def asked(claim: Claim, build: Callable[[], Setup]) -> tuple[bool, str]:
    """Return whether a claim holds for what `build` builds, and what was seen."""
    answers = [part(build()) for part in getattr(claim, "parts", (claim,))]
    return all(holds for holds, _ in answers), "; ".join(told for _, told in answers)


def _told(what: str, numbers: Mapping[str, float]) -> str:
    return f"{what}: " + ", ".join(f"{name} {value:.2g}" for name, value in numbers.items())
