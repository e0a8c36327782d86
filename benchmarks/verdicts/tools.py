"""What gradflow, torchmortem and the classic rule of thumb say of a model, in one form.

Each tool gets a fresh model, its batches, its loss and its optimizer, and returns an `Answer`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from zoo import Setup, call

SERIOUS = ("CRITICAL", "HIGH", "MEDIUM")


@dataclass(frozen=True)
class Finding:
    """One verdict: the types that it may be taken for, and the layer it names."""

    types: tuple[str, ...]
    layer: str
    severity: str = ""

    def __str__(self) -> str:
        return f"{self.severity} {'/'.join(self.types)} {self.layer or '(model)'}".strip()


@dataclass(frozen=True)
class Answer:
    """What a tool says: verdicts to act on, and what it would look at first."""

    findings: tuple[Finding, ...]
    cause: Finding | None


def gradflow_answer(setup: Setup, steps: int) -> Answer:
    """Return gradflow's issues of severity MEDIUM and above, and its first cause."""
    import gradflow

    report = gradflow.diagnose(
        setup.model, setup.make_batch, setup.loss_fn, steps=steps, optimizer=setup.optimizer()
    )
    findings = tuple(
        Finding((i.issue_type.value,), i.layer, i.severity.value)
        for i in report.issues
        if i.severity.value in SERIOUS
    )
    cause = next((Finding((c.issue_type.value,), c.layer) for c in report.causes), None)
    return Answer(findings, cause)


# ------------------------------------------------------------------------------------- torchmortem

# Its titles, and the types that each may stand for; where it is not clear, all that come near.
_TITLES = {
    "Vanishing gradients": ("VANISHING",),
    "Exploding gradients": ("EXPLODING",),
    "Gradient stalling": ("DEAD", "VANISHING"),
    "Dead units": ("DEAD",),
    "Activation saturation": ("SATURATION",),
    "Update ratio too low": ("VANISHING", "DEAD"),
    "Update ratio too high": ("UNSTABLE", "EXPLODING"),
    "High gradient noise": ("UNSTABLE",),
    "Weight norm explosion": ("EXPLODING", "UNSTABLE"),
    "Stagnant weight norms": ("VANISHING", "DEAD"),
    "Inter-layer weight norm": ("EXPLODING", "VANISHING"),
    "Training divergence": ("UNSTABLE", "EXPLODING", "NUMERICAL"),
    "Loss plateau": ("VANISHING", "DEAD"),
    "Rank collapse": ("BOTTLENECK",),
}


def torchmortem_answer(setup: Setup, steps: int) -> Answer:
    """Return torchmortem's findings from WARNING on, the first of them as the cause.

    Its findings are of other types than ours: each counts for every type that it comes near, and is spurious
    only where none of them is right.
    """
    from torchmortem import Autopsy

    optimizer = setup.optimizer()
    with Autopsy(setup.model, optimizer=optimizer) as autopsy:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = setup.loss_fn(call(setup.model, setup.make_batch()))
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            autopsy.step(loss=loss.item())
    findings = []
    for finding in autopsy.get_report().findings:
        if finding.severity.name not in ("WARNING", "CRITICAL"):
            continue
        types = next((t for title, t in _TITLES.items() if finding.title.startswith(title)), ("UNSTABLE",))
        layers = finding.affected_layers or [""]
        findings += [Finding(types, layer, finding.severity.name) for layer in layers]
    return Answer(tuple(findings), findings[0] if findings else None)


# ------------------------------------------------------------------------------------ rule of thumb


def rule_answer(setup: Setup, steps: int, *, low: float = 1e-6, high: float = 10.0) -> Answer:
    """Return what a hook on every parameter says with absolute thresholds, over some steps of training.

    A gradient norm below `low` is vanishing, one above `high` exploding, one that is no number a numerical
    fault; so is a loss that is none. What is told first is the cause; in one step, the worst.
    """
    norms: dict[str, float] = {}

    def watch(name: str) -> Callable[[Tensor], None]:
        return lambda grad: norms.update({name: float(grad.norm())})

    handles = [p.register_hook(watch(n)) for n, p in setup.model.named_parameters() if p.requires_grad]
    optimizer, told = setup.optimizer(), {}
    for _ in range(steps):
        norms.clear()
        optimizer.zero_grad()
        loss = setup.loss_fn(call(setup.model, setup.make_batch()))
        if loss.requires_grad:
            loss.backward()
        if not math.isfinite(loss.item()) and all(map(math.isfinite, norms.values())):
            told[Finding(("NUMERICAL",), "")] = True
        told |= dict.fromkeys(_beyond(norms, low, high))
        optimizer.step()
    for handle in handles:
        handle.remove()
    return Answer(tuple(told), next(iter(told), None))


def _beyond(norms: dict[str, float], low: float, high: float) -> Iterator[Finding]:
    """Return a finding for each parameter whose gradient norm is out of bounds, the worst first."""
    layers = {name: name.rpartition(".")[0] for name in norms}
    for name in sorted(norms, key=norms.__getitem__, reverse=True):
        if not math.isfinite(norms[name]):
            yield Finding(("NUMERICAL",), layers[name])
    for name in sorted(norms, key=norms.__getitem__, reverse=True):
        if math.isfinite(norms[name]) and norms[name] > high:
            yield Finding(("EXPLODING",), layers[name])
    for name in sorted(norms, key=norms.__getitem__):
        if norms[name] < low:
            yield Finding(("VANISHING",), layers[name])


Tool = Callable[[Setup, int], Answer]
TOOLS: dict[str, Tool] = {
    "gradflow": gradflow_answer,
    "torchmortem": torchmortem_answer,
    "rule of thumb": rule_answer,
}
_MODULES = {"gradflow": "gradflow", "torchmortem": "torchmortem"}


def why_not(tool: str) -> str:
    """Return why a tool cannot be used here, or nothing if it can."""
    module = _MODULES.get(tool)
    if module is None or importlib.util.find_spec(module):
        return ""
    return f"{tool} is not installed: pip install {module}"


def seeded_answer(tool: str, setup: Setup, steps: int) -> Answer:
    """Return a tool's answer, with the random state that the build left put back for the next one."""
    state = torch.get_rng_state()
    try:
        return TOOLS[tool](setup, steps)
    finally:
        torch.set_rng_state(state)
