"""Which modules of a model repeat one block, and whether what enters a block goes past its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

from gradflow.functional.model.layers import holders
from gradflow.functional.tap.nodes import nodes_under

NONE: Mapping[str, str] = MappingProxyType({})
_WEIGHED = re.compile(r"mm|mv|conv|attention|linear|embedding|softmax|rnn|lstm|gru|dot", re.IGNORECASE)
_MOST = 2000  # nodes that are looked at
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


def passes(x: Tensor, y: Tensor) -> bool | None:
    """Return whether a way leads from `x` to `y` along sums, products with numbers, norms and activations.

    None where the graph does not show it, or is too large.

    Args:
        x: what enters a block.
        y: what it makes of it.

    >>> import torch
    >>> x, w = torch.ones(2, 2, requires_grad=True) * 1, torch.ones(2, 2, requires_grad=True)
    >>> passes(x, x + x @ w), passes(x, (x @ w).relu())
    (True, False)
    """
    source = x.grad_fn
    if source is None or y.grad_fn is None:
        return None
    for number, node in enumerate(nodes_under([y.grad_fn], lambda n: bool(_WEIGHED.search(n.name())))):
        if node is source:
            return True
        if number >= _MOST:
            return None
    return False
