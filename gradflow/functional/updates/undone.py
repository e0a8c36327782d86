"""Whether a model's own code takes back what the optimizer's step did to its parameters.

A module may write to its parameters in its forward pass: round them, bound them, normalise them. What it
writes over is the number that the step has just made. The entries that are looked at are kept from before the
step and from after it, and compared with those at the end of the next forward pass, of parameters that were
written to in between and of no others. Zeros do not count: a mask that is laid on the weights puts them back
by design.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from gradflow.functional.torch_private import num_writes
from gradflow.functional.updates.figures import sampled


@attrs.frozen(eq=False)
class Stepped:
    """The entries of parameters before and after a step, and how often each had been written to by then.

    Args:
        step: its number.
        before: by name, what `remembered` returned before it.
        after: the same entries after it.
        writes: by name; and where it lies, for `.data` may be another tensor's then.
    """

    step: int
    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    writes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, step: int, before: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Stepped:
        """Return what is kept of a step that was just made."""
        after = {name: sampled(parameters[name]).clone() for name in before}
        return cls(step, before, after, {name: _written(parameters[name]) for name in before})

    def undone(self, parameters: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """Return by name what share of the step was put back, and of how many different values, per entry.

        Args:
            parameters: after the next forward pass; those that were not written to are left out.
        """
        found: dict[str, tuple[float, float]] = {}
        for name, was in self.before.items():
            if _written(parameters[name]) == self.writes[name] or not was.numel():
                continue
            changed = (self.after[name] != was) & (was != 0)
            back = changed & (sampled(parameters[name]) == was)
            share = float(back.sum()) / max(int(changed.sum()), 1)
            found[name] = (share, len(torch.unique(was[back])) / max(int(back.sum()), 1))
        return found


def _written(parameter: Tensor) -> tuple[int, int]:
    return num_writes(parameter), parameter.data_ptr()
