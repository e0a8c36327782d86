"""What a run has found of reach, and the account that it makes of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.layers import owner
from gradflow.functional.reach.arrived import Arrived
from gradflow.functional.reach.blame import Blamed, Walk
from gradflow.functional.reach.masks import is_label, number_of_each
from gradflow.functional.reach.origins import Origins
from gradflow.functional.reach.reasons import Blame, Reasons
from gradflow.functional.reach.slices import block, block_names, by_rows, parts
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.torch_private import num_writes
from gradflow.records import OutsideRecord, ReachAccount, ReachRecord, Reason, TermRecord


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
        cuts: by layer call, the operation that cuts its output off, and the node that takes it; "" where
            nobody takes it.
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
    """

    trainable: Mapping[str, Tensor]
    originals: Mapping[int, str]
    arrived: Arrived = attrs.field(init=False)
    closely: Closely | None = None
    outside: tuple[OutsideRecord, ...] = ()
    terms: tuple[TermRecord, ...] = ()
    failed: str = ""  # why no step could be looked at closely
    _writes: dict[str, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.arrived = Arrived(self.trainable)
        self._writes = {name: num_writes(p) for name, p in self.trainable.items()}

    def fail(self, why: str) -> None:
        """Hear why no step could be looked at closely."""
        self.failed = why

    def learn(self, outside: Sequence[OutsideRecord], terms: Sequence[TermRecord]) -> None:
        """Keep what the graph of the first step showed."""
        self.outside, self.terms = tuple(outside), tuple(terms)

    @property
    def is_open(self) -> bool:
        """Whether a path has led to some parameter, and gradient has not arrived everywhere in it."""
        return bool(self.arrived.faint or self.arrived.partly)

    def look(
        self,
        step: int,
        structure: Structure,
        origins: Origins,
        inputs: Mapping[str, Tensor],
    ) -> None:
        """Find out why gradient did not arrive in a step.

        Args:
            step: its number.
            structure: the graph, with the loss.
            origins: which heard of the step's functions.
            inputs: the tensors of the batch by name.
        """
        try:
            self._look(step, structure, origins, inputs)
        except Exception as error:  # a backward pass of the user's that cannot be called on its own
            self.fail(f"{type(error).__name__}: {error}"[:200])

    def _look(self, step: int, structure: Structure, origins: Origins, inputs: Mapping[str, Tensor]) -> None:
        assert structure.root is not None
        names = {**self.originals, **{id(p): name for name, p in self.trainable.items()}}
        reasons = Reasons(structure, origins, names, {id(t): name for name, t in inputs.items()})
        asked = {*self.arrived.open, *self.arrived.faint}
        wanted = {key for key, name in names.items() if name in asked}
        found = Walk(structure, reasons, wanted).run(structure.root)
        self.closely = Closely(step, _by_name(found, names), found.blames)

    # ----------------------------------------------------------------- the account

    def account(self, wires: Wires) -> ReachAccount:
        """Return the account, at the end of a run."""
        total = sum(p.numel() for p in self.trainable.values())
        unreached = self.arrived.unreached()
        records: list[ReachRecord] = []
        for name in self.trainable:
            mask = unreached.get(name)
            if name in unreached:
                records += self._of(name, mask, wires)
            elif (noise := self._noise(name)) is not None:
                records += self._explained(name, noise, wires)
        left = sum(record.num_elements for record in records)
        return ReachAccount(
            num_elements=total,
            num_reached=total - left,
            unreached=records,
            outside=self.outside,
            terms=self.terms,
            step=self.closely.step if self.closely is not None else -1,
        )

    def _of(self, name: str, mask: Tensor | None, wires: Wires) -> Iterator[ReachRecord]:
        if mask is None:
            whole = torch.ones(self.trainable[name].shape, dtype=torch.bool)
            return self._by_part(name, whole, whole, self._unwired(name, wires), wires)
        noise = self._noise(name)
        return self._explained(name, mask if noise is None else noise, wires)

    def _noise(self, name: str) -> Tensor | None:
        """Return a full mask where all of a parameter's gradient is zero or rounding, by mathematics."""
        labels = self.closely.labels.get(name) if self.closely is not None else None
        if labels is None or not labels.numel():
            return None
        assert self.closely is not None
        blames = [self.closely.blames[label] for label in number_of_each(labels)]
        if any(blame is None or blame.reason is not Reason.BY_MATHEMATICS for blame in blames):
            return None
        return torch.ones(labels.shape, dtype=torch.bool)

    def _explained(self, name: str, mask: Tensor, wires: Wires) -> Iterator[ReachRecord]:
        """Yield the unreached parts of a parameter to which a path led, by what the closer look showed."""
        labels = self.closely.labels.get(name) if self.closely is not None else None
        if labels is None or self.closely is None:
            seen = self.closely is not None
            blame = self._unwired(name, wires) if seen else Blame(Reason.UNEXPLAINED)
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
        unwired = name not in self.arrived.partly  # an optimizer does not step it
        names = block_names(wires.modules.get(layer), name)
        shape = tuple(parameter.shape)
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
                moved=unwired and num_writes(parameter) != self._writes[name],
                step=self.closely.step if self.closely is not None else -1,
                **attrs.asdict(blame),
            )

    def _unwired(self, name: str, wires: Wires) -> Blame:
        """Return why no path leads to a parameter: nobody ran its module, or something cuts it off."""
        layer = owner(name, wires.modules)
        if layer in wires.idle or (layer not in wires.called and layer in wires.modules and layer):
            return Blame(Reason.NOT_CALLED, op="copy" if layer in wires.copied else "")
        op, at = wires.cuts.get(layer, ("", ""))
        return Blame(Reason.CUT, at=at, layer_at=layer, op=op)


def _by_name(found: Blamed, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Return the labels by parameter; where it and the user's original of it are used, both must be zero."""
    labels: dict[str, Tensor] = {}
    for key, given in found.labels.items():
        name, given = names[key], given.cpu()
        known = labels.get(name)
        labels[name] = given if known is None else torch.where(known > 0, torch.where(given > 0, given, 0), 0)
    return labels
