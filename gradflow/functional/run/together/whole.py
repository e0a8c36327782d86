"""Outputs that do not come from the batch: one and the same on all processes, with one mean gradient.

NOTE [Outputs without a batch]
An embedding of positions is added to every sample, and so has one gradient, the sum over all samples: over
several processes that is the mean of theirs, of which the norm is not to be had from their norms. Such
outputs are known by two signs: no way leads to them from the batch, through the autograd graph of the first
step or past it, and they are equal on all processes (noise that the model draws is not). A scalar has no
batch either: the loss of a process that computes it itself. Their gradients are asked for whole, and averaged
like those of parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from gradflow.functional.processes.line import Line
from gradflow.functional.reverse.autograd_graph import Group, Structure
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.tap.recorder import Recorder

Key = tuple[str, int]  # a call, and which of its probes


@attrs.define(eq=False)
class Wholes:
    """The outputs of which the gradient is averaged whole, by name of their call."""

    calls: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()  # of the nodes of the graph that do not come from the batch
    _like: dict[Key, Tensor] = attrs.field(factory=dict)  # on the meta device

    def learn(self, calls: Collection[str], groups: Collection[str]) -> None:
        """Hear which outputs do not come from the batch."""
        self.calls, self.groups = frozenset(calls), frozenset(groups)

    def exchanged(self, found: Mapping[Key, Tensor], recorder: Recorder, *, first: bool) -> dict[Key, Tensor]:
        """Return what of some gradients all processes exchange: the same in every step, zeros where none is.

        Args:
            found: the gradients of a step.
            recorder: of the step.
            first: whether it is the first, which tells what there is.
        """
        if first:
            sites = [(recorder.calls[site.call], site.index) for site in recorder.sites]
            self._like = {
                (call.name, index): (
                    found[call.name, index]
                    if (call.name, index) in found
                    else torch.empty(call.shape, dtype=next(iter(found.values()), torch.empty(0)).dtype)
                ).to("meta")
                for call, index in sites
                if call.name in self.calls
            }
        return {
            key: found[key] if key in found else torch.zeros(like.shape, dtype=like.dtype)
            for key, like in self._like.items()
        }


def without_batch(
    structure: Structure | None, dataflow: DataFlow, recorder: Recorder
) -> tuple[set[str], set[str]]:
    """Return the layer calls, and the nodes of the graph, to which no way leads from the batch; and scalars.

    Args:
        structure: of the first step.
        dataflow: of the same; not released yet.
        recorder: of the same.
    """
    if structure is None or not dataflow.shapes:  # nobody knows what the batch is
        return set(), set()
    fed = {name for name, group in structure.groups.items() if group.kind == "input"}
    for (target, _), _ in dataflow.edges.items():
        fed.add(recorder.calls[target].name)
    fed |= {structure.group_of[node] for node, _, _ in dataflow.joins if node in structure.group_of}
    after: dict[str, list[str]] = {}
    for source, target in structure.edges:
        after.setdefault(source, []).append(target)
    todo, known = list(fed), set(fed)
    while todo:
        for target in after.get(todo.pop(), ()):
            if target not in known:
                known.add(target)
                todo.append(target)
    scalars = {name for name, group in structure.groups.items() if _is_scalar(group)}
    groups = {name for name in structure.groups if name not in known or name in scalars}
    calls = {call.name for g in groups if (call := structure.groups[g].call) is not None}
    return calls, groups


def _is_scalar(group: Group) -> bool:
    if group.kind == "layer":
        return group.call is not None and group.call.num_elements == 1 and not group.shape
    return group.kind == "op" and not group.shape


def agreed(line: Line, names: Collection[str]) -> set[str]:
    """Return the names that all processes have given."""
    every = line.agreed(sorted(names))
    return set(names) if every is None else set.intersection(*map(set, every))


def agreed_without_batch(line: Line, calls: Collection[str], recorder: Recorder) -> set[str]:
    """Return those of some calls whose outputs are equal on all processes, and all scalars.

    Args:
        line: to the others.
        calls: to which no way leads from the batch.
        recorder: of a step that was looked at.
    """
    seen: dict[str, list[float]] = {}
    for observation in recorder.observations:
        if observation.kind in ("out", "zeros", "mean_row") and isinstance(observation.key, int):
            call = recorder.calls[observation.key]
            if call.name in calls:
                seen.setdefault(call.name, []).append(float(observation.value))
    scalars = {call.name for call in recorder.calls if call.is_layer and call.num_elements and not call.shape}
    mine: Any = {name: (name in scalars, values) for name, values in sorted(seen.items())}
    every = line.agreed(mine)
    if every is None:
        return set(mine)
    return {
        name
        for name, (scalar, values) in mine.items()
        if all(name in other and (scalar or other[name][1] == values) for other in every)
    }
