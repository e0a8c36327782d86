"""Which modules of a model repeat one block: siblings in one list, alike in class and parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

FEWEST = 3  # two that differ do not tell which is right


def siblings(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return by name of a block the name of the list that holds it and its siblings.

    Blocks have modules with parameters inside. Siblings are of one class, and numbered in one parent. They
    need not be alike in their parameters: one that lacks a norm layer is a sibling.

    Args:
        modules: by qualified name.

    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> net = nn.Sequential(nn.Linear(1, 2), *(block() for _ in range(3)))
    >>> siblings(dict(net.named_modules()))
    {'1': '', '2': '', '3': ''}
    """
    groups: dict[tuple[str, type], list[str]] = {}
    for name, module in modules.items():
        parent, _, number = name.rpartition(".")
        if number.isdigit() and any(_owns(child) for child in list(module.modules())[1:]):
            groups.setdefault((parent, type(module)), []).append(name)
    return {name: parent for (parent, _), names in groups.items() if len(names) >= FEWEST for name in names}


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
