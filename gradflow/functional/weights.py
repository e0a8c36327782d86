"""Some of a model's weights at one moment, held against the same ones later: what a step really did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from gradflow.functional.processes.line import Line
from gradflow.functional.processes.shards import Shards, processes_over
from gradflow.functional.processes.stages import Stages
from gradflow.functional.run.rows import to_host
from gradflow.functional.run.together.beside import module_of, told_by_stages
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
    def of(cls, model: Any, step: int) -> WeightSample:
        """Return the present entries, as copies.

        Args:
            model: the model, or the stage of a pipeline; it is read only.
            step: of the training.
        """
        with outside_transforms(), torch.no_grad():
            return cls(step, {name: sampled(p).clone() for name, p in _trainable(model)})

    def checksum(self, model: Any, processes: Any = "alone") -> float:
        """Return the sum of all entries, in double precision: the same number only where nothing changed.

        Args:
            model: the model, or the stage of a pipeline.
            processes: which look together; of parameters that are spread over them, the sums are added up,
                as they are of all stages.
        """
        found = np.array(to_host([entries.double().sum() for entries in self.entries.values()]))
        own = float(_added(model, processes, list(self.entries), found[:, None]).sum())
        return sum(told for _, told in told_by_stages(model, processes, own))

    def changes(self, model: Any, processes: Any = "alone") -> dict[str, float]:
        """Return what became of the weights since, by name: `update_ratio/…` and `unchanged_share/…`.

        The former is the root mean square of the change over that of the weights before it (infinite where
        those were zero), the latter the share of entries that are what they were: near 1 where a step is
        smaller than what the weights' dtype can tell apart. Parameters that are no longer there are left out,
        and those that have nothing to change from and did not change.

        Args:
            model: the model, or the stage of a pipeline, which is told of all its stages; read only.
            processes: which look together; of parameters that are spread over them, all parts count.
        """
        names, numbers, scalars = [], [], []
        with outside_transforms(), torch.no_grad():
            for name, now in self.of(model, self.step).entries.items():
                before = self.entries.get(name)
                if before is None or before.shape != now.shape:
                    continue
                before, now = before.to(now.device), now.to(before.dtype)
                sizes = [torch.linalg.vector_norm(t.float()) for t in (now - before, before)]
                scalars += [*sizes, torch.count_nonzero(now == before)]
                names.append(name)
                numbers.append(now.numel())
            found = np.array(to_host(scalars)).reshape(-1, 3)
        sums = np.column_stack([found[:, :2] ** 2, found[:, 2], numbers])
        total = _added(model, processes, names, sums)
        sizes = found[:, :2] if total is sums else np.sqrt(total[:, :2])
        changes: dict[str, float] = {}
        own = list(zip(names, sizes.tolist(), total[:, 2:].tolist(), strict=True))
        for prefix, told in told_by_stages(model, processes, own):
            for name, (change, size), (same, number) in told:
                if number and (size or change):
                    changes[f"update_ratio/{prefix}{name}"] = change / size if size else math.inf
                if number:
                    changes[f"unchanged_share/{prefix}{name}"] = same / number
        return changes


def _added(model: Any, asked: Any, names: Sequence[str], sums: Floats) -> Floats:
    """Return sums over parameters, where each process has taken them of what it holds, over all of them.

    Where no parameter is spread over processes, they are returned as they are.

    Args:
        model: the model, or the stage of a pipeline.
        asked: which processes look together.
        names: of the parameters, alike on all.
        sums: one row each.
    """
    stage = Stages.of(model).stage
    stages = 1 if stage is None else stage.number
    shards = Shards() if isinstance(asked, str) and asked == "alone" else Shards.of(module_of(model))
    processes = processes_over(shards, asked, stages)
    if processes is None or not processes.axes:
        return sums
    line, total = Line(processes), sums.reshape(-1)
    with line.opened():
        for axis in processes.axes:
            total = line.reduced(total, axis)
    number = math.prod(axis.size for axis in processes.axes)
    alike = [number / math.prod(axis.size for axis in processes.parameter_axes(name)) for name in names]
    return total.reshape(sums.shape) / np.array(alike)[:, None]


def _trainable(model: Any) -> list[tuple[str, Tensor]]:
    """Return the trainable parameters; of one that is gathered just now, the slice."""
    module = module_of(model)
    slices = Shards.of(module).gathered
    return [(name, slices.get(name, p)) for name, p in module.named_parameters() if p.requires_grad]
