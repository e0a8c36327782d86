"""Some of a model's weights at one moment, held against the same ones later: what a step really did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from gradflow.functional.processes.line import Line
from gradflow.functional.processes.shards import Shards, processes_over
from gradflow.functional.torch_private import outside_transforms
from gradflow.functional.updates.figures import sampled
from gradflow.records import Floats


@attrs.frozen(eq=False)
class WeightSample:
    """Entries of a model's trainable parameters at one moment.

    Args:
        step: of the training.
        entries: by name of the parameter: some thousands of its entries, flat, or all; see `sampled`.
    """

    step: int
    entries: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, step: int) -> WeightSample:
        """Return the present entries, as copies.

        Args:
            model: the model; it is read only.
            step: of the training.
        """
        with outside_transforms(), torch.no_grad():
            return cls(step, {name: sampled(p).clone() for name, p in _trainable(model)})

    def checksum(self, model: nn.Module, processes: Any = "alone") -> float:
        """Return the sum of all entries, in double precision: the same number only where nothing changed.

        Args:
            model: the model.
            processes: which look together; of parameters that are spread over them, the sums are added up.
        """
        sums = [entries.double().sum().cpu() for entries in self.entries.values()]
        found = np.array(torch.stack(sums).tolist() if sums else [])
        return float(_added(model, processes, list(self.entries), found[:, None]).sum())

    def changes(self, model: nn.Module, processes: Any = "alone") -> dict[str, float]:
        """Return what became of the weights since, by name: `update_ratio/…` and `unchanged_share/…`.

        The former is the root mean square of the change over that of the weights before it (infinite where
        those were zero), the latter the share of entries that are what they were: near 1 where a step is
        smaller than what the weights' dtype can tell apart. Parameters that are no longer there are left out,
        and those that have nothing to change from and did not change.

        Args:
            model: the model; it is read only.
            processes: which look together; of parameters that are spread over them, all parts count.
        """
        found: dict[str, Tensor] = {}
        with outside_transforms(), torch.no_grad():
            for name, parameter in _trainable(model):
                before, now = self.entries.get(name), sampled(parameter)
                if before is None or before.shape != now.shape:
                    continue
                before, now = before.to(now.device), now.to(before.dtype)
                change, size = (torch.linalg.vector_norm(t.float()) for t in (now - before, before))
                same, number = (now == before).float().mean().nan_to_num(), float(now.numel())
                found[name] = torch.stack([change, size, same, same.new_tensor(number)]).double().cpu()
        numbers = np.array(torch.stack(list(found.values())).tolist() if found else np.empty((0, 4)))
        sums = np.column_stack([numbers[:, :2] ** 2, numbers[:, 2] * numbers[:, 3], numbers[:, 3]])
        total = _added(model, processes, list(found), sums)
        if total is not sums:
            numbers = np.column_stack(
                [np.sqrt(total[:, :2]), total[:, 2] / np.fmax(total[:, 3], 1), total[:, 3]]
            )
        changes: dict[str, float] = {}
        for name, (change, size, unchanged, number) in zip(found, numbers.tolist(), strict=True):
            if number and (size or change):
                changes[f"update_ratio/{name}"] = change / size if size else math.inf
            if number:
                changes[f"unchanged_share/{name}"] = unchanged
        return changes


def _added(model: nn.Module, asked: Any, names: Sequence[str], sums: Floats) -> Floats:
    """Return sums over parameters, where each process has taken them of what it holds, over all of them.

    Where no parameter is spread over processes, they are returned as they are.

    Args:
        model: the model.
        asked: which processes look together.
        names: of the parameters, alike on all.
        sums: one row each.
    """
    shards = Shards() if isinstance(asked, str) and asked == "alone" else Shards.of(model)
    processes = processes_over(shards, asked)
    if processes is None or not processes.axes:
        return sums
    line, total = Line(processes), sums.reshape(-1)
    with line.opened():
        for axis in processes.axes:
            total = line.reduced(total, axis)
    number = math.prod(axis.size for axis in processes.axes)
    alike = [number / math.prod(axis.size for axis in processes.parameter_axes(name)) for name in names]
    return total.reshape(sums.shape) / np.array(alike)[:, None]


def _trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the trainable parameters; of one that is gathered just now, the slice."""
    slices = Shards.of(model).gathered
    return [(name, slices.get(name, p)) for name, p in model.named_parameters() if p.requires_grad]
