"""Whether what enters a block goes past its weights, read off autograd's graph."""

from __future__ import annotations

import re

from torch import Tensor

from gradflow.functional.tap.nodes import nodes_under

_WEIGHED = re.compile(r"mm|mv|conv|attention|linear|embedding|softmax|rnn|lstm|gru|dot", re.IGNORECASE)
_MOST = 2000  # nodes that are looked at


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
