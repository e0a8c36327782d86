"""Layers that see the part of one process alone, or nothing on any: batch norms, and experts of a mixture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, LayerRecord, OwnIssueType

UNSYNCHRONISED, UNFED = OwnIssueType("UNSYNCHRONISED"), OwnIssueType("UNFED")


def unsynchronised_norms(few: int = 4, some: int = 8) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of batch norms whose statistics are those of a small part of the batch.

    Measured: how many samples each process has, and which batch norms take statistics of these alone.

    Why this is evidence: the statistics of a few samples are noise, and those that evaluation uses are other
    ones. On ImageNet, ResNet-50 loses nothing down to 16 samples a process, 1 percent at 8, 3.7 at 4 and 11
    at 2 (Wu and He, "Group Normalization", 2018, table 2: 23.7, 24.8, 27.3, 34.7 percent error).

    Looks alike and is not: large parts; norms that are synchronised; frozen ones, in eval mode.

    Args:
        few: so many samples or fewer cost much.
        some: so many or fewer cost something.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        found = record.processes
        known = [n for n in found.data.num_samples if n > 0] if found is not None else []
        if found is None or not found.unsynchronised or not known or min(known) > some:
            return
        first, number = found.unsynchronised[0], len(found.unsynchronised)
        yield Issue(
            layer=first,
            layer_type=next((layer.type for layer in record.layers if layer.module == first), ""),
            issue_type=UNSYNCHRONISED,
            severity=IssueSeverity.MEDIUM if min(known) <= few else IssueSeverity.LOW,
            description=f"{'This batch norm takes' if number == 1 else f'{number} batch norms take'} mean "
            "and "
            f"variance of the {min(known)} samples of one process, not of the {sum(known)} of all.",
            magnitude=float(min(known)),
            recommended_actions=(
                "Synchronise them: `model = nn.SyncBatchNorm.convert_sync_batchnorm(model)`, before it is "
                "wrapped.",
                "Or use norms that need no batch, such as nn.GroupNorm.",
            ),
            metrics={"norms": found.unsynchronised, "num_samples": found.data.num_samples},
            evidence=Evidence(),
        )

    return detector


_EXPERT = re.compile(r"(?P<list>.*experts?)\.(?P<number>\d+)\.?(?P<rest>.*)")


def unfed_experts(chance: float = 1e-6) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of experts of a mixture that no process feeds.

    Measured: how many elements each expert gave in every step, on all processes together.

    Why this is evidence: an expert without a token gets no gradient, and a router that never chooses it has
        no reason to begin. With E experts alike and n tokens, one of them stays without any by a chance of (1
        − 1/E)ⁿ.

    Looks alike and is not: so few tokens that chance leaves an expert out; lists of one member.

    Args:
        chance: what is rarer than this is none.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if record.processes is None or len(record.processes.ranks) < 2:
            return
        mixtures: dict[str, dict[str, float]] = {}
        for layer in record.layers:
            if match := _EXPERT.fullmatch(layer.module):
                fed = mixtures.setdefault(match["list"], {})
                fed[match["number"]] = max(fed.get(match["number"], 0.0), _num_tokens(layer))
        for name in record.never_called:
            if match := _EXPERT.fullmatch(name):
                mixtures.setdefault(match["list"], {}).setdefault(match["number"], 0.0)
        for name, fed in mixtures.items():
            idle = [number for number, tokens in fed.items() if not tokens]
            tokens, number = sum(fed.values()), len(fed)
            if idle and tokens and number > 1 and (1 - 1 / number) ** tokens < chance:
                yield _unfed(name, idle, number, tokens)

    return detector


def _num_tokens(layer: LayerRecord) -> float:
    width = layer.shape[-1] if layer.shape else 0
    return float(np.sum(layer.num_elements)) / width if width else 0.0


def _unfed(name: str, idle: list[str], number: int, tokens: float) -> Issue:
    return Issue(
        layer=f"{name}.{idle[0]}",
        layer_type="expert",
        issue_type=UNFED,
        severity=IssueSeverity.HIGH if len(idle) >= number / 2 else IssueSeverity.MEDIUM,
        description=f"{len(idle)} of the {number} experts of {name} ({', '.join(idle[:8])}) get none of the "
        f"{tokens:,.0f} tokens of the run, on any process. They are not trained, and nothing will choose "
        "them.",
        magnitude=len(idle) / number,
        recommended_actions=(
            "Add a loss that balances the load (Shazeer et al., 2017; Fedus et al., 2021), over the tokens "
            "of all "
            "processes, or noise on the router's scores.",
            "Start the router with small weights and no bias, so that all experts are alike at first.",
        ),
        metrics={"experts": tuple(idle), "num_experts": number, "num_tokens": tokens},
        evidence=Evidence(),
    )
