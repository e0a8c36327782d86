"""A stage's module under a name of its own."""

from __future__ import annotations

from torch import nn


class Prefixed(nn.Module):
    """A stage's module under a name, where another stage has layers of the same names."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)
        self.training = module.training
