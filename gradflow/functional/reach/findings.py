"""What a run has found of reach, and the account that it makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import ProcessError
from gradflow.functional.model.layers import owner
from gradflow.functional.processes.line import Line
from gradflow.functional.processes.shards import Shards, is_distributed, local
from gradflow.functional.processes.stages import Stages
from gradflow.functional.reach.arrived import Arrived
from gradflow.functional.reach.blame import Walk
from gradflow.functional.reach.masks import is_label, number, number_of_each, relative_size, some
from gradflow.functional.reach.origins import Origins
from gradflow.functional.reach.reasons import Behind, Blame, Blamed, Reasons, marked
from gradflow.functional.reach.rounding import add_rounding
from gradflow.functional.reach.slices import block, block_names, by_rows, parts
from gradflow.functional.reach.terms import deaf_functions, has_own_functions
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.tap.nodes import Position
from gradflow.functional.torch_private import num_writes
from gradflow.functional.torch_sharded import place_of
from gradflow.records import DeafRecord, OutsideRecord, ReachAccount, ReachRecord, Reason, TermRecord


@attrs.define(eq=False)
class Closely:
    """What one step showed that was looked at closely.

    Args:
        step: its number.
        labels: by name of a parameter, the labels of its elements, on the host; see blame.py.
        blames: what the labels stand for.
    """

    step: int
    labels: dict[str, Tensor]
    blames: list[Blame | None]


@attrs.frozen(eq=False)
class Wires:
    """What the wiring says of parameters to which no path leads.

    Args:
        idle: modules that no step ran or used.
        called: modules that some step ran.
        cuts: by layer call, the operation that cuts its output off, and the node that takes it, or "".
        modules: by qualified name.
        copied: names of modules that are like one that ran and is no part of the model.
    """

    idle: Collection[str]
    called: Collection[str]
    cuts: Mapping[str, tuple[str, str]]
    modules: Mapping[str, nn.Module]
    copied: Collection[str] = ()


@attrs.define(eq=False)
class ReachFindings:
    """At which numbers gradient has arrived so far, and what else bears on it.

    Args:
        trainable: the trainable working parameters by name.
        originals: names of the user's own parameters by their id.
        shards: those of the parameters that are spread over processes.
        line: to these.
        stages: the way along the stages of a pipeline, from the last of which zeros are explained.
    """

    trainable: Mapping[str, Tensor]
    originals: Mapping[int, str]
    shards: Shards = attrs.field(factory=Shards)
    line: Line = attrs.field(factory=Line)
    stages: Stages = attrs.field(factory=Stages)
    arrived: Arrived = attrs.field(init=False)
    closely: Closely | None = None
    outside: tuple[OutsideRecord, ...] = ()
    terms: tuple[TermRecord, ...] = ()
    deaf: tuple[DeafRecord, ...] = ()
    asks: bool = False  # whether functions of the user's are still to be asked what they heed
    failed: str = ""  # why no step could be looked at closely
    _writes: dict[str, int] = attrs.field(init=False)
    _partly: set[str] = attrs.field(factory=set)  # to which a path has led
    _elsewhere: bool = False  # whether something is open on a stage of a pipeline
    _asked: set[str] | None = None  # what is open on any process, where that had to be agreed on

    def __attrs_post_init__(self) -> None:
        self.arrived = Arrived({name: local(p) for name, p in self.trainable.items()})
        self._writes = {name: num_writes(local(p)) for name, p in self.trainable.items()}

    def fail(self, why: str) -> None:
        """Hear why no step could be looked at closely."""
        self.failed = why

    def learn(
        self, structure: Structure | None, outside: Sequence[OutsideRecord], terms: Sequence[TermRecord]
    ) -> None:
        """Keep what the graph of the first step showed."""
        self.outside, self.terms = tuple(outside), tuple(terms)
        self.asks = self.is_alone and has_own_functions(structure)

    @property
    def is_alone(self) -> bool:
        """Whether no other process has a part of the graph."""
        return self.line.alone and self.stages.alone and not self.shards

    def ask(self, structure: Structure | None) -> None:
        """Find out which functions of the user's do not heed the gradient that they are handed."""
        if not self.asks or structure is None or structure.root is None:
            return
        self.asks = False
        with contextlib.suppress(Exception):  # one that cannot be called on its own
            self.deaf = tuple(deaf_functions(structure))

    @property
    def is_open(self) -> bool:
        """Whether a path has led to some parameter, and gradient has not arrived everywhere in it."""
        if self._asked is not None and self.shards:
            return bool(self._asked) or self._elsewhere
        return bool(self.arrived.faint or self.arrived.partly) or self._elsewhere

    def agree(self) -> None:
        """Agree with the other processes on what is open, where each knows of its slices alone."""
        if self.shards:
            known = {*self.arrived.faint, *self.arrived.partly}
            found = self.shards.any(self.line, [name in known for name in self.trainable])
            self._asked = {name for name, flag in zip(self.trainable, found, strict=True) if flag}
        self._elsewhere = not self.stages.alone and self.stages.any(self.is_open)

    def look(
        self,
        step: int,
        structure: Structure | None,
        origins: Origins,
        inputs: Mapping[str, Tensor],
        known: Mapping[Position, Tensor] | None = None,
    ) -> None:
        """Find out why gradient did not arrive in a step.

        Args:
            step: its number.
            structure: the graph, with the loss; None where there is none.
            origins: which heard of the step's functions.
            inputs: the tensors of the batch by name.
            known: what the reverse pass has handed back; see NOTE [Products that are not called].
        """
        behind, entering, blames = self._behind(), [], []
        try:
            if structure is not None and structure.nodes:
                entering, blames = self._look(step, structure, origins, inputs, behind, known or {})
        except ProcessError:
            raise
        except Exception as error:  # a backward pass of the user's that cannot be called on its own
            self.fail(f"{type(error).__name__}: {error}"[:200])
        self._hand_back(entering, blames)

    def _behind(self) -> Behind | None:
        """Return what the next stage of a pipeline has found at what this one handed it; None of the last."""
        if self.stages.is_last:
            return None
        cotangents, found = self.stages.cotangents(), self.stages.receive(1)
        tensors, (there, blames) = found if found is not None else ([], ([], [None]))
        labels = iter(tensors)
        known = [next(labels) if known else None for known in there] or [None] * len(cotangents)
        parts = [(c, at) for c, at in zip(cotangents, known, strict=True) if c is not None]
        return Behind(parts, blames)

    def _hand_back(self, labels: Sequence[Tensor | None], blames: Sequence[Blame | None]) -> None:
        """Hand the stage before what was found at what it has handed on; nothing where nobody looked."""
        if not self.stages.is_first:
            told = [None if blame is None else marked(blame, self.stages.index) for blame in blames]
            there = [known is not None for known in labels]
            tensors = [known for known in labels if known is not None]
            self.stages.send(-1, tensors if labels else None, (there, told))

    def _look(
        self,
        step: int,
        structure: Structure,
        origins: Origins,
        inputs: Mapping[str, Tensor],
        behind: Behind | None,
        known: Mapping[Position, Tensor],
    ) -> tuple[list[Tensor | None], list[Blame | None]]:
        assert structure.root is not None
        leaves = {**self.trainable, **self.shards.leaves()}
        names = {**self.originals, **{id(p): name for name, p in leaves.items()}}
        reasons = Reasons(structure, origins, names, {id(t): name for name, t in inputs.items()})
        asked = {*self.arrived.open, *self.arrived.faint, *(self._asked or ())}
        wanted = {key for key, name in names.items() if name in asked}
        entering = self.stages.inputs
        wanted |= {id(tensor) for tensor in entering}
        found = Walk(structure, reasons, wanted, known).run(structure.root, behind)
        at_entry = [found.labels.pop(id(tensor), None) for tensor in entering]
        labels = _by_name(found, names)
        few = sum(p.numel() for name, p in self.trainable.items() if name in labels) <= _CHUNK
        for name, leaf in leaves.items():
            if name in labels and name in self.shards.spread:
                labels[name] = self._at_hand(name, leaf, labels[name], whole=few)
        if self.is_alone:
            faint = {name: leaves[name] for name in sorted(self.arrived.faint) if name in labels}
            with contextlib.suppress(Exception):  # a backward pass of the user's that can be called once
                add_rounding(structure, faint, labels, found.blames)
        self.closely = Closely(step, labels, found.blames)
        return at_entry, found.blames

    def _at_hand(self, name: str, leaf: Tensor, labels: Tensor, *, whole: bool) -> Tensor:
        """Return labels of a whole parameter, or, where many are kept, those of the slice of this process."""
        if is_distributed(leaf):  # what was gathered is itself a part
            full = torch.zeros(leaf.shape, dtype=torch.int16)
            full[place_of(leaf)] = labels
            labels = full
        return labels if whole else labels[place_of(self.shards.spread[name])].clone()

    # ----------------------------------------------------------------- the account

    def account(self, wires: Wires) -> ReachAccount:
        """Return the account, at the end of a run."""
        records: list[ReachRecord] = []
        for names, unreached, closely in self._together():
            self.closely = closely
            self._partly = self._partly | {name for name, mask in unreached.items() if mask is not None}
            for name in names:
                mask = unreached.get(name)
                if name in unreached:
                    records += self._of(name, mask, wires)
                elif (noise := self._noise(name)) is not None:
                    records += self._explained(name, noise, wires)
        left = sum(record.num_elements for record in records)
        total = sum(p.numel() for p in self.trainable.values())
        return ReachAccount(
            num_elements=total,
            num_reached=total - left,
            unreached=records,
            outside=self.outside,
            terms=self.terms,
            deaf=self.deaf,
            step=self.closely.step if self.closely is not None else -1,
        )

    def _together(self) -> Iterator[tuple[list[str], dict[str, Tensor | None], Closely | None]]:
        """Yield the names of parameters, their masks of what is unreached, and what a step showed of these.

        Of sharded ones some at a time, so that little of them is whole at once.
        """
        unreached, closely = self.arrived.unreached(), self.closely
        self._partly = set(self.arrived.partly)
        if not self.shards:
            yield list(self.trainable), unreached, closely
            return
        names, told = list(self.trainable), self._blames()
        kinds = self.shards.largest(
            self.line, [0 if n not in unreached else 2 if unreached[n] is None else 1 for n in names]
        )
        labelled = self.shards.any(
            self.line, [closely is not None and name in closely.labels for name in names]
        )
        kind_of = dict(zip(names, kinds, strict=True))
        seen = {name for name, flag in zip(names, labelled, strict=True) if flag}
        for chunk in self._chunks([name for name in names if kind_of[name] or name in seen]):
            masks = {n: mask for n in chunk if (mask := unreached.get(n)) is not None}
            found = self.shards.whole(self.line, masks, [n for n in chunk if kind_of[n] == 1])
            every = {n: found[n].bool() if n in found else None for n in chunk if kind_of[n]}
            yield chunk, every, self._shared(closely, told, [n for n in chunk if n in seen])

    def _chunks(self, names: Sequence[str]) -> Iterator[list[str]]:
        chunk: list[str] = []
        for name in names:
            if chunk and sum(self.trainable[n].numel() for n in (*chunk, name)) > _CHUNK:
                yield chunk
                chunk = []
            chunk.append(name)
        if chunk:
            yield chunk

    def _blames(self) -> list[Blame]:
        """Return what the labels of all processes stand for, what says more later."""
        every = self.line.gathered([] if self.closely is None else self.closely.blames)
        return sorted({b for blames in every for b in blames if b is not None}, key=_says)[-_MOST:]

    def _shared(self, mine: Closely | None, blames: Sequence[Blame], names: Sequence[str]) -> Closely | None:
        """Return the labels of all processes together: where they differ, that which says more."""
        number = {blame: i for i, blame in enumerate(blames, 1)}
        parts: dict[str, Tensor] = {}
        for name in names:
            labels = mine.labels.get(name) if mine is not None else None
            if mine is not None and labels is not None:
                parts[name] = torch.zeros(labels.shape, dtype=torch.uint8)
                for old in labels.unique().tolist():
                    blame = mine.blames[old]
                    parts[name][labels == old] = 0 if blame is None else number.get(blame, 0)
        found = self.shards.whole(self.line, parts, names)
        step = self.shards.largest(self.line, [0 if mine is None else 1])[0]
        if not step:
            return None
        return Closely(
            -1 if mine is None else mine.step, {n: p.short() for n, p in found.items()}, [None, *blames]
        )

    def _of(self, name: str, mask: Tensor | None, wires: Wires) -> Iterator[ReachRecord]:
        if mask is None:
            whole = torch.ones(self.trainable[name].shape, dtype=torch.bool)
            return self._by_part(name, whole, whole, self._unwired(name, wires), wires)
        noise = self._noise(name)
        return self._explained(name, mask if noise is None else mask | noise, wires)

    def _noise(self, name: str) -> Tensor | None:
        """Return where a parameter's gradient is rounding or zero by mathematics, if the rest of it is zero;
        None if it is not, or if there is no such place."""
        labels = self.closely.labels.get(name) if self.closely is not None else None
        if labels is None or not labels.numel() or some(is_label(labels, 0)):
            return None
        assert self.closely is not None
        blames = [self.closely.blames[label] for label in number_of_each(labels)]
        if any(blame is None for blame in blames):
            return None
        cancels = [i for i, b in enumerate(self.closely.blames) if b and b.reason is Reason.BY_MATHEMATICS]
        noise = torch.isin(labels, torch.tensor(cancels, dtype=labels.dtype))
        return noise if some(noise) else None

    def _explained(self, name: str, mask: Tensor, wires: Wires) -> Iterator[ReachRecord]:
        """Yield the unreached parts of a parameter to which a path led, by what the closer look showed."""
        labels = self.closely.labels.get(name) if self.closely is not None else None
        if labels is None or self.closely is None:
            blame = self._unwired(name, wires)
            if self.closely is None or not blame.op:  # a path led there, in another step than was looked at
                blame = Blame(Reason.UNEXPLAINED)
            yield from self._by_part(name, mask, mask, blame, wires)
            return
        labels = by_rows(labels, mask)
        by_blame: dict[Blame, Tensor] = {}
        for label in number_of_each(labels, mask):
            blame = self.closely.blames[label] or Blame(Reason.UNEXPLAINED)
            here = mask & is_label(labels, label)
            by_blame[blame] = by_blame[blame] | here if blame in by_blame else here
        for blame, here in by_blame.items():
            yield from self._by_part(name, here, mask, blame, wires)

    def _by_part(
        self, name: str, mask: Tensor, unreached: Tensor, blame: Blame, wires: Wires
    ) -> Iterator[ReachRecord]:
        parameter, layer = self.trainable[name], owner(name, wires.modules)
        unwired = name not in self._partly  # an optimizer does not step it
        names = block_names(wires.modules.get(layer), name)
        shape = tuple(parameter.shape)
        off = blame.reason is Reason.OFF and 2 * number(unreached) >= unreached.numel()  # else nobody asks
        for part in parts(mask, unreached):
            yield ReachRecord(
                parameter=name,
                layer=layer,
                shape=shape,
                axis=part.axis,
                slices=part.slices,
                num_slices=part.num_slices,
                num_elements=part.num_elements,
                block=block(part, shape, names),
                moved=unwired and num_writes(local(parameter)) != self._writes[name],
                step=self.closely.step if self.closely is not None else -1,
                larger=relative_size(parameter, mask, unreached) if off else float("nan"),
                **attrs.asdict(blame),
            )

    def _unwired(self, name: str, wires: Wires) -> Blame:
        """Return why no path leads to a parameter: nobody ran its module, or something cuts it off."""
        layer = owner(name, wires.modules)
        if layer in wires.idle or (layer not in wires.called and layer in wires.modules and layer):
            return Blame(Reason.NOT_CALLED, op="copy" if layer in wires.copied else "")
        op, at = wires.cuts.get(layer, ("", ""))
        return Blame(Reason.CUT, at=at, layer_at=layer, op=op)


_MOST = 255  # blames that a byte tells apart
_CHUNK = 2**22  # elements of sharded parameters that are told of at once
_LITTLE = (Reason.UNEXPLAINED, Reason.UNCHOSEN_BY_DATA, Reason.UNCHOSEN_BY_MODEL, Reason.BY_MATHEMATICS)


def _says(blame: Blame) -> tuple[Any, ...]:
    """Return an order in which a reason comes the later, the more it says: on some processes nothing has come
    to where others know why it ends."""
    little = _LITTLE.index(blame.reason) if blame.reason in _LITTLE else len(_LITTLE)
    return (little, *(str(value) for value in attrs.astuple(blame)))


def _by_name(found: Blamed, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return the labels by parameter; where it and the user's original of it are used, both must be zero."""
    labels: dict[str, Tensor] = {}
    for key, given in found.labels.items():
        name, given = names[key], given.cpu()
        known = labels.get(name)
        labels[name] = given if known is None else torch.where(known > 0, torch.where(given > 0, given, 0), 0)
    return labels
