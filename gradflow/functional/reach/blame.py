"""Why the elements of a gradient are zero: one walk from the loss back, with a label on every zero.

NOTE [Labels on zeros]
The walk calls every node of autograd's graph with the gradient that arrives, as the full mode does. Beside
the gradient goes a label for each of its exact zeros: what made it. A node is a linear map of the gradient,
so what it does by itself shows when it is called with random numbers instead:

* an element that is zero then as well is zero because of this node (a rectifier that is off, a row that no
  index picks, a column of the input that is zero): it gets this node's label;
* an element that is zero only for the real gradient is so because of zeros that came in. Which ones is seen
  by calling the node with random numbers at the zeros of one label alone: where that gives something, the
  element has this label;
* what is left is zero although something came in that could have reached it: the parts cancel (by
  mathematics), or their product was too small for the dtype (underflow), which a larger gradient tells apart.

Where several consumers meet, an element of their sum is zero if it is zero in each, and takes the label that
comes first in `_RANK`; a sum of parts that are not zero, but which is, or is mere rounding beside them,
cancels. So at every leaf, each element that is zero has exactly one label. Few labels live at one place, for
a product with a full matrix mixes the zeros of a unit away, so the walk costs a few reverse passes.

Where layers are split over processes, or their statistics are joined, a node may exchange what it is called
with. All processes must call it as often: twice, whatever they find, so zeros that it does not make by itself
get the most frequent label of those that come in. Labels are of the part that a process holds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from gradflow.functional.processes.shards import is_distributed, like_parts, local, of_parts, summed
from gradflow.functional.reach.kinds import is_constant
from gradflow.functional.reach.masks import is_label, is_zero, labelled, number_of_each, some
from gradflow.functional.reach.masks import number as number_of
from gradflow.functional.reach.products import MIXING, Product, handed_back
from gradflow.functional.reach.reasons import Behind, Blame, Blamed, Part, Reasons
from gradflow.functional.reach.zeros import RandomNumbers, Zeros
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.reverse import call_node, validated
from gradflow.functional.tap.nodes import Node, Position, converts, exchanges, is_leaf, operation
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.torch_private import input_metadata
from gradflow.records import Reason

_MOST = 8  # labels that are looked for at one node; what is left gets the most frequent
_ROUNDING = 100  # times the dtype's epsilon: a sum below that, beside its parts, is rounding
_RANK = (
    Reason.UNCHOSEN_BY_DATA, Reason.UNCHOSEN_BY_MODEL, Reason.OFF, Reason.ZERO_FACTOR, Reason.CUT,
    Reason.BY_MATHEMATICS, Reason.UNDERFLOW, Reason.NO_LOSS,
)  # fmt: skip
# Operations whose backward pass moves each element to another place, and does nothing else to it.
_MOVING = frozenset(
    ("alias", "clone", "permute", "squeeze", "t", "transpose", "unsafe_view", "unsqueeze", "view")
)


@attrs.define(eq=False)
class Walk:
    """One walk from the loss back; see NOTE [Labels on zeros].

    Args:
        structure: the graph of the step.
        reasons: tells why a node hands back nothing.
        wanted: ids of the leaf tensors that are asked about.
        known: what the reverse pass has handed back already: see NOTE [Products that are not called].
    """

    structure: Structure
    reasons: Reasons
    wanted: Collection[int]
    known: Mapping[Position, Tensor] = attrs.field(factory=dict)
    blames: list[Blame | None] = attrs.field(factory=lambda: [None])
    _numbers: dict[tuple[Node, int, str], int] = attrs.field(factory=dict)
    _arriving: dict[Node, dict[int, list[Part]]] = attrs.field(factory=dict)
    _found: dict[int, Tensor] = attrs.field(factory=dict)
    _random: RandomNumbers = attrs.field(factory=RandomNumbers)
    _needed: set[Node] = attrs.field(factory=set)
    _altered: set[Node] = attrs.field(factory=set)  # at which other than the real gradient arrives

    def run(self, loss: Tensor, behind: Behind | None = None) -> Blamed:
        """Return what made the zeros at the leaves that are asked about.

        Args:
            loss: from which the walk begins.
            behind: what the next stage of a pipeline has found, where the loss stands for it.
        """
        for node, made_of in reversed(self.structure.nodes.items()):
            leaf = self.structure.leaves.get(node)
            wanted = id(leaf) in self.wanted if leaf is not None else False
            if wanted or any(child in self._needed for child, _ in made_of):
                self._needed.add(node)
        if behind is None:
            self._arriving[loss.grad_fn] = {0: [(torch.ones_like(loss), None)]}
        else:
            self.blames = [*behind.blames]
            for (child, number), part in zip(self.structure.nodes[loss.grad_fn], behind.parts, strict=True):
                if child is not None:
                    self._send(child, number, part)
        with torch.no_grad(), self.structure.walk() as ready:
            for node in self.structure.nodes:
                ready()
                arrived = self._arriving.pop(node, None)
                if arrived is not None and node in self._needed:
                    self._visit(node, arrived)
        return Blamed(self._found, self.blames)

    def _visit(self, node: Node, arrived: Mapping[int, list[Part]]) -> None:
        gathered = {number: self._gather(node, parts) for number, parts in arrived.items()}
        if node in self._altered:
            self._altered.update(child for child, _ in self.structure.nodes[node] if child is not None)
        if is_leaf(node):
            gradient, labels = gathered[0]
            none = torch.zeros(local(gradient).shape, dtype=torch.int16, device=gradient.device)
            self._found[id(self.structure.leaves[node])] = none if labels is None else labels
            return
        if is_probe(node):
            child, number = self.structure.nodes[node][0]
            self._send(child, number, gathered[0])
            return
        gradients = {number: gradient for number, (gradient, _) in gathered.items()}
        wanted = [at if at[0] in self._needed else None for at in self.structure.nodes[node]]
        known = {} if node in self._altered else self.known
        results = handed_back(node, gradients, wanted, known) or call_node(node, gradients)
        if is_constant(node):  # what it hands back to what it normalises is rounding alone
            results = [None, *results[1:]]
        tensors = [*gradients.values(), *(r for r in results if r is not None)]
        if converts(node) or exchanges(node) or any(map(is_distributed, tensors)):
            self._visit_split(node, gathered, results)
            return
        pending: dict[int, Tensor] = {}
        for j, (child, number) in enumerate(self.structure.nodes[node]):
            if child is None or child not in self._needed:
                continue
            given = results[j] if j < len(results) else None
            if given is None:
                how = "own" if j == 0 and is_constant(node) else "nothing"
                self._altered.add(child)
                self._send(child, number, self._nothing(node, j, child, number, how))
                continue
            cotangent, noise = self._fitted(given, child, number)
            zero = is_zero(cotangent)
            if noise is not None:
                self._altered.add(child)
                self._send(child, number, self._cancelled(node, j, cotangent, noise))
            elif some(zero):
                pending[j] = cotangent
            else:
                self._send(child, number, (cotangent, None))
        if pending:
            self._label(node, gathered, pending)

    def _visit_split(
        self, node: Node, gathered: Mapping[int, Part], results: Sequence[Tensor | None]
    ) -> None:
        """Visit a node that may exchange tensors with other processes, which visit it alike."""
        alone = call_node(node, {n: self._like(g) for n, (g, _) in gathered.items()})
        top = next(iter(self._labels_in(gathered)), 0)
        nothing = bool(top) and not any(bool(local(g).any()) for g, _ in gathered.values())
        for j, (child, number) in enumerate(self.structure.nodes[node]):
            given = results[j] if j < len(results) else None
            if child is None or child not in self._needed or given is None:
                continue
            cotangent = validated(given, child, number, self.structure)
            here, by_itself = local(cotangent), alone[j]
            zero, noise = here == 0, None
            if tuple(given.shape) != tuple(cotangent.shape):
                mass = local(summed(given.abs().sum_to_size(cotangent.shape), cotangent))
                noise = (mass > 0) & (here.abs() <= _rounding(here) * mass)
            labels = torch.zeros(here.shape, dtype=torch.int16, device=here.device)
            _, known = gathered.get(0, (None, None))
            placed = known is not None and known.shape == here.shape
            if converts(node):
                if known is not None and placed:
                    labels = torch.where(zero, known, labels)
            elif bool(zero.any()):
                own = torch.zeros_like(zero)
                if by_itself is not None and not nothing:
                    own = zero & (local(validated(by_itself, child, number, self.structure)) == 0)
                if bool(own.any()):
                    labels[own] = self._number(node, j, "own", whole=bool(own.all()))
                if bool((left := zero & ~own).any()):
                    labels[left] = top or self._number(node, j, "cancels")
                    if known is not None and placed and exchanges(node):  # element by element
                        labels = torch.where(left & (known > 0), known, labels)
            if noise is not None and bool(noise.any()):
                labels[noise] = self._number(node, j, "cancels")
            self._send(child, number, (cotangent, labels if bool(labels.any()) else None))

    # ------------------------------------------------------------------ labels

    def _label(self, node: Node, gathered: Mapping[int, Part], pending: Mapping[int, Tensor]) -> None:
        """Send on cotangents that hold zeros, with a label on each."""
        if operation(node) in _MOVING:
            self._move(node, gathered, pending)
            return
        found: dict[int, Zeros] = {}
        left: dict[int, Tensor] = {}
        labels = self._labels_in(gathered)
        # Where nothing at all comes in, it is not this node that ends it.
        nothing = bool(labels) and all(g.numel() and not some(g.bool()) for g, _ in gathered.values())
        for j, cotangent in pending.items():
            found[j] = Zeros.of(cotangent)
            left[j] = found[j].places
        mixes = operation(node) in MIXING
        product = Product.of(node, gathered[0][1]) if mixes else None
        if not (mixes or nothing):
            self._label_own(node, gathered, found, left)
        for label in labels:
            if not any(rest.numel() for rest in left.values()):
                break
            hits = self._hits(node, gathered, found, left, product, label)
            for j, rest in left.items():
                found[j].label(rest[hits[j]], label)
                left[j] = rest[~hits[j]]
        if mixes and not nothing and any(rest.numel() for rest in left.values()):
            self._label_own(node, gathered, found, left, product)
        if nothing:
            for j, rest in left.items():
                found[j].label(rest, labels[0])
        elif any(rest.numel() for rest in left.values()):
            self._small_or_cancelled(node, gathered, found, left)
        for j, cotangent in pending.items():
            child, at = self.structure.nodes[node][j]
            self._send(child, at, (cotangent, found[j].labels()))

    def _hits(
        self,
        node: Node,
        gathered: Mapping[int, Part],
        found: Mapping[int, Zeros],
        left: Mapping[int, Tensor],
        product: Product | None,
        label: int | None = None,
    ) -> dict[int, Tensor]:
        """Return which of the places that are left a node reaches with random numbers; see NOTE [Labels on
        zeros]. They come in at the zeros of one label, or everywhere."""
        told = None if product is None else product.told(found, left, label)
        if told is not None:
            return told
        if label is None:
            marked = {n: self._like(g) for n, (g, _) in gathered.items()}
        else:
            marked = {
                n: torch.zeros_like(g) if at is None else self._like(g) * is_label(at, label).to(g.dtype)
                for n, (g, at) in gathered.items()
            }
        reached = self._called(node, marked, left)
        return {j: found[j].reached(reached[j], rest) for j, rest in left.items()}

    def _label_own(
        self,
        node: Node,
        gathered: Mapping[int, Part],
        found: Mapping[int, Zeros],
        left: dict[int, Tensor],
        product: Product | None = None,
    ) -> None:
        """Label what is zero because of this node, and take it from what is left."""
        hits = self._hits(node, gathered, found, left, product)
        for j, rest in left.items():
            own = ~hits[j]
            if some(own):
                whole = number_of(own) == found[j].numel
                found[j].label(rest[own], self._number(node, j, "own", whole=whole))
            left[j] = rest[~own]

    def _move(self, node: Node, gathered: Mapping[int, Part], pending: Mapping[int, Tensor]) -> None:
        """Send on what a node only moves to other places, and the labels with it."""
        empty = {n: torch.zeros_like(g, dtype=torch.int16) for n, (g, at) in gathered.items() if at is None}
        labels = {n: empty[n] if at is None else at for n, (_, at) in gathered.items()}
        moved = call_node(node, labels)
        for j, cotangent in pending.items():
            child, number = self.structure.nodes[node][j]
            at = moved[j]
            assert at is not None
            self._send(child, number, (cotangent, at))

    def _small_or_cancelled(
        self,
        node: Node,
        gathered: Mapping[int, Part],
        found: Mapping[int, Zeros],
        left: Mapping[int, Tensor],
    ) -> None:
        """Label what is zero though something came in: see NOTE [Labels on zeros]."""
        top = max((float(g.abs().max()) for g, _ in gathered.values() if g.numel()), default=0.0)
        larger = {n: g / top if top else g for n, (g, _) in gathered.items()}
        seen = self._called(node, larger, left)
        for j, rest in left.items():
            small = found[j].reached(seen[j], rest)
            for kind, where in (("small", rest[small]), ("cancels", rest[~small])):
                if where.numel():
                    found[j].label(where, self._number(node, j, kind))

    def _labels_in(self, gathered: Mapping[int, Part]) -> list[int]:
        """Return the labels of the zeros that come in, the most frequent first."""
        counts: dict[int, int] = {}
        for _, labels in gathered.values():
            if labels is not None:
                for value, number in number_of_each(labels).items():
                    counts[value] = counts.get(value, 0) + number
        counts.pop(0, None)
        return sorted(counts, key=lambda label: -counts[label])[:_MOST]

    def _number(self, node: Node, j: int, how: str, *, whole: bool = False) -> int:
        """Return the label of what a node does to its input number `j`."""
        key = (node, j, how)
        if key not in self._numbers:
            self._numbers[key] = len(self.blames)
            self.blames.append(self.reasons.blame(node, j, how, whole=whole))
        return self._numbers[key]

    # ------------------------------------------------------------------ values

    def _called(self, node: Node, gradients: dict[int, Tensor], asked: Mapping[int, Tensor]) -> dict:
        """Return by number of the input what a node makes of some gradients."""
        results = call_node(node, gradients)
        found: dict[int, Tensor | None] = {}
        for j in asked:
            child, number = self.structure.nodes[node][j]
            given = results[j] if j < len(results) else None
            found[j] = None if given is None else validated(given, child, number, self.structure)
        return found

    def _like(self, gradient: Tensor) -> Tensor:
        """Return random numbers in the form of a gradient, without a draw from the user's generators."""
        if is_distributed(gradient):
            return of_parts(self._like(local(gradient)), gradient)
        return self._random.like(gradient)

    def _fitted(self, given: Tensor, child: Node, number: int) -> tuple[Tensor, Tensor | None]:
        """Return a cotangent in the shape of its tensor, and where it is mere rounding; None if nowhere."""
        cotangent = validated(given, child, number, self.structure)
        if cotangent.layout is not torch.strided:
            return cotangent.to_dense(), None
        if tuple(given.shape) == tuple(cotangent.shape):
            return cotangent, None
        mass = given.abs().sum_to_size(cotangent.shape)
        noise = (mass > 0) & (cotangent.abs() <= _rounding(cotangent) * mass)
        return cotangent, noise if some(noise) else None

    def _cancelled(self, node: Node, j: int, cotangent: Tensor, noise: Tensor) -> Part:
        labels = labelled(noise, self._number(node, j, "cancels"))
        others = is_zero(cotangent) & ~noise
        if some(others):  # all that was summed is zero there
            labels += labelled(others, self._number(node, j, "own"))
        return torch.where(noise, torch.zeros_like(cotangent), cotangent), labels

    def _nothing(self, node: Node, j: int, child: Node, number: int, how: str) -> Part:
        """Return what an input gets to which a node hands back nothing at all."""
        leaf = self.structure.leaves.get(child)
        like = leaf if leaf is not None else input_metadata(child)[number]
        zero = torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)
        label = self._number(node, j, how, whole=True)
        return zero, torch.full(zero.shape, label, dtype=torch.int16, device=zero.device)

    def _send(self, child: Node, number: int, part: Part) -> None:
        self._arriving.setdefault(child, {}).setdefault(number, []).append(part)

    def _gather(self, node: Node, parts: list[Part]) -> Part:
        """Return the sum of what several consumers hand back, with the labels of its zeros."""
        if len(parts) == 1:
            return parts[0]
        whole = parts[0][0]
        for cotangent, _ in parts[1:]:
            whole = whole + cotangent
        if is_distributed(whole):  # parts of another placement cannot be held against it element by element
            parts = [(summed(cotangent, whole), labels) for cotangent, labels in parts]
        total, parts = local(whole), [(local(cotangent), labels) for cotangent, labels in parts]
        mass = sum((cotangent.abs() for cotangent, _ in parts), torch.zeros_like(total.abs()))
        noise = (mass > 0) & (total.abs() <= _rounding(total) * mass)
        zero = noise | is_zero(total)
        if not some(zero):
            return whole, None
        labels = torch.zeros(total.shape, dtype=torch.int16, device=total.device)
        ranks = torch.tensor([self._rank(b) for b in self.blames], dtype=torch.int16, device=total.device)
        best = torch.full(total.shape, len(_RANK) + 1, dtype=torch.int16, device=total.device)
        for _, given in parts:
            if given is not None and given.shape == total.shape:
                rank = ranks[given.int()]
                better = zero & (given > 0) & (rank < best)
                labels, best = torch.where(better, given, labels), torch.where(better, rank, best)
        if some(noise):
            self._altered.add(node)
            labels.masked_fill_(noise, self._number(node, -1, "cancels"))
        return like_parts(torch.where(noise, torch.zeros_like(total), total), whole), labels

    def _rank(self, blame: Blame | None) -> int:
        return len(_RANK) if blame is None or blame.reason not in _RANK else _RANK.index(blame.reason)


def _rounding(tensor: Tensor) -> float:
    return _ROUNDING * torch.finfo(tensor.dtype).eps
