"""Matrix products in all their spellings: their two factors, and which axis of a factor is which.

Attention written out is recognised by the axis that a product sums over, see NOTE [What a softmax is for].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "mm", "einsum"])


@attrs.frozen
class Labels:
    """The axes of a product's operands and output, a letter each."""

    a: str
    b: str
    out: str


def operands_of(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Labels] | None:
    """Return the two factors of a product and their axes; None for other products."""
    if name == "einsum":
        return _einsum_operands(args)
    names = ("batch1", "batch2") if name == "baddbmm" else ()
    values = [*args, *(kwargs[n] for n in ("input", "self", "other", "mat2", *names) if n in kwargs)]
    pair = values[1:3] if name == "baddbmm" else values[:2]
    if len(pair) != 2 or not all(isinstance(t, Tensor) and t.dim() >= 1 for t in pair):
        return None
    a, b = pair
    lead = "abcdefghlmnoprstuvw"[: max(a.dim(), b.dim(), 2) - 2]  # axes that are aligned at the right
    own = lead[len(lead) + 2 - max(a.dim(), 2) :] + "ik"[-min(a.dim(), 2) :]
    other = lead[len(lead) + 2 - max(b.dim(), 2) :] + "kj"[: min(b.dim(), 2)]
    out = lead + ("i" if a.dim() > 1 else "") + ("j" if b.dim() > 1 else "")
    return a, b, Labels(own, other, out)


def _einsum_operands(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Labels] | None:
    if not args or not isinstance(args[0], str):
        return None
    given = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    left, arrow, out = args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(given) != 2 or len(terms) != 2 or not all(isinstance(t, Tensor) for t in given):
        return None
    spare = list("αβγδεζηθ")
    wide = max(
        (t.dim() - len(term.replace("...", "")) for t, term in zip(given, terms, strict=True)), default=0
    )
    full = []
    for tensor, term in zip(given, terms, strict=True):
        number = tensor.dim() - len(term.replace("...", ""))
        full.append(term.replace("...", "".join(spare[wide - number : wide]) if number > 0 else ""))
    both = "".join(full)
    if not arrow:
        out = "".join(spare[:wide]) + "".join(sorted(c for c in set(both) - set(spare) if both.count(c) == 1))
    out = out.replace("...", "".join(spare[:wide]))
    if any(len(set(term)) != len(term) or len(term) != t.dim() for t, term in zip(given, full, strict=True)):
        return None
    return given[0], given[1], Labels(full[0], full[1], out)
