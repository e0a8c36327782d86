"""BOTTLENECK of recurrent layers that run along the samples of the batch instead of along time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gradflow.detect.view import flow_of
from gradflow.detect.wiring import node_name
from gradflow.records import FlowRecord, Issue, IssueSeverity, IssueType

Detector = Callable[[FlowRecord], Iterable[Issue]]


def along_samples() -> Detector:
    """Return the detector of recurrent layers whose steps are the samples of the batch.

    Measured: the steps of the layer's sequences, how many sequences it takes them for, and the rows of the
    model's output, one for each sample.

    Why this is evidence: a layer whose sequences are as long as the batch has samples, while it takes
    something else for its samples, was handed (samples, steps, features) for (steps, samples, features), or
    the other way round. Each sample then goes on from the state that the one before has left, and what is
    read as the last step is the last sample, or one step of each.

    Looks alike and is not: an output for every step, or one of a single sequence; as many steps as samples,
    where the two cannot be told apart: silent.
    """

    def detector(record: FlowRecord) -> Iterable[Issue]:
        known, flow = record.knowledge, flow_of(record)
        if known is None or len(known.shapes) != 1 or len(known.shapes[0]) > 2:
            return
        rows = known.num_samples
        for r in record.recurrences:
            layer = flow.layers.get(node_name(r.name))
            if layer is None or r.loop or len(layer.shape) != 3 or not rows > 1:
                continue
            if not len(r.num_steps) or int(r.num_steps[-1]) != rows:
                continue
            others = [size for size in layer.shape[:2] if size != rows]
            if len(others) != 1 or others[0] < 2:
                continue
            first = layer.shape[0] == rows
            yield Issue(
                layer=r.name,
                layer_type=r.type,
                issue_type=IssueType.BOTTLENECK,
                severity=IssueSeverity.HIGH,
                description=f"It runs along the samples of the batch: of the {rows} samples that the model "
                f"answers, it makes {rows} steps in time, and of the {others[0]} steps of each as many "
                "samples. Every sample starts from the state that the one before it has left, and none is "
                "read as a sequence of its own.",
                magnitude=1.0,
                recommended_actions=(
                    f"Build {r.module or 'it'} with batch_first={first}: its input is "
                    f"({'samples, steps' if first else 'steps, samples'}, features).",
                    "Then read the last step of each sample: "
                    + ("output[:, -1]." if first else "output[-1]."),
                ),
                metrics={"num_samples": rows, "num_steps": others[0]},
            )

    return detector
