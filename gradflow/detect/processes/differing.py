"""What should be equal on all processes and is not, and what only some of them use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from gradflow.records import (
    DifferenceRecord,
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    OwnIssueType,
    ProcessesRecord,
)

UNEQUAL, PARTLY_USED = OwnIssueType("UNEQUAL"), OwnIssueType("PARTLY_USED")


def unequal_processes() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of parameters and buffers that are not equal on all processes.

    Measured: two sums over every parameter and buffer before the first step, which are equal where the bits
    are, on all processes. Buffers that `DistributedDataParallel` takes over from the first process in every
    forward pass are left out.

    Why this is evidence: processes that split the batch apply one averaged gradient to what they take for one
    and the same parameters. What differs once stays different, so the gradient that is applied belongs to
    none of the models; and the one that is saved is that of one process.

    Looks alike and is not: running statistics that are broadcast; parameters that a model splits over
    processes on purpose, which are sharded and compared with nothing.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        found = record.processes.differences if record.processes is not None else ()
        for kind in ("parameter", "buffer"):
            if some := [d for d in found if d.kind == kind]:
                yield _unequal(record, some)

    return detector


def _unequal(record: FlowRecord, found: Sequence[DifferenceRecord]) -> Issue:
    first, kind = found[0], found[0].kind
    layer = first.name.rpartition(".")[0]
    parameters = kind == "parameter"
    ranks = sorted({rank for entry in found for rank in entry.ranks})
    return Issue(
        layer=layer,
        layer_type=_type(record, layer),
        issue_type=UNEQUAL,
        severity=IssueSeverity.CRITICAL if parameters else IssueSeverity.MEDIUM,
        description=f"{_some([d.name for d in found])} {'is' if len(found) == 1 else 'are'} not equal on all "
        f"processes: {_named(ranks)} {'has' if len(ranks) == 1 else 'have'} other values. "
        + (
            "The averaged gradient is applied to each of them, and is that of none."
            if parameters
            else "Each evaluates with its own, and one process's is saved."
        ),
        magnitude=float(len(found)),
        recommended_actions=(
            "Build the model with the same seed on every process, or take over that of the first: "
            "`for t in model.state_dict().values(): torch.distributed.broadcast(t, 0)`, before the optimizer "
            "is "
            "built. DistributedDataParallel does so when it wraps the model, and not afterwards.",
            "Look for code that changes them on one process alone: a checkpoint that one of them loads, "
            "`if rank == 0:`, an initialisation after the wrapping.",
        ),
        metrics={"names": tuple(d.name for d in found), "ranks": tuple(ranks)},
        evidence=Evidence(origin=layer),
    )


def partly_used() -> Callable[[FlowRecord], Iterable[Issue]]:
    """Return the detector of layers and parameters that only some processes use in a step.

    Measured: which processes ran every layer call in every step, and on which a path led from the loss to
    every parameter.

    Why this is evidence: without `find_unused_parameters=True`, `DistributedDataParallel` waits on every
    process for the gradient of every parameter. Where one process has none, it raises in the next step, and
    the others wait for it until their timeout. Parameters that no process reaches are the same to it.

    Looks alike and is not: the same where it was told to look for unused parameters, or where nothing of the
    kind averages; a layer that some steps run and others do not, on all processes alike, is told only where
    it is waited for.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        if record.processes is None or record.processes.reducer != "waits":
            return
        found = [d for d in record.processes.differences if d.kind == "gradient"]
        layers = [d for d in record.processes.differences if d.kind == "layer"]
        if found:
            yield _partly(record, record.processes, found, layers)
        idle = [p.name for p in record.parameters if p.trainable and not p.reached.all()]
        idle = [name for name in idle if not any(d.name == name for d in found)]
        if idle:
            yield _waited_for(record, idle)

    return detector


def _partly(
    record: FlowRecord,
    processes: ProcessesRecord,
    found: Sequence[DifferenceRecord],
    layers: Sequence[DifferenceRecord],
) -> Issue:
    first = found[0]
    layer = next((p.layer for p in record.parameters if p.name == first.name), "")
    missing = [rank for rank in processes.ranks if rank not in first.ranks]
    who = f"{_named(missing)} never" if missing else "no process always"
    return Issue(
        layer=layer,
        layer_type=_type(record, layer),
        issue_type=PARTLY_USED,
        severity=IssueSeverity.CRITICAL,
        description=f"Only some processes reach {_some([d.name for d in found])} in {first.share:.0%} of the "
        f"steps ({who}). DistributedDataParallel waits for their gradient on all: in training, one process "
        "raises at the next step, and the others hang.",
        magnitude=first.share,
        recommended_actions=(
            "Pass find_unused_parameters=True to DistributedDataParallel, if which layers run hangs on the "
            "batch.",
            "Or have every process use every layer: add 0 * layer(x).sum() to the loss where it is not "
            "needed, "
            "or draw which branch runs from one seed on all.",
        ),
        metrics={
            "parameters": tuple(d.name for d in found),
            "layers": tuple(d.name for d in layers),
            "ranks": first.ranks,
        },
        evidence=Evidence(origin=layer),
    )


def _waited_for(record: FlowRecord, idle: Sequence[str]) -> Issue:
    layer = next((p.layer for p in record.parameters if p.name == idle[0]), "")
    return Issue(
        layer=layer,
        layer_type=_type(record, layer),
        issue_type=PARTLY_USED,
        severity=IssueSeverity.HIGH,
        description=f"In some step no gradient arrives at {_some(idle)} on any process. "
        "DistributedDataParallel "
        "waits for it, and raises in the step after.",
        magnitude=float(len(idle)),
        recommended_actions=(
            "Leave out what is not used, or freeze it before the model is wrapped: "
            "`p.requires_grad_(False)`.",
            "Or pass find_unused_parameters=True to DistributedDataParallel.",
        ),
        metrics={"parameters": tuple(idle)},
        evidence=Evidence(origin=layer),
    )


def _type(record: FlowRecord, module: str) -> str:
    return next((layer.type for layer in record.layers if layer.module == module), "Module")


def _some(names: Sequence[str]) -> str:
    shown = " and ".join(filter(None, (", ".join(names[:2][:-1]), names[:2][-1])))
    return shown + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:6])) + (f" and {len(ranks) - 6} more" if len(ranks) > 6 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"
