"""Products of matrices on the walk that labels zeros: what need not be multiplied again to be known.

NOTE [Products that are not called]
Products are nearly all that a walk costs. Two of the three that it would ask of each node are told by the
operands. Random numbers have no zeros, so where they come in everywhere, an element of the gradient of one
factor is zero just where the other factor has nothing but zeros to multiply; where they come in at some
places, it is zero where none of these meets anything else than a zero. The third, of the real gradient, has
been made by the reverse pass itself, which hands out what it needs if it is asked for it by its edge in
autograd's graph: what arrives at a tensor is what its one consumer hands back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.functional.reach.zeros import Zeros
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.passing import Gradient, Passed
from gradflow.functional.tap.nodes import Node, Nodes, Position, feeds, is_leaf, operation
from gradflow.functional.tap.probes import is_custom, is_probe
from gradflow.functional.torch_private import input_metadata
from gradflow.records import Bools

# Those whose zeros are seldom their own, and that a walk costs most to call: asked last what they do by
# themselves, which is often not needed.
MIXING = frozenset(("addmm", "baddbmm", "bmm", "convolution", "mm"))

_FACTORS = {"mm": (0, "self", "mat2"), "addmm": (1, "mat1", "mat2")}  # the number of the first, their names
_HANDED_OUT = frozenset(("addmm", "bmm", "convolution", "mm"))  # whose gradients need no sum to fit
_MOST = 2**22  # elements of the gradients that are kept for a walk
_PAIRS = 2**23  # of elements that are held against one another one by one


# ---------------------------------------------------------------------------------- random numbers


@attrs.define(eq=False)
class Product:
    """What a product of two matrices, a (n × k) and b (k × m), makes of random numbers that come in (n × m).

    Args:
        first: the number of the first factor among the inputs of the node; an added bias comes before it.
        others: by number of a factor, the other.
        labels: of the gradient that came in.
    """

    first: int
    others: Mapping[int, Tensor | None]
    labels: Tensor | None
    _some: dict[int, Bools] = attrs.field(factory=dict)

    @classmethod
    def of(cls, node: Node, labels: Tensor | None) -> Product | None:
        """Return the product that a node is; None where it is none, or not a plain one on the CPU."""
        first, *names = _FACTORS.get(operation(node), (-1,))
        if first < 0 or not _is_unscaled(node):
            return None
        try:
            a, b = (getattr(node, f"_saved_{name}") for name in names)
        except (AttributeError, RuntimeError):
            return None
        plain = all(x is None or (type(x.detach()) is Tensor and _is_plain(x)) for x in (a, b))
        return cls(int(first), {int(first): b, int(first) + 1: a}, labels) if plain else None

    def told(
        self, found: Mapping[int, Zeros], left: Mapping[int, Tensor], label: int | None
    ) -> dict[int, Tensor] | None:
        """Return at which places the gradients of some inputs are not zero, were the node called with random
        numbers; None where it has to be.

        Args:
            found: the zeros of the real gradients, by number of the input.
            left: the places that are asked about.
            label: random numbers come in at the zeros with this label, and zeros elsewhere; None for
                everywhere.
        """
        hits = {j: self._hits(j, found[j], at, label) for j, at in left.items()}
        known = {j: hit for j, hit in hits.items() if hit is not None}
        return known if len(known) == len(hits) else None

    def _hits(self, j: int, zeros: Zeros, at: Tensor, label: int | None) -> Tensor | None:
        other = self.others.get(j)
        if j < self.first:
            return self._hits_bias(zeros, at, label)
        if other is None or len(zeros.sizes) != 2:
            return None
        mine = j - self.first  # the axis of the factor, and of what comes in, that the two do not share
        places = dict(zip(zeros.order, np.divmod(at.numpy(), zeros.sizes[1]), strict=True))
        if j not in self._some:
            self._some[j] = np.asarray(_nonzero(other).any(axis=1 - mine))
        found = self._some[j][places[1 - mine]]
        if label is not None:
            if self.labels is None:
                return None
            marked = self.labels.numpy() == label
            found = found & marked.any(axis=1 - mine)[places[mine]]
            open_ = np.flatnonzero(found & ~marked.all(axis=1 - mine)[places[mine]])
            if open_.size * marked.shape[1 - mine] > _PAIRS:
                return None
            if open_.size:
                theirs = _bits(_nonzero(other), 1 - mine)[places[1 - mine][open_]]
                ours = _bits(marked, 1 - mine)[places[mine][open_]]
                found[open_] = (theirs & ours).any(axis=1)
        return torch.from_numpy(found)

    def _hits_bias(self, zeros: Zeros, at: Tensor, label: int | None) -> Tensor | None:
        """Return the same of an added bias, whose gradient is the sum over rows of what comes in."""
        if len(zeros.sizes) != 1:
            return None
        if label is None:
            return torch.ones(at.shape, dtype=torch.bool)
        if self.labels is None or self.labels.shape[1] != zeros.numel:
            return None
        return torch.from_numpy((self.labels.numpy() == label).any(axis=0)[at.numpy()])


def _is_unscaled(node: Node) -> bool:
    return all(getattr(node, f"_saved_{name}", 1) == 1 for name in ("alpha", "beta"))


def _is_plain(x: Tensor) -> bool:
    return x.is_cpu and x.layout is torch.strided and x.dim() == 2


def _nonzero(x: Tensor) -> Bools:
    return x.detach().bool().numpy()  # a copy: FSDP cannot free memory that NumPy has seen


def _bits(marks: Bools, axis: int) -> Any:
    """Return the marks along an axis of a matrix as the bits of whole numbers, a row for each other index."""
    bits = np.packbits(marks if axis else marks.T, axis=1)
    rows = np.zeros((len(bits), -(-bits.shape[1] // 8) * 8), np.uint8)
    rows[:, : bits.shape[1]] = bits
    return rows.view(np.uint64)


# ------------------------------------------------------------------------------- the real gradient


def asked_edges(nodes: Nodes) -> dict[Position, Any]:
    """Return the edges at which the gradient that arrives is what a product hands back to one of its inputs.

    Leaves are left out, since their gradients are known, and all products behind the one with which it would
    be more than may be kept.
    """
    uses = Counter(position for made_of in nodes.values() for position in made_of)
    found: dict[Position, Any] = {}
    left = _MOST
    for node, made_of in nodes.items():
        if operation(node) not in _HANDED_OUT:
            continue
        edges: dict[Position, Any] = {}
        for child, number in made_of:
            if child is None or is_leaf(child) or _leaf_turned(child) is not None:
                continue
            at, nr = _under_probe(child, number)
            if uses[child, number] == uses[at, nr] == 1 and not is_custom(at):
                left -= _size(at, nr)
                edges[child, number] = GradientEdge(at, nr)
        if left < 0:
            break
        found |= edges
    return found


def known_cotangents(
    structure: Structure,
    asked: Mapping[Position, Tensor],
    gradients: Mapping[str, Gradient | None],
    leaves: Mapping[str, Tensor],
) -> dict[Position, Tensor]:
    """Return the gradients that the reverse pass has handed out, with those of leaves of one consumer.

    Of a gradient that is gone, what stands in for it is zero where that was.

    Args:
        structure: the graph of the step.
        asked: by position, what was asked for by its edge.
        gradients: of the leaves, by name.
        leaves: by name.
    """
    names = {id(leaf): name for name, leaf in leaves.items()}
    uses = Counter(child for made_of in structure.nodes.values() for child, _ in made_of)
    found = dict(asked)
    for node, leaf in structure.leaves.items():
        gradient = gradients.get(names.get(id(leaf), ""))
        if uses[node] == 1 and gradient is not None:
            known = _stand_in(gradient, leaf) if isinstance(gradient, Passed) else gradient
            if type(known) is Tensor and known.layout is torch.strided and known.shape == leaf.shape:
                found[node, 0] = known
    for node in structure.nodes:
        leaf = _leaf_turned(node)
        if uses[node] == 1 and (leaf, 0) in found:
            found[node, 0] = found[leaf, 0].t()
    return found


def handed_back(
    node: Node,
    incoming: Mapping[int, Tensor],
    wanted: Sequence[Position | None],
    known: Mapping[Position, Tensor],
) -> list[Tensor | None] | None:
    """Return what a product hands to its inputs, if the reverse pass has handed out all of it, else None.

    Args:
        node: an autograd node.
        incoming: the gradients of its outputs, by number.
        wanted: what each input was made by; None for those that nobody asks about.
        known: what arrived, by position.
    """
    kind = operation(node)
    if not known or kind not in _HANDED_OUT:
        return None
    if kind == "addmm" and not _is_unscaled(node):
        return None
    found: list[Tensor | None] = [None if position is None else known.get(position) for position in wanted]
    if kind == "addmm" and wanted[0] is not None:
        found[0] = incoming[0]  # the bias gets a sum of it, which may be rounding
    missing = (p is not None and g is None for p, g in zip(wanted, found, strict=True))
    return None if any(missing) else found


def _leaf_turned(node: Node) -> Node | None:
    """Return the leaf that a node turns, as a linear layer does with its weight, else None."""
    if operation(node) != "t":
        return None
    child = feeds(node)[0][0]
    return child if child is not None and is_leaf(child) else None


def _under_probe(node: Node, number: int) -> tuple[Node, int]:
    """Return what a probe stands on, through which the gradient passes as it is; else the position itself."""
    while is_probe(node) and feeds(node)[0][0] is not None:
        node, number = feeds(node)[0]
    return node, number


def _size(node: Node, number: int) -> int:
    metadata = input_metadata(node)
    return int(np.prod(metadata[number].shape)) if number < len(metadata) else 0


def _stand_in(gradient: Passed, leaf: Tensor) -> Tensor:
    if gradient.mask is None:
        return torch.ones((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
    return gradient.mask.to(leaf.dtype)
