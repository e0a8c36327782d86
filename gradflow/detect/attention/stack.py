"""What all blocks of a stack of attention lack alike: a way past them, or a norm between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gradflow.detect.evidence import at_look
from gradflow.detect.knowledge import guesses
from gradflow.detect.view import flow_of
from gradflow.detect.wiring import Wiring
from gradflow.records import BlockRecord, FlowRecord, Issue, IssueSeverity, IssueType

_FEWEST = 3  # blocks of a stack: positions become one with depth
_NORMS = re.compile(r"norm|rsqrt|std|var\b|var_mean", re.IGNORECASE)


def incomplete_blocks(
    kept: float = 0.3, *, growth: float = 4.0, started: float = 1.05
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of stacks whose blocks of attention all lack a skip connection, or a norm.

    Measured: of blocks that a model repeats and that hold attention, whether a way leads past their weights,
    how much of what enters leaves again, by how much the root mean square grows, and whether anything between
    the first attention and the last normalises; at the first step and at the last of a run that ends where a
    model that guesses is.

    Why this is evidence: attention averages over positions. Without a way past it what tells them apart
    falls doubly exponentially with depth (Dong, Cordonnier and Loukas, 2021), and where what goes past is
    scaled down in every block, it does so nearly as fast. Without a norm the scores are of the stream's own
    size, squared: from a small start they are all zero, and attention can't choose; as the stream grows from
    block to block they end at a single key. Siblings are no measure here, since all of them lack the same.

    Looks alike and is not: blocks that are nothing but attention, past which the model itself leads its
    stream; branches that start at nothing, which need no norm (Fixup, ReZero), so that blocks hand on what
    they get; the first block, behind which the stream is of another size; a model that learns.

    Args:
        kept: share of what enters that all blocks but the first must hand on. Those of trained models whose
            norms stand behind the sums come down to 0.5.
        growth: by which the stream must grow over all blocks, where no norm is.
        started: growth of the fresh blocks together below which their branches start at nothing.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if not guesses(record):
            return
        groups: dict[str, list[BlockRecord]] = {}
        for block in record.parts.blocks:
            if _holds_attention(record, block):
                groups.setdefault(f"{block.group}:{block.type}", []).append(block)
        for blocks in groups.values():
            if len(blocks) < _FEWEST:
                continue
            inner = blocks[1:]
            if not any(block.passes for block in blocks):
                known = all(block.passes is False for block in blocks)
                if known and not record.transformer.branches:
                    yield _without_skip(blocks)
            elif all(block.passes and _most_kept(block) <= kept for block in inner):
                yield _scaled_down(inner)
            elif not _normed(record, blocks):
                first, last = (float(np.prod([at_look(b.growth, at) for b in blocks])) for at in (0, -1))
                if first >= started and last >= growth:
                    yield _without_norm(blocks, last)

    return detector


def _holds_attention(record: FlowRecord, block: BlockRecord) -> bool:
    return any(
        f"{layer.module}.".startswith(f"{block.name}.") and np.isfinite(layer.gradients.query_grad).any()
        for layer in record.transformer.attention
    )


def _most_kept(block: BlockRecord) -> float:
    """Return the largest share of what enters a block that leaves it, at the first step or the last."""
    return max(abs(at_look(block.kept, at)) for at in (0, -1))


def _normed(record: FlowRecord, blocks: Sequence[BlockRecord]) -> bool:
    """Whether something normalises inside a block, or between the first of them and the last."""
    wires = flow_of(record).wiring
    inside = [_nodes_in(wires, block.name) for block in (blocks[0], blocks[-1])]
    if not wires.known or not all(inside):
        return True
    behind = {m for n in inside[0] for m in wires.downstream(n)} | set(inside[0])
    before = {m for n in inside[1] for m in wires.fed_by(n)} | set(inside[1])
    norms = {norm.name for norm in record.parts.norms}
    between = behind & before
    return any(n.partition("@")[0] in norms or _NORMS.search(wires.nodes[n].type) for n in between)


def _nodes_in(wires: Wiring, module: str) -> list[str]:
    """Return the nodes of layers and of operations in a module."""
    starts = (f"{module}.", f"{module}:")
    return [n for n in wires.nodes if n.startswith(starts) or n.partition("@")[0] == module]


def _without_skip(blocks: Sequence[BlockRecord]) -> Issue:
    return _issue(
        blocks[0],
        IssueType.BOTTLENECK,
        IssueSeverity.HIGH,
        f"No way leads past the weights of it and its {len(blocks) - 1} siblings: all that a position knows "
        "goes through one attention after another, which averages over positions, and the model guesses.",
        (
            "Put a skip connection round every branch: x = x + self.attention(self.norm1(x)), and the same "
            "for the MLP.",
        ),
        {"blocks": len(blocks)},
    )


def _scaled_down(blocks: Sequence[BlockRecord]) -> Issue:
    most = max(map(_most_kept, blocks))
    return _issue(
        blocks[0],
        IssueType.BOTTLENECK,
        IssueSeverity.MEDIUM,
        f"It and its {len(blocks) - 1} siblings hand on {most:.2g} of what enters them or less, though a way "
        "leads past their weights: what goes past is scaled down against what is added, in every block, and "
        "what tells positions apart falls with depth. The model guesses.",
        (
            "Let what goes past the branches go unscaled: x = x + branch(x), without a factor on x.",
            "If the sum is to keep its size, scale both: (x + branch(x)) / sqrt(2).",
        ),
        {"kept": most, "blocks": len(blocks)},
    )


def _without_norm(blocks: Sequence[BlockRecord], growth: float) -> Issue:
    return _issue(
        blocks[0],
        IssueType.EXPLODING,
        IssueSeverity.MEDIUM,
        f"Nothing normalises in it and its {len(blocks) - 1} siblings, nor between them: the stream grows "
        f"{growth:.2g} times over them, and scores of attention with its square, from next to nothing. The "
        "model guesses.",
        (
            "Add a norm layer before every branch: x = x + self.attention(self.norm1(x)), and one behind "
            "the last block.",
            "Or start the last layer of every branch at zero (ReZero, Fixup): blocks begin as nothing.",
        ),
        {"growth": growth, "blocks": len(blocks)},
    )


def _issue(
    block: BlockRecord,
    kind: IssueType,
    severity: IssueSeverity,
    description: str,
    actions: tuple[str, ...],
    metrics: dict[str, float],
) -> Issue:
    return Issue(
        layer=block.name,
        layer_type=block.type,
        issue_type=kind,
        severity=severity,
        description=description,
        magnitude=next(iter(metrics.values())),
        recommended_actions=actions,
        metrics=metrics,
    )
