"""`policy_heads`: the measurement of policies: what actions are drawn from, and gradients through heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.measurement import Session
from gradflow.functional.model.layers import owner
from gradflow.functional.policy.components import Component, components
from gradflow.functional.policy.gradients import HeadGradients, gradients_of, head_gradients
from gradflow.functional.policy.scene import (
    Heads,
    Scene,
    check_names,
    find_heads,
    inside,
    is_other,
    listed,
)
from gradflow.functional.policy.seen import Seer, distribution_frames
from gradflow.functional.policy.statistics import ActionStatistics, action_statistics, family, is_bounded
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.nodes import nodes_under
from gradflow.functional.tap.recorder import Recorder
from gradflow.records import NAN, ActionDeviation, ActionDistribution, Floats, PolicyRecord

_NUMBERS = ("entropy", "entropy_share", "max_prob", "largest_prob", "deterministic_share", "mixture_share")


def policy_heads(
    *,
    policy_head_name: str | Sequence[str] | None = None,
    value_head_name: str | Sequence[str] | None = None,
    shared_backbone_name: str | Sequence[str] | None = None,
) -> PolicyHeads:
    """Return the measurement of a policy, for `analyze(..., measurements=[policy_heads()])`.

    It fills `FlowRecord.policy`: the action distributions with their entropies, and the gradients through the
    policy's heads and through the value's. See NOTE [How heads are found] in `scene.py`, NOTE [What a head
    gives] in `components.py` and NOTE [Gradients through heads] in `gradients.py`.

    Args:
        policy_head_name: qualified name of the module that gives the policy, or several; found if None.
        value_head_name: of the module that gives the value, or several; found if None.
        shared_backbone_name: of the module whose parameters both share, or several; if None, they are the
            parameters that both heads are seen to be computed from.

    >>> from gradflow.functional.analyze import analyze
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Linear(4, 2)
    >>> record = analyze(
    ...     net, [torch.randn(8, 4)], lambda y: -y.log_softmax(-1)[:, 0].mean(), measurements=[policy_heads()]
    ... )
    >>> record.policy.distributions[0].given, 0 < float(record.policy.entropy[0]) <= math.log(2)
    ('logits', True)
    """
    return PolicyHeads(_tuple(policy_head_name), _tuple(value_head_name), _tuple(shared_backbone_name))


def _tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


@attrs.frozen
class PolicyHeads:
    """The measurement that `policy_heads` returns."""

    policy: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    backbone: tuple[str, ...] = ()

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> PolicySession:
        """Return the session of one run.

        Raises:
            UnknownLayerError: if the model has no module of a name that was given.
        """
        for names in (self.policy, self.value, self.backbone):
            check_names(names, modules)
        return PolicySession(self, model, modules)


@attrs.define(eq=False)
class _Step:
    """The numbers of one measured step."""

    number: int
    distributions: dict[Any, tuple[Component, list[ActionStatistics]]]
    policy_reached: bool = False
    value_reached: bool = False
    differentiable: bool = False
    norms: dict[str, float] = attrs.field(factory=dict)
    shared: tuple[str, ...] = ()


class PolicySession(Session):
    """Listens to one run for its policy."""

    def __init__(self, asked: PolicyHeads, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self._asked, self._model, self._modules = asked, model, modules
        self._heads: Heads | None = None
        self._said: dict[str, None] = {}
        self._steps: list[_Step] = []
        self._number, self._scene, self._seer = 0, None, Seer()
        self._current: _Step | None = None

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start a measured step."""
        self._number, self._scene, self._seer, self._current = step, Scene(recorder), Seer(), None

    def left(self, call: Call, output: Any) -> None:
        """Keep what a call gave."""
        if self._scene is not None:
            self._scene.add(call, output)
            self._seer.add(output)

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Note what a function call tells of a policy."""
        self._seer.hear(func, args, kwargs, distribution_frames())
        return None

    def differentiate(self, loss: Tensor) -> None:
        """Find the heads, look at what is made of them, and take the gradients through them."""
        scene, seer = self._scene, self._seer
        if scene is None:
            return
        with torch.no_grad():
            if self._heads is None or not (self._heads.policy or self._heads.value):
                asked = self._asked
                self._heads = find_heads(scene, seer, loss, policy=asked.policy, value=asked.value)
            if scene.lacks((*self._heads.policy, *self._heads.value)):
                self._say(
                    f"Nothing was measured of the heads in step {self._number}: their outputs were large, "
                    "and let go before it was known what they are."
                )
                return
            parameters = dict(self._model.named_parameters())
            found: dict[Any, tuple[Component, list[ActionStatistics]]] = {}
            made = components(scene, seer, self._heads.policy, parameters) if self._heads.policy else []
            for component in made:
                numbers = self._statistics(component)
                if numbers is not None:
                    found.setdefault(component.key, (component, []))[1].append(numbers)
            self._current = _Step(self._number, found)
            self._take_gradients(loss, parameters, [leaf for c in made for leaf in c.parameters])

    def _statistics(self, component: Component) -> ActionStatistics | None:
        """Return a distribution in numbers; None where its own code, which may be the user's, fails."""
        try:
            return action_statistics(component.distribution, part_dims=component.part_dims)
        except Exception as error:
            what = f"{family(component.distribution)} of {listed(component.heads)}"
            self._say(f"The numbers of the {what} could not be had: {type(error).__name__}: {error}.")
            return None

    def end(self) -> None:
        """Keep the numbers of the step, and let go of its tensors."""
        if self._current is not None:
            self._steps.append(self._current)
        self._scene, self._seer, self._current = None, Seer(), None

    def fields(self) -> Mapping[str, Any]:
        """Return the record of the policy."""
        return {"policy": _record(self._steps, self._heads or Heads(), self._modules, tuple(self._said))}

    # ---------------------------------------------------------------------------------- gradients

    def _take_gradients(self, loss: Tensor, parameters: Mapping[str, Tensor], direct: list[str]) -> None:
        scene, heads, step = self._scene, self._heads, self._current
        assert scene is not None
        assert heads is not None
        assert step is not None
        outputs = {}
        for kind, names in (("policy", heads.policy), ("value", heads.value)):
            calls = scene.calls_of(names)
            outputs[kind] = [t for call in calls for t in scene.outputs[call.index]]
            for name in set(names) - {call.module for call in calls}:
                self._say(f"The {kind} head {name!r} was not called in step {step.number}.")
        step.differentiable = any(t.requires_grad for t in outputs["policy"])
        if loss.grad_fn is not None and any(
            n.name() == "CheckpointFunctionBackward" for n in nodes_under([loss.grad_fn])
        ):
            self._say(
                "The gradients through the heads were not measured: a reentrant activation checkpoint hides "
                "a part of the graph. `use_reentrant=False` shows it."
            )
            return
        found = head_gradients(loss, outputs["policy"], outputs["value"], parameters)
        step.policy_reached, step.value_reached = found.policy_reached, found.value_reached
        alone = {n: p for n, p in parameters.items() if n in direct}
        own = gradients_of([loss], [torch.ones_like(loss)], list(alone.values()))
        entering = {n: g for n, g in zip(alone, own, strict=True) if g is not None}
        step.shared = self._shared(found, parameters)
        step.norms = self._norms(found, entering, step.shared, heads)

    def _shared(self, found: HeadGradients, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        if not self._asked.backbone:
            return found.shared
        inner = [n for n in parameters if any(inside(n, b) for b in self._asked.backbone)]
        if not set(inner) & set(found.shared):
            self._say("No parameter of the backbone that was named is one that both heads depend on.")
        return tuple(inner)

    def _norms(
        self, found: HeadGradients, entering: dict[str, Tensor], shared: Sequence[str], heads: Heads
    ) -> dict[str, float]:
        both = {**found.policy, **entering}
        norms = {}
        for kind, names, grads in (("policy", heads.policy, both), ("value", heads.value, found.value)):
            if not names:
                continue
            own = {n: g for n, g in grads.items() if self._is_own(n, names)} | (
                entering if kind == "policy" else {}
            )
            whole = {n: g for n, g in grads.items() if n in shared} if shared else grads
            norms[f"{kind}_head_grad_norm"] = _norm(own)
            norms[f"{kind}_grad_norm"] = _norm(whole)
        if shared:
            norms["gradient_cosine"] = _cosine(found.policy, found.value, shared)
        return norms

    def _is_own(self, parameter: str, heads: Sequence[str]) -> bool:
        module = owner(parameter, self._modules)
        return any(inside(module, head) for head in heads)

    def _say(self, sentence: str) -> None:
        self._said.setdefault(sentence)


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def _cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> float:
    dot = sum(float((a[n].double() * b[n].double()).sum()) for n in names if n in a and n in b)
    size = _norm({n: a[n] for n in names if n in a}) * _norm({n: b[n] for n in names if n in b})
    return dot / size if size > 0 else NAN


# ------------------------------------------------------------------------------------ the record


def _record(
    steps: list[_Step], heads: Heads, modules: Mapping[str, nn.Module], said: tuple[str, ...]
) -> PolicyRecord:
    shared = tuple(dict.fromkeys(name for step in steps for name in step.shared))
    made = _distributions(steps)
    backbone = {owner(name, modules) for name in shared}

    def norms(kind: str) -> Floats:
        return np.array([step.norms.get(kind, NAN) for step in steps])

    return PolicyRecord(
        steps=np.array([step.number for step in steps], dtype=np.int64),
        policy_heads=heads.policy,
        value_heads=heads.value,
        backbone=tuple(name for name in modules if name in backbone),
        shared_parameters=shared,
        others=tuple(name for name in modules if is_other(name)),
        distributions=made,
        policy_differentiable=any(step.differentiable for step in steps),
        policy_reached=np.array([step.policy_reached for step in steps], dtype=bool),
        value_reached=np.array([step.value_reached for step in steps], dtype=bool),
        policy_grad_norm=norms("policy_grad_norm"),
        value_grad_norm=norms("value_grad_norm"),
        gradient_cosine=norms("gradient_cosine"),
        policy_head_grad_norm=norms("policy_head_grad_norm"),
        value_head_grad_norm=norms("value_head_grad_norm"),
        assumptions=(*heads.assumptions, *_told(made, heads, shared), *said),
    )


def _told(made: Sequence[ActionDistribution], heads: Heads, shared: tuple[str, ...]) -> list[str]:
    """Return what was taken for what, and what could not be measured, in sentences."""
    said = [
        f"The output of {listed(d.heads)} is taken for {d.given} ({d.family}), since {d.evidence}."
        for d in made
    ]
    if heads.policy and not made:
        said.append(
            f"Nothing tells what {listed(heads.policy)} gives, so there is no entropy: no distribution was "
            "made of it, and its values are not normalised. Make a torch.distributions object of it."
        )
    if heads.policy and heads.value and not shared:
        said.append(
            "Policy and value share no parameters: the gradient norms are those of all parameters that each "
            "depends on, and there is no cosine."
        )
    return list(dict.fromkeys(said))


def _distributions(steps: list[_Step]) -> tuple[ActionDistribution, ...]:
    first: dict[Any, Component] = {}
    for step in steps:
        for key, (component, _) in step.distributions.items():
            first.setdefault(key, component)
    records = []
    for key, component in first.items():
        per_step = [step.distributions.get(key, (component, []))[1] for step in steps]
        some = next(numbers for numbers in per_step if numbers)[0]
        twice = [step.distributions[key][0].normalised_twice for step in steps if key in step.distributions]
        records.append(
            ActionDistribution(
                heads=component.heads,
                parameters=component.parameters,
                family=family(component.distribution),
                given=component.given,
                evidence=component.evidence,
                assumed=component.assumed,
                discrete=some.discrete,
                bounded=is_bounded(component.distribution),
                num_parts=some.num_parts,
                num_actions=some.num_actions,
                normalised_twice=all(twice),
                num_samples=np.array([sum(n.num_samples for n in numbers) for numbers in per_step]),
                deviation=ActionDeviation(
                    **_over_steps([f.name for f in attrs.fields(ActionDeviation)], per_step)
                ),
                **_over_steps(_NUMBERS, per_step),
            )
        )
    return tuple(records)


def _over_steps(names: Sequence[str], per_step: Sequence[Sequence[ActionStatistics]]) -> dict[str, Floats]:
    return {name: np.array([_merged(name, numbers) for numbers in per_step]) for name in names}


def _merged(name: str, numbers: Sequence[ActionStatistics]) -> float:
    """Return a number over several calls of one head: means weighted by their samples, extremes as such."""
    pairs = [(getattr(n, name), n.num_samples) for n in numbers if not math.isnan(getattr(n, name))]
    if not pairs:
        return NAN
    values = [value for value, _ in pairs]
    if name in ("largest_prob", "std_max"):
        return max(values)
    if name == "std_min":
        return min(values)
    if name == "mean_rms":
        return math.sqrt(sum(v * v * n for v, n in pairs) / sum(n for _, n in pairs))
    return sum(v * n for v, n in pairs) / sum(n for _, n in pairs)
