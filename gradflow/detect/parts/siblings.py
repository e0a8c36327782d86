"""Blocks that differ from their siblings: in the size of a matrix or a gain, in what they add or keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs
import numpy as np

from gradflow.detect.evidence import at_look, late
from gradflow.detect.parts.peers import FEWEST, Odd, standing_apart, type_of
from gradflow.records import (
    BlockRecord,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    MatrixRecord,
    ParameterRecord,
)

_ONE = (0.8, 1.25)  # root mean square of what a norm gives that ends a block, whatever entered
_GROWN = 1.5  # a block whose output is larger than that against its input buries it
_THIRDS = (" (first third of its rows)", " (second third of its rows)", " (last third of its rows)")


def uneven_siblings(
    factor: float = 4.0, *, gain: float = 2.0, added: float = 8.0, lost: float = 0.25, severe: float = 4.0
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of blocks that differ from their siblings.

    Measured: of blocks that a model repeats, the root mean square of every weight matrix and of its thirds
    where it is fused, of every norm's gain, what the block adds to its input and how much of the input it
    keeps; at the first step and at the last.

    Why this is evidence: blocks of one model are made by one piece of code, initialised alike, and trained
    by one loss. What is off in one of them by a factor, and by several times what the others differ among
    each other, is of other making (a wrong initialisation, a checkpoint that was loaded in part, a scale
    that is applied twice). No threshold for the kind of layer is needed.

    Looks alike and is not: trained blocks, which differ from each other, first and last ones most: so the
    factor counts in terms of how much the others differ; initialisations that shrink with depth, likewise;
    layers that differ in shape; differences that training takes away or turns round within the run, and
    what it makes of a block that starts at zero; what no gradient comes back to; a first block whose norm
    makes a small input as large as the norms behind all others make theirs.

    Args:
        factor: by which a matrix is off. Trained models stay within 3.
        gain: by which the gain of a norm layer is off.
        added: by which what the block adds is off.
        lost: share of what its siblings keep of their input, below which a block has lost it.
        severe: by how much more than these makes it HIGH.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        groups: dict[str, list[BlockRecord]] = {}
        for block in record.parts.blocks:
            groups.setdefault(f"{block.group}:{block.type}", []).append(block)
        for blocks in groups.values():
            if len(blocks) >= FEWEST:
                yield from _parameters(record, blocks, factor, gain, severe)
                yield from _streams(record, blocks, added, lost, severe)

    return detector


# ------------------------------------------------------------------------------------ parameters


@attrs.frozen
class _Size:
    """The root mean square of a parameter, or a third of it, at the first step and the last."""

    parameter: ParameterRecord
    part: str
    first: float
    last: float


def _parameters(
    record: FlowRecord, blocks: Sequence[BlockRecord], factor: float, gain: float, severe: float
) -> Iterator[Issue]:
    norms = {norm.name for norm in record.parts.norms}
    fused = {matrix.name: matrix for matrix in record.parts.matrices}
    sizes: dict[tuple[str, tuple[int, ...], str], dict[str, _Size]] = {}
    for block in blocks:
        prefix = f"{block.name}."
        for parameter in record.parameters:
            if parameter.name.startswith(prefix):
                for size in _sizes(parameter, fused.get(parameter.name)):
                    key = (parameter.name.removeprefix(prefix), parameter.shape, size.part)
                    sizes.setdefault(key, {})[block.name] = size
    for (_, shape, part), found in sizes.items():
        parameter = next(iter(found.values())).parameter
        is_gain = parameter.layer in norms and parameter.name.endswith(("weight", "scale", "gamma"))
        if len(shape) < 2 and not is_gain:
            continue
        odd = _both({n: s.first for n, s in found.items()}, {n: s.last for n, s in found.items()},
                    gain if is_gain else factor)  # fmt: skip
        for name, one in odd.items():
            issue = _parameter_issue(found[name].parameter, part, one, is_gain, gain if is_gain else factor,
                                     severe, len(found) - 1)  # fmt: skip
            yield attrs.evolve(issue, layer_type=type_of(record, issue.layer))


def _sizes(parameter: ParameterRecord, fused: MatrixRecord | None) -> Iterator[_Size]:
    scale = 1.0 / math.sqrt(max(parameter.num_elements, 1))
    if fused is not None and fused.rms.shape[1] == 3 and len(fused.rms):
        for third, part in enumerate(_THIRDS):
            yield _Size(parameter, part, float(fused.rms[0, third]), float(fused.rms[-1, third]))
    elif len(parameter.norm):
        first, last = (float(parameter.norm[i]) * scale for i in (0, -1))
        yield _Size(parameter, "", first, last)


def _both(first: Mapping[str, float], last: Mapping[str, float], factor: float) -> dict[str, Odd]:
    """Return what stands apart at the end, and did so at the start, to the same side.

    What began at zero and no longer is zero was made to start from nothing, and has started.
    """
    before, found = standing_apart(first, factor), standing_apart(last, factor)
    return {n: o for n, o in found.items() if n in before and _as_before(before[n], o)}


def _as_before(first: Odd, last: Odd) -> bool:
    started = first.value == 0 < last.value
    return not started and (first.ratio > 1) == (last.ratio > 1)


def _parameter_issue(
    parameter: ParameterRecord, part: str, odd: Odd, is_gain: bool, factor: float, severe: float, others: int
) -> Issue:
    what = "gain" if is_gain else "weights"
    short = parameter.name.rpartition(".")[2]
    if odd.value == 0:
        kind, told = IssueType.DEAD, "zero"
    elif odd.ratio > 1:
        kind, told = IssueType.EXPLODING, f"{odd.ratio:.2g} times as large as"
    else:
        kind, told = IssueType.VANISHING, f"{1 / odd.ratio:.2g} times smaller than"
    apart = math.inf if odd.value == 0 else max(odd.ratio, 1 / odd.ratio)
    comparison = (
        f"is zero, where that of its siblings is {odd.usual:.3g}"
        if odd.value == 0
        else f"is {odd.value:.3g}, {told} that of its siblings ({odd.usual:.3g})"
    )
    held = "" if parameter.trainable else " It is not trained, so it stays so."
    return Issue(
        layer=parameter.layer,
        layer_type="",
        issue_type=kind,
        severity=IssueSeverity.HIGH if apart >= severe * factor else IssueSeverity.MEDIUM,
        description=f"The root mean square of its {short}{part} {comparison}: the same parameter of {others} "
        f"other blocks, which agree among themselves.{held}",
        magnitude=odd.ratio,
        recommended_actions=(
            f"Initialise {parameter.name} like the same {what} of the other blocks.",
            "Look for what treats this block differently: an initialisation by name or index, a checkpoint "
            "that holds only some of the blocks, a scale that is applied twice.",
        ),
        metrics={"parameter": parameter.name, "rms": odd.value, "siblings": odd.usual, "ratio": odd.ratio},
    )


# --------------------------------------------------------------------------------------- streams


def _streams(
    record: FlowRecord, blocks: Sequence[BlockRecord], factor: float, lost: float, severe: float
) -> Iterator[Issue]:
    """Judge what blocks keep of their input and add to it."""
    without = {block.name for block in blocks if _is_lost(block, blocks, lost)}
    for block in blocks:
        if block.name in without:
            yield _lost_issue(block, blocks)
    added = [{b.name: at_look(b.added, i) for b in blocks if b.name not in without} for i in (0, -1)]
    types = {b.name: b.type for b in blocks}
    behind_norms = all(_ONE[0] <= _given(b, at) <= _ONE[1] for b in blocks for at in (0, -1))
    for name, odd in {} if behind_norms else _both(added[0], added[1], factor).items():
        if not _is_unread(record, name, odd) and not _gives_elsewhere(record, name, odd):
            yield _added_issue(name, types[name], odd, factor, severe, len(blocks) - 1)


def _given(block: BlockRecord, at: int) -> float:
    """Return the root mean square of what a block gives, by |y − x|² = |x|² + |y|² − 2⟨x, y⟩."""
    growth = at_look(block.growth, at)
    entering = at_look(block.added, at) / math.sqrt(max(1 + growth**2 - 2 * at_look(block.kept, at), 1e-12))
    return growth * entering


def _is_unread(record: FlowRecord, block: str, odd: Odd) -> bool:
    """Whether what is large in a block is what no gradient comes back to: rows that nothing reads."""
    inside = (layer for layer in record.layers if layer.module.startswith(f"{block}."))
    return any(
        late(layer.output_rms) >= odd.value / 2 and not np.any(layer.grad_norm > 0) for layer in inside
    )


def _gives_elsewhere(record: FlowRecord, block: str, odd: Odd) -> bool:
    """Whether a block hands its input on as it is, and what it computes goes to the loss by another way.

    The last of several rounds that each hand on what they have not explained has nobody to hand it to. All of
    its parameters learn from the first step on; behind a factor or a layer of zeros those before it do not.
    """
    own = [p for p in record.parameters if p.trainable and p.name.startswith(f"{block}.")]
    return odd.value == 0 and bool(own) and all(len(p.grad_norm) and p.grad_norm[0] > 0 for p in own)


def _is_lost(block: BlockRecord, blocks: Sequence[BlockRecord], share: float) -> bool:
    """Whether a block does not pass its input on, where all of the others do.

    What leaves a block that adds much more than what enters may hold any share of it, by chance.
    """
    others = [b for b in blocks if b.name != block.name and b.passes is not None]
    if len(others) + 1 < FEWEST or block.passes is None or not all(b.passes for b in others):
        return False
    if not block.passes:
        return True
    for at in (0, -1):
        usual = min(at_look(b.kept, at) for b in others)
        grown = at_look(block.growth, at)
        if not (usual > 0.5 and grown < _GROWN and abs(at_look(block.kept, at)) < share * usual):
            return False
    return True


def _lost_issue(block: BlockRecord, blocks: Sequence[BlockRecord]) -> Issue:
    kept, others = at_look(block.kept, -1), len(blocks) - 1
    usual = float(np.median([at_look(b.kept, -1) for b in blocks if b.name != block.name]))
    if block.passes:
        told = (
            f"What leaves it holds {kept:.2g} of what enters, where its {others} siblings hold {usual:.2g}: "
            "what goes past its weights is scaled down."
        )
    else:
        told = (
            f"No way leads past its weights: the skip connection that its {others} siblings have is missing "
            f"here. What leaves it holds {kept:.2g} of what enters; in the others it is {usual:.2g}."
        )
    return Issue(
        layer=block.name,
        layer_type=block.type,
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.MEDIUM,
        description=told,
        magnitude=kept,
        recommended_actions=(
            f"Add the input of {block.name} to its output as it is, as in the other blocks.",
            "If it is to forget its input on purpose, nothing is wrong.",
        ),
        metrics={"kept": kept, "siblings": usual},
    )


def _added_issue(name: str, kind: str, odd: Odd, factor: float, severe: float, others: int) -> Issue:
    more = odd.ratio > 1
    apart = math.inf if odd.value == 0 else max(odd.ratio, 1 / odd.ratio)
    told = f"{apart:.2g} times {'as much as' if more else 'less than'}" if odd.value else "nothing like"
    return Issue(
        layer=name,
        layer_type=kind,
        issue_type=IssueType.EXPLODING if more else IssueType.VANISHING if odd.value else IssueType.DEAD,
        severity=IssueSeverity.HIGH if apart >= severe * factor else IssueSeverity.MEDIUM,
        description=f"What it adds to its input has rms {odd.value:.2g}, {told} its {others} siblings "
        f"({odd.usual:.2g}), which agree among themselves.",
        magnitude=odd.ratio,
        recommended_actions=(
            f"Look for a factor on the branches of {name} that the other blocks do not have: a residual "
            "scale, a gate, a norm layer that is missing, weights of another size.",
        ),
        metrics={"added": odd.value, "siblings": odd.usual, "ratio": odd.ratio},
    )
