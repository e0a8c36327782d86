"""Which modules of a model repeat one block: siblings in one list, alike in class and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from gradflow.functional.model.layers import holders

NONE: Mapping[str, str] = MappingProxyType({})
FEWEST = 3  # two that differ do not tell which is right


def siblings(modules: Mapping[str, nn.Module], beside: Mapping[str, str] = NONE) -> dict[str, str]:
    """Return by name of a block the name of the list that holds it and its siblings.

    Blocks have modules with parameters inside. Siblings are of one class, and numbered in one parent. They
    need not be alike in their parameters: one that lacks a norm layer is a sibling.

    Args:
        modules: by qualified name.
        beside: the classes of others that hold modules with parameters, which count as siblings.

    >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> net = nn.Sequential(nn.Linear(1, 2), *(block() for _ in range(3)))
    >>> siblings(dict(net.named_modules()))
    {'1': '', '2': '', '3': ''}
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, kind in {**beside, **holders(modules)}.items():
        parent, _, number = name.rpartition(".")
        if number.isdigit():
            groups.setdefault((parent, kind), []).append(name)
    many = [(parent, name) for (parent, _), of in groups.items() if len(of) >= FEWEST for name in of]
    return {name: parent for parent, name in many if name in modules}
