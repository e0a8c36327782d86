"""What a run has exchanged between its processes, and what its record tells of them over a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from gradflow.functional.processes.line import Line
from gradflow.functional.run.run import Run
from gradflow.records import ExchangeRecord, FlowRecord, ProcessesRecord, SharesRecord


def exchanged(line: Line) -> ExchangeRecord:
    """Return what was exchanged on a line so far, as counted on this process."""
    counts = line.counts
    return ExchangeRecord(
        gradients=counts.gradients,
        gradient_bytes=counts.gradient_bytes,
        others=counts.others,
        other_bytes=counts.num_bytes,
        gathered_bytes=counts.gathered_bytes,
        messages=counts.messages,
        message_bytes=counts.message_bytes,
    )


def processes_of_stages(
    run: Run, records: Sequence[FlowRecord], counts: Sequence[ExchangeRecord]
) -> ProcessesRecord:
    """Return what differs between processes that have the same stage, and what all have exchanged.

    What processes have of the batch, and exchange with others that have the same stage, is told of the first.

    Args:
        run: the run.
        records: of the stages.
        counts: what each of them has exchanged with the others.
    """
    stage = run.stages.stage
    assert stage is not None
    found = [record.processes for record in records if record.processes is not None]
    first = records[0].processes or _alone(stage.ranks[0], records)
    own = first.exchanged
    return attrs.evolve(
        first,
        differences=[entry for record in found for entry in record.differences],
        unsynchronised=[name for record in found for name in record.unsynchronised],
        exchanged=attrs.evolve(
            own,
            others=own.others + counts[0].others,
            other_bytes=own.other_bytes + counts[0].other_bytes,
            gathered_bytes=own.gathered_bytes + counts[0].gathered_bytes,
            messages=sum(count.messages for count in counts),
            message_bytes=sum(count.message_bytes for count in counts),
        ),
    )


def _alone(rank: int, records: Sequence[FlowRecord]) -> ProcessesRecord:
    """Return what is told of the process of a first stage that has the whole batch."""
    losses = records[-1].losses
    norms = np.zeros(len(losses))
    for record in records:
        for layer in record.layers:
            norms = np.hypot(norms, np.nan_to_num(layer.grad_norm, posinf=np.inf))
    unknown = np.full((1, 1), np.nan)
    data = SharesRecord(steps=[0], rms=unknown, finite=np.isnan(unknown), num_samples=[0])
    return ProcessesRecord(ranks=[rank], losses=losses[:, None], gradients=norms[:, None], data=data)
