"""Modules that stand beside each other for one choice, and of which a router that learns has dropped most."""

from __future__ import annotations

import numpy as np

from gradflow.detect.evidence import late
from gradflow.detect.flow.readings.alternatives import FEWEST, families, gets_some, last_third
from gradflow.detect.view import Flow
from gradflow.records import Evidence, Floats, Issue, IssueSeverity, IssueType, LayerRecord, Role

_CHANCE = (
    8.0  # rows that each would get in the last third of the steps, were all alike: then none is no chance
)


def dropped(flow: Flow) -> list[Issue]:
    """Return one issue for each list of alternatives of which some got rows in the run, and none at its end.

    Alternatives get numbers of rows that differ from step to step, as no part does that is left out by a
    schedule. Where half of them or more are left without any, what is left gets all of the training, and is
    chosen the more: it has collapsed (HIGH). Of fewer, a router that learns takes them up again (LOW), and so
    it may where the softmax over them has its slope in every row: what is left out is not far behind.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for node, layer in flow.layers.items():
        if not flow.trainable(node) or not _was_left(layer):
            continue
        for family in families(flow, node):
            members = (node, *family)
            if (
                len(members) >= FEWEST
                and _are_routed(flow, members)
                and any(gets_some(flow, other) for other in family)
            ):
                found.setdefault(tuple(sorted(members)), []).append(node)
                break
    lists: dict[str, Issue] = {}
    for members, left in found.items():
        issue = _issue(flow, members, left)
        if issue.layer not in lists or issue.magnitude > lists[issue.layer].magnitude:
            lists[issue.layer] = issue
    return list(lists.values())


def _rows(layer: LayerRecord) -> Floats:
    """Return how many rows a layer call got in each step."""
    width = layer.shape[-1] if layer.shape else 1
    return np.where(layer.called, layer.num_elements, 0) / max(width, 1)


def _was_left(layer: LayerRecord) -> bool:
    rows = _rows(layer)
    return bool(np.any(layer.grad_norm > 0)) and bool(np.any(rows)) and not np.any(last_third(rows))


def _are_routed(flow: Flow, members: tuple[str, ...]) -> bool:
    """Whether the model picks among them row by row, of which there are enough for all."""
    rows = np.stack([_rows(flow.layers[node]) for node in members])
    given = rows[rows.any(axis=1)]
    varying = all(len(set(one[one > 0].tolist())) > 1 for one in given if np.count_nonzero(one) > 2)
    return varying and last_third(rows.sum(axis=0)).sum() >= _CHANCE * len(members)


def _issue(flow: Flow, members: tuple[str, ...], left: list[str]) -> Issue:
    names = [flow.layers[node].module for node in members]
    above = _shared(names)
    first = flow.layers[left[0]]
    collapsed = 2 * len(left) >= len(members) and not _is_undecided(flow, above)
    since = 1 + max(int(np.flatnonzero(_rows(flow.layers[node]))[-1]) for node in left)
    shown = ", ".join(_one_of(flow.layers[node].module, above) for node in left)
    after = (
        "What gets no rows is not trained, and is chosen the less."
        if collapsed
        else "What is left out may be chosen again: it is not far behind, or most of them get some."
    )
    return Issue(
        layer=above or first.module,
        layer_type="Module",
        issue_type=IssueType.DEAD,
        severity=IssueSeverity.HIGH if collapsed else IssueSeverity.LOW,
        description=f"{len(left)} of {len(members)} alternatives ({shown}) got rows of the batches at first, "
        f"and get none at all from step {since} on: the model's own choice sends all of them to the others. "
        f"{after}",
        magnitude=len(left) / len(members),
        recommended_actions=(
            "Add the term that balances the choice to the loss that is minimised (and not only to the log), "
            "with a weight at which all alternatives get rows.",
            "Or add noise to the scores before the choice, or a bias that is raised for those that get few.",
            "Start the scores small: where one alternative is far ahead at the start, it alone is trained.",
        ),
        metrics={
            "left": tuple(flow.layers[node].module for node in left),
            "alternatives": len(members),
            "since": since,
        },
        evidence=Evidence(roles=Role.BLOCKING, developed=True),
    )


def _is_undecided(flow: Flow, above: str) -> bool:
    """Whether a softmax over as many alternatives as a module holds keeps its slope in every row."""
    names = (*(layer.module for layer in flow.layers.values()), *flow.record.never_called)
    inside = {_one_of(name, above) for name in names if name.startswith(f"{above}.") or not above}
    scores = [a for a in flow.record.activations if a.kind == "softmax" and a.width == len(inside)]
    return bool(scores) and all(late(a.saturated_share) == 0 for a in scores)


def _shared(names: list[str]) -> str:
    """Return the module that holds all of some modules.

    >>> _shared(["moe.experts.0.fc", "moe.experts.1.fc"])
    'moe.experts'
    """
    parts = [name.split(".") for name in names]
    number = next((i for i, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1), 0)
    return ".".join(parts[0][:number])


def _one_of(name: str, above: str) -> str:
    """Return which part of a module another one is in.

    >>> _one_of("moe.experts.0.fc", "moe.experts")
    'moe.experts.0'
    """
    inside = name.removeprefix(f"{above}.") if above else name
    return f"{above}.{inside.split('.')[0]}" if above else inside.split(".")[0]
