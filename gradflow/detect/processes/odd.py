"""A process whose loss, gradient or data is unlike that of the others; and processes with the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from gradflow.records import (
    Bools,
    Evidence,
    Floats,
    FlowRecord,
    Issue,
    IssueSeverity,
    OwnIssueType,
    ProcessesRecord,
)

ODD_PROCESS, SAME_DATA = OwnIssueType("ODD_PROCESS"), OwnIssueType("SAME_DATA")


def odd_process(factor: float = 10.0) -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of a process whose loss, gradient or data is not finite or far from the others'.

    Measured: the loss of every process in every step, the size of its gradients at layer outputs, and the
        root mean square of its inputs at looks.

    Why this is evidence: parts of one shuffled batch differ by chance alone. A process that is `factor` times
    above or below the median of all in every step gets other data, or has prepared them otherwise; and one
    that is not finite makes the averaged gradient so on all.

    Looks alike and is not: a loss that is not finite everywhere, which is the model's; a single step that is
    far off; losses about zero, whose ratio says nothing (the gradients are told all the same).

    Args:
        factor: how far from the median of all processes, in every step, is far off.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if (found := record.processes) is not None:
            yield from _not_finite(found)
            yield from _far_off(found, factor)

    return detector


def _not_finite(found: ProcessesRecord) -> Iterable[Issue]:
    broken = {
        "data": ~found.data.finite,
        "loss": ~np.isfinite(found.losses),
        "gradient": ~np.isfinite(found.gradients),
    }
    for what, flags in broken.items():
        some = flags.any(axis=1) & ~flags.all(axis=1)
        if not some.any():
            continue
        step = int(np.flatnonzero(some)[0])
        ranks = tuple(found.ranks[i] for i in np.flatnonzero(flags[step]))
        at = found.data.steps[step] if what == "data" else step
        yield Issue(
            layer="",
            layer_type="",
            issue_type=ODD_PROCESS,
            severity=IssueSeverity.CRITICAL,
            description=f"The {what} of process {', '.join(map(str, ranks))} is not finite in step {at}, and "
            "that of "
            "the others is. The averaged gradient is lost on all of them.",
            magnitude=float(len(ranks)),
            recommended_actions=(
                f"Look at the batch of process {ranks[0]} in step {at}: a file that is torn, a division by a "
                "standard deviation of zero, an empty part.",
                "If the others cannot be spared, leave out a step in which any process's loss is not finite: "
                "all of them must.",
            ),
            metrics={"what": what, "ranks": ranks, "step": at},
            evidence=Evidence(),
        )
        return  # what follows from it says no more


def _far_off(found: ProcessesRecord, factor: float) -> Iterable[Issue]:
    ratios = {
        "data": _ratios(found.data.rms),
        "loss": _ratios(found.losses),
        "gradient": _ratios(found.gradients),
    }
    off = {what: _always(ratio, factor) for what, ratio in ratios.items()}
    for i, rank in enumerate(found.ranks):
        told = {what: float(np.median(ratios[what][:, i])) for what, flags in off.items() if flags[i]}
        if not told:
            continue
        words = [f"its {what} is {ratio:.3g} times that of the others" for what, ratio in told.items()]
        yield Issue(
            layer="",
            layer_type="",
            issue_type=ODD_PROCESS,
            severity=IssueSeverity.HIGH if "gradient" in told or "loss" in told else IssueSeverity.MEDIUM,
            description=f"Process {rank} is unlike the others in every step: {', '.join(words)}. In the mean "
            "of "
            "the gradients it " + ("drowns them." if max(told.values()) > 1 else "has next to no part."),
            magnitude=max(told.values(), key=lambda ratio: max(ratio, 1 / ratio if ratio else 0.0)),
            recommended_actions=(
                f"Hold the batches of process {rank} against those of another: another scale (0 to 255 "
                "instead "
                "of 0 to 1), another class alone (data that were not shuffled before they were split), "
                "padding.",
                "Shuffle over all processes: `DistributedSampler(dataset, shuffle=True)` with `set_epoch`.",
            ),
            metrics={"rank": rank, **{f"{what}_ratio": ratio for what, ratio in told.items()}},
            evidence=Evidence(),
        )


def _ratios(values: Floats) -> Floats:
    """Return each process's value over the median of the others', by step."""
    found = np.full(values.shape, np.nan)
    if values.shape[1] < 2:
        return found
    for i in range(values.shape[1]):
        others = np.median(np.delete(values, i, axis=1), axis=1)
        with np.errstate(all="ignore"):
            found[:, i] = np.where((others > 0) & (values[:, i] >= 0), values[:, i] / others, np.nan)
    return found


def _always(ratios: Floats, factor: float) -> Bools:
    """Return which processes are far off in every step; of two, the larger."""
    if not len(ratios):
        return np.zeros(ratios.shape[1], dtype=bool)
    above = np.all(ratios > factor, axis=0)
    below = np.all(ratios < 1 / factor, axis=0)
    return np.asarray(above if ratios.shape[1] == 2 else above | below)


def same_data() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of processes that see the same data.

    Measured: fingerprints of the tensors of the batch at every look; those of a group are the same at all.

    Why this is evidence: a gradient that is averaged over equal parts is that of one part: the work of all
        but one process is lost, and the batch is smaller than it is taken for.

    Looks alike and is not: processes that split the model and not the batch, which are not compared; a batch
    that happens to be alike in one step.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        found = record.processes
        if found is None or not found.data.same:
            return
        lost = sum(len(group) - 1 for group in found.data.same) / len(found.ranks)
        group = found.data.same[0]
        yield Issue(
            layer="",
            layer_type="",
            issue_type=SAME_DATA,
            severity=IssueSeverity.HIGH if lost >= 0.5 else IssueSeverity.MEDIUM,
            description=f"Processes {', '.join(map(str, group))} got the same batch at every look: "
            f"{lost:.0%} of "
            "the work is done twice, and the batch is smaller than it is taken for.",
            magnitude=lost,
            recommended_actions=(
                "Give each process its own part: `DataLoader(..., sampler=DistributedSampler(dataset))`, and "
                "call "
                "`sampler.set_epoch(epoch)`.",
                "If batches are drawn by a generator, seed it with the rank as well: `seed + rank`.",
            ),
            metrics={"groups": found.data.same, "lost": lost},
            evidence=Evidence(),
        )

    return detector
