"""How an issue of the history is put together: the layer that a series is about, and the numbers told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradflow.detect.time.series import lasting
from gradflow.records import Bools, Evidence, HistoryRecord, Issue


def issue_in_time(history: HistoryRecord, since: int, **fields: Any) -> Issue:
    """Return an issue that the history shows: the step at which it began is told, and kept as `since_step`.

    Args:
        history: that shows it.
        since: index of the first look that shows it.
        fields: of the `Issue`, but for its layer's type.
    """
    step, layer = int(history.steps[since]), fields["layer"]
    fields["description"] += f" Since step {step} of the training."
    fields["metrics"] = {"since_step": step, **fields.get("metrics", {})}
    layer_type = history.types.get(layer, "layer" if layer else "model")
    return Issue(layer_type=layer_type, evidence=Evidence(developed=True), **fields)


def go_back(history: HistoryRecord, since: int) -> str:
    """Return the action that undoes what a look was the first to show, and keeps it from coming again."""
    step = int(history.steps[since])
    return (
        f"Go back to a checkpoint before step {step} and lower the learning rate, or clip gradients: "
        "`torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)`."
    )


def layer_of(history: HistoryRecord, where: str) -> str:
    """Return the layer call that a series is about: an activation's feeder, a parameter's owner.

    >>> history = HistoryRecord.empty().with_types({"fc": "Linear", "": "Net"})
    >>> layer_of(history, "fc:relu"), layer_of(history, "fc.weight"), layer_of(history, "log_std")
    ('fc', 'fc', '')
    """
    if where in history.types:
        return where
    for cut in (where.partition(":")[0], where.rpartition(".")[0]):
        if cut in history.types:
            return cut
    return where.rpartition(".")[0] if "." in where else ""


def in_order(history: HistoryRecord, names: Sequence[str]) -> list[str]:
    """Return what series are about in the order in which the layers run; those unknown last."""
    place = {name: number for number, name in enumerate(history.types)}
    return sorted(names, key=lambda name: place.get(layer_of(history, name), len(place)))


def longest(history: HistoryRecord, holds: Mapping[str, Bools]) -> tuple[list[str], int, int] | None:
    """Return at which layers a condition has held for longest, the look since which, and how many hold it.

    The layers are in the order in which they run; None where the condition holds at none.

    Args:
        history: the history.
        holds: at which looks the condition holds, by layer.
    """
    found = {name: since for name, held in holds.items() if (since := lasting(held)) is not None}
    if not found:
        return None
    first = min(found.values())
    return in_order(history, [name for name in found if found[name] == first]), first, len(found)
