"""Dropout that goes on when the model is used, and dropout that drops much more than that of its siblings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from gradflow.records import DropoutRecord, FlowRecord, Issue, IssueSeverity, IssueType


def stray_dropout(
    large: float = 0.6, *, times: float = 2.0, nearly_all: float = 0.85
) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of dropout that eval mode does not switch off, or that is out of line.

    Measured: where the model calls dropout as a function, whether it still drops in eval mode, by one more
    run of the last batch; and the shares of dropout layers that stand at the same place of repeated blocks.

    Why this is evidence: `model.eval()` reaches layers, and functions only through `self.training`;
    `F.dropout(x)` drops half of x for ever, so the same input gives another output every time. And what is
    left of nine tenths dropped is noise, often since p was taken for the share that is kept.

    Looks alike and is not: random numbers that are meant in eval mode, such as samples of a policy or of a
    latent variable: only dropout is looked at; the small rise of stochastic depth from block to block.

    Args:
        large: share from which a layer of one block is told, where all others
        times: drop less by this factor at least.
        nearly_all: share from which a layer is told whatever others do.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        for dropout in record.parts.dropouts:
            if dropout.in_eval:
                yield _in_eval(dropout)
        groups: dict[str, list[DropoutRecord]] = {}
        for dropout in record.parts.dropouts:
            groups.setdefault(re.sub(r"\d+", "*", dropout.name), []).append(dropout)
        for group in groups.values():
            yield from _larger(group, large, times, nearly_all)

    return detector


def _in_eval(dropout: DropoutRecord) -> Issue:
    return Issue(
        layer=dropout.name,
        layer_type=dropout.type,
        issue_type=IssueType.UNSTABLE,
        severity=IssueSeverity.MEDIUM,
        description=f"It drops {dropout.p:.0%} in eval mode too: the same input gives another output every "
        "time, and validation and use are as noisy as training.",
        magnitude=dropout.p,
        recommended_actions=(
            "Pass the mode on: F.dropout(x, p, training=self.training); without it, dropout is always on. "
            "For scaled_dot_product_attention: dropout_p=p if self.training else 0.0.",
            "Or use nn.Dropout, which model.eval() switches off.",
            "If it is Monte Carlo dropout, nothing is wrong.",
        ),
        metrics={"p": dropout.p},
    )


def _larger(group: list[DropoutRecord], large: float, times: float, nearly_all: float) -> Iterator[Issue]:
    for dropout in group:
        others = [d.p for d in group if d.name != dropout.name]
        most = max(others, default=0.0)
        odd = len(others) >= 2 and dropout.p >= large and dropout.p >= times * most
        if odd or nearly_all <= dropout.p < 1.0:
            told = f", where the same layer of {len(others)} other blocks drops {most:.0%} at most"
            yield Issue(
                layer=dropout.name,
                layer_type=dropout.type,
                issue_type=IssueType.UNSTABLE,
                severity=IssueSeverity.MEDIUM,
                description=f"It drops {dropout.p:.0%}{told if odd else ''}: what comes through is noise to "
                "what is behind.",
                magnitude=dropout.p,
                recommended_actions=(
                    f"Give {dropout.name} the share of the others, {most:g}."
                    if odd
                    else f"Drop less in {dropout.name}: 0.1 is usual in transformers, half at most.",
                    "p is the share that is dropped, not the share that is kept.",
                ),
                metrics={"p": dropout.p, "siblings": most},
            )
