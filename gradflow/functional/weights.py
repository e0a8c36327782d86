"""Some of a model's weights at one moment, held against the same ones later: what a step really did."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.torch_private import outside_transforms
from gradflow.functional.updates.figures import sampled


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

    def checksum(self) -> float:
        """Return the sum of all entries, in double precision: the same number only where nothing changed."""
        sums = [entries.double().sum().cpu() for entries in self.entries.values() if entries.numel()]
        return float(torch.stack(sums).sum()) if sums else 0.0

    def changes(self, model: nn.Module) -> dict[str, float]:
        """Return what became of the weights since, by name: `update_ratio/…` and `unchanged_share/…`.

        The former is the root mean square of the change over that of the weights before it (infinite where
        those were zero), the latter the share of entries that are what they were: near 1 where a step is
        smaller than what the weights' dtype can tell apart. Parameters that are no longer there are left out,
        and those that have nothing to change from and did not change.

        Args:
            model: the model; it is read only.
        """
        found: dict[str, Tensor] = {}
        with outside_transforms(), torch.no_grad():
            for name, parameter in _trainable(model):
                before, now = self.entries.get(name), sampled(parameter)
                if before is None or before.shape != now.shape or not before.numel():
                    continue
                before, now = before.to(now.device), now.to(before.dtype)
                change = torch.linalg.vector_norm((now - before).float())
                found[name] = torch.stack(
                    [change, torch.linalg.vector_norm(before.float()), (now == before).float().mean()]
                )
            numbers = torch.stack([n.cpu() for n in found.values()]).tolist() if found else []
        changes: dict[str, float] = {}
        for name, (change, size, unchanged) in zip(found, numbers, strict=True):
            if size or change:
                changes[f"update_ratio/{name}"] = change / size if size else math.inf
            changes[f"unchanged_share/{name}"] = unchanged
        return changes


def _trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
