"""Why one node of autograd's hands back nothing: its kind, where it stands, and what decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from gradflow.functional.processes.shards import local
from gradflow.functional.reach.kinds import ADDED, VIEWS, Kind, is_over_one, kind_of
from gradflow.functional.reach.origins import Function, Origin, Origins
from gradflow.functional.reverse.autograd_graph import Structure, Windows
from gradflow.functional.tap.nodes import Node, converts, feeds, is_leaf, nodes_under, operation
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.torch_private import input_metadata
from gradflow.records import Reason


@attrs.frozen
class Blame:
    """What makes zeros of a gradient; the fields are those of `ReachRecord`."""

    reason: Reason
    at: str = ""
    layer_at: str = ""
    op: str = ""
    whose: str = ""
    source: str = ""
    num_choices: int = 0


Part = tuple[Tensor, Tensor | None]  # a cotangent, and the labels of its zeros; None if it has none


@attrs.frozen(eq=False)
class Blamed:
    """What the walk found at the leaves.

    Args:
        labels: by id of a leaf tensor, the label of each of its elements, 0 where gradient arrived.
        blames: what each label stands for; the first stands for none.
    """

    labels: dict[int, Tensor]
    blames: list[Blame | None]


@attrs.frozen(eq=False)
class Behind:
    """What the walk through the next stage of a pipeline has found at what this one has handed it.

    Args:
        parts: for each output to which a path leads, the cotangent and the labels of its zeros.
        blames: what the labels stand for.
    """

    parts: Sequence[Part]
    blames: Sequence[Blame | None]


_MARK = "\x1f"


def marked(blame: Blame, stage: int) -> Blame:
    """Return a blame whose names of nodes tell which stage of a pipeline they are of."""

    def of(name: str) -> str:
        return name if not name or _MARK in name else f"{name}{_MARK}{stage}"

    return attrs.evolve(blame, at=of(blame.at), whose=of(blame.whose))


def unmarked(name: str) -> tuple[str, int | None]:
    """Return a name, and the stage that it is of, where that is told.

    >>> unmarked(marked(Blame(Reason.OFF, at="relu"), 1).at), unmarked("relu")
    (('relu', 1), ('relu', None))
    """
    plain, _, stage = name.partition(_MARK)
    return plain, int(stage) if stage else None


@attrs.define(eq=False)
class Reasons:
    """Tells why nodes of one step's graph hand back nothing.

    Args:
        structure: the graph.
        origins: what the tensors without a gradient were made of.
        names: of the parameters, by the id of their tensor.
        inputs: names of the batch's tensors, by their id.
    """

    structure: Structure
    origins: Origins
    names: Mapping[int, str]
    inputs: Mapping[int, str]
    _behind: set[Node] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._behind = _of_the_loss(self.structure)

    def blame(self, node: Node, j: int, how: str, *, whole: bool = False) -> Blame:
        """Return what a node does to its input number `j`.

        Args:
            node: the node.
            j: −1 for what happens where its consumers meet.
            how: `own`, `small` or `cancels`, see NOTE [Labels on zeros] in blame.py; `nothing` where it
                returns None.
            whole: whether all of that input's gradient is zero because of it.
        """
        group = self.structure.group_of.get(node, "")
        place = Blame(
            Reason.UNEXPLAINED, at=group, layer_at=self._layer_at(node, group), op=self._op_name(node)
        )
        if how == "small":
            return attrs.evolve(place, reason=Reason.UNDERFLOW)
        if how == "nothing":
            return attrs.evolve(place, reason=Reason.CUT)
        if how == "cancels":
            return attrs.evolve(place, reason=Reason.BY_MATHEMATICS)
        found = self._own(node, j, place)
        if node in self._behind and self._is_of_loss(found, whole):
            return attrs.evolve(found, reason=Reason.NO_LOSS)
        return found

    def _is_of_loss(self, found: Blame, whole: bool) -> bool:
        """Whether a zero that is made behind the model means that the loss hands back nothing."""
        if found.op in ("mul", "div") and found.source in ("constant", ""):
            return False  # a weight of zero on a term
        return whole or found.reason is Reason.OFF

    def _own(self, node: Node, j: int, place: Blame) -> Blame:
        kind, function = kind_of(node), self.origins.of(node)
        metadata = input_metadata(node)
        if any(0 in tuple(m.shape) for m in metadata[:1]):
            return self._empty(node, place)
        if kind is Kind.STEP:
            return attrs.evolve(place, reason=Reason.CUT)
        if kind is Kind.PART:
            child, _ = feeds(node)[j]
            bounds = operation(node) in ("slice", "narrow") and self._is_parameter(child)
            return attrs.evolve(place, reason=Reason.UNCHOSEN_BY_DATA if bounds else Reason.CUT)
        if kind is Kind.CHOICE:
            return self._choice(function, place)
        if kind is Kind.SLOPE:
            return self._slope(node, function, place)
        shape = tuple(metadata[0].shape) if metadata else ()
        if kind is Kind.NORMALISED and (j == 0 or "softmax" in operation(node)):
            if function is not None and function.masked:
                return attrs.evolve(place, reason=Reason.UNCHOSEN_BY_DATA)
            saturated = "softmax" in operation(node) and not is_over_one(node, shape)
            return attrs.evolve(place, reason=Reason.UNDERFLOW if saturated else Reason.BY_MATHEMATICS)
        return self._factor(node, j, function, place)

    def _slope(self, node: Node, function: Function | None, place: Blame) -> Blame:
        """Say whether a function is off, or an own one of the user's picks by an index."""
        custom = isinstance(node, torch.autograd.function.BackwardCFunction)
        if custom and function is not None and any(_is_whole(t) for t in function.still):
            return self._choice(function, place)
        return attrs.evolve(place, reason=Reason.OFF)

    def _choice(self, function: Function | None, place: Blame) -> Blame:
        still = function.still if function is not None else ()
        chosen = [t for t in still if _is_whole(t)]
        if not chosen:
            return attrs.evolve(place, reason=Reason.UNCHOSEN_BY_MODEL, source="model")
        last = max(chosen, key=lambda t: self.origins.past(t).origin)
        past = self.origins.past(last)
        by_model = past.origin is Origin.MODEL
        return attrs.evolve(
            place,
            reason=Reason.UNCHOSEN_BY_MODEL if by_model else Reason.UNCHOSEN_BY_DATA,
            whose=self.inputs.get(id(last), past.maker),
            source=past.origin.name.lower(),
            num_choices=max(t.numel() for t in chosen),
        )

    def _empty(self, node: Node, place: Blame) -> Blame:
        """Say who left a node nothing to work on."""
        for below in nodes_under([node], nearest_first=True):
            if below is not node and kind_of(below) is Kind.CHOICE and not is_leaf(below):
                found = self._choice(self.origins.of(below), place)
                return attrs.evolve(found, at=self.structure.group_of.get(below, ""), op=operation(below))
        return attrs.evolve(place, reason=Reason.UNCHOSEN_BY_DATA, whose="nothing entered it")

    def _factor(self, node: Node, j: int, function: Function | None, place: Blame) -> Blame:
        place = attrs.evolve(place, reason=Reason.ZERO_FACTOR)
        still = function.still if function is not None else ()
        begins = _is_one_step(node) and any(map(_is_nothing, still))
        for k, (child, _) in enumerate(() if begins else feeds(node)):
            if k not in (j, *ADDED.get(operation(node), ())) and child is not None:
                return attrs.evolve(place, whose=self._name_of(child), source=self._source_of(child))
        zeros = [here for t in still if (here := local(t)).numel() and not bool(here.all())]
        if not zeros:
            return place
        factor = min(zeros, key=lambda t: float(t.count_nonzero()) / t.numel())
        past = self.origins.past(factor)
        return attrs.evolve(
            place,
            whose=self.inputs.get(id(factor), past.emptied() or past.maker),
            source=past.origin.name.lower(),
        )

    # ------------------------------------------------------------------- names

    def _op_name(self, node: Node) -> str:
        if is_leaf(node):
            return "sum of its uses"
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return operation(node).removesuffix("_backward")
        return operation(node)

    def _is_parameter(self, node: Node) -> bool:
        found = self._source(node)
        return is_leaf(found) and id(found.variable) in self.names

    def _source(self, node: Node) -> Node:
        """Return the node behind what only changes the form of a tensor."""
        while not is_leaf(node) and not is_probe(node) and (operation(node) in VIEWS or converts(node)):
            child = next((c for c, _ in feeds(node) if c is not None), None)
            if child is None:
                break
            node = child
        return node

    def _name_of(self, node: Node) -> str:
        found = self._source(node)
        if is_leaf(found):
            return self.names.get(id(found.variable), self.inputs.get(id(found.variable), ""))
        return self.structure.group_of.get(found, "")

    def _source_of(self, node: Node) -> str:
        return "parameter" if self._is_parameter(node) else "model"

    def _layer_at(self, node: Node, group: str) -> str:
        """Return the layer call that a node is in, or else whose output it takes."""
        groups = self.structure.groups
        if group in groups and groups[group].call is not None:
            return groups[group].call.name  # type: ignore[union-attr]
        for below in nodes_under([node], stops=is_probe, nearest_first=True):
            if is_probe(below):
                call = groups[self.structure.group_of[below]].call
                return call.name if call is not None else ""
        return ""


def _is_whole(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _is_one_step(node: Node) -> bool:
    """Whether a node is the kernel of a whole recurrent layer that makes a single step in time."""
    metadata = input_metadata(node)
    shape = tuple(metadata[0].shape) if metadata else ()
    return "rnn" in operation(node) and len(shape) == 3 and shape[0] == 1


def _is_nothing(tensor: Tensor) -> bool:
    """Whether a tensor of numbers holds some, and all of them are zero."""
    here = local(tensor)
    return not _is_whole(tensor) and here.numel() > 0 and not bool(here.any())


def _of_the_loss(structure: Structure) -> set[Node]:
    """Return the nodes behind the last layers that no module of the model made: those of the loss.

    Where the model computes its loss itself, those that the model's own code made.
    """
    windows = Windows(structure.calls)
    root = next(iter(structure.nodes), None)
    last = windows.innermost(root) if root is not None else None
    own = last.index if last is not None and last.has_children else -1

    def inside(node: Node) -> bool:
        call = windows.innermost(node)
        return call is not None and call.index != own

    def ends(node: Node) -> bool:
        return is_probe(node) or is_leaf(node) or inside(node)

    reached: Iterator[Node] = nodes_under([root], stops=ends) if root is not None else iter(())
    return {node for node in reached if not ends(node)}
