"""`FlowRecord`: everything that one run measured, and where the numbers come from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from gradflow.errors import RecordFormatError, RecordInputError
from gradflow.records.attention import TransformerRecord
from gradflow.records.fields import (
    Floats,
    array_field,
    by_name,
    extras_field,
    mapping_field,
    to_floats,
    to_tuple,
)
from gradflow.records.graph import GraphRecord
from gradflow.records.knowledge import KnowledgeRecord
from gradflow.records.measured import ActivationRecord, LayerRecord, NumericalRecord, ParameterRecord
from gradflow.records.parts import PartsRecord
from gradflow.records.policy import PolicyRecord
from gradflow.records.precision import PrecisionRecord
from gradflow.records.processes import ProcessesRecord
from gradflow.records.reach import ReachAccount
from gradflow.records.recurrent import RecurrenceRecord
from gradflow.records.saving.packed import from_npz, to_npz
from gradflow.records.saving.plain import FORMAT_VERSION, from_plain, parsed, write
from gradflow.records.showing import Shown
from gradflow.records.updates import UpdatesRecord

if TYPE_CHECKING:  # names that point down the layout: see FlowRecord.graph and FlowRecord.compare
    from gradflow.comparing import Comparison
    from gradflow.graph import LayerGraph


@attrs.frozen(kw_only=True)
class Provenance:
    """Where the numbers come from.

    Args:
        versions: of gradflow, torch, numpy and python.
        device: the device of the model's first parameter.
        dtypes: dtypes of the parameters.
        model: class name of the model.
        num_parameters: number of elements of all parameters.
        seed: the seed given, or None.
        requested_steps: the number of steps asked for; `FlowRecord.steps` is what was run.
        transform: `fused` or `vjp`.
        transform_reason: why it was chosen.
        mode: `train`, `eval` or `keep`.
        detail: `cheap` or `full`.
        optimizer: class name of the optimizer whose copy stepped, or `""`.
        learning_rates: of its parameter groups.
        clip: the norm that gradients were clipped to before each update, or None.
        loop: what else the training loop was taken to do between two batches, in words.
        notes: what a reader must know to trust the numbers.
        chosen: what special measurements found in the model by themselves, why, and on what they were taken.
    """

    versions: Mapping[str, str] = mapping_field()
    device: str = "cpu"
    dtypes: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    model: str = ""
    num_parameters: int = 0
    seed: int | None = None
    requested_steps: int = 0
    transform: str = "fused"
    transform_reason: str = ""
    mode: str = "train"
    detail: str = "cheap"
    optimizer: str = ""
    learning_rates: tuple[float, ...] = attrs.field(default=(), converter=to_floats)
    clip: float | None = None
    loop: str = ""
    notes: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    chosen: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)


@attrs.frozen(kw_only=True, repr=False)
class FlowRecord(Shown):
    """Everything that one run measured; no verdicts.

    Iterating gives the layer calls in the order of execution; `record["encoder.0"]` gives one of them;
    `record.graph` is the layer graph.

    Args:
        steps: number of steps that ran (fewer than asked for if the batches ended).
        losses: the loss of each step, shape (steps,).
        layers: one record per layer call, in the order of execution.
        parameters: one record per parameter, in the order of `model.named_parameters()`.
        activations: one record per activation, module or functional.
        numerics: the operations in which a NaN or an Inf first appeared, in the order of steps.
        never_called: qualified names of modules with parameters that no step ran or used.
        passed_by: those of `never_called` that code which ran names, on a branch that it did not take.
        graph_record: the graph's data, or None if it could not be taken.
        transformer: what `attention()` measured; empty without it.
        parts: what was measured of blocks, norm layers, matrices, what attention sees, and dropout.
        provenance: where the numbers come from.
        recurrences: what `recurrence()` measured of recurrent layers over time.
        policy: what `policy_heads()` measured of a policy; None without it.
        reach: at which trainable numbers gradient arrived in the run, and why not at the others.
        extras: what measurements of one's own measured, by name: numbers, texts, NumPy arrays, tuples and
            mappings of them, and attrs records; see `gradflow.register_record`.
        knowledge: what the outputs of the last step are worth against guesses; None where it is not known.
        updates: what the optimizer really did; None without one.
        precision: what `precision()` measured of number formats; None without it.
        processes: what differs between the processes that the run was on; None where it was on one.
    """

    format_version: ClassVar[int] = FORMAT_VERSION

    steps: int
    losses: Floats = array_field()
    layers: tuple[LayerRecord, ...] = attrs.field(converter=to_tuple)
    parameters: tuple[ParameterRecord, ...] = attrs.field(converter=to_tuple)
    activations: tuple[ActivationRecord, ...] = attrs.field(default=(), converter=to_tuple)
    numerics: tuple[NumericalRecord, ...] = attrs.field(default=(), converter=to_tuple)
    never_called: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    passed_by: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    graph_record: GraphRecord | None = None
    transformer: TransformerRecord = attrs.field(factory=TransformerRecord)
    parts: PartsRecord = attrs.field(factory=PartsRecord)
    provenance: Provenance = attrs.field(factory=Provenance)
    recurrences: tuple[RecurrenceRecord, ...] = attrs.field(default=(), converter=to_tuple)
    policy: PolicyRecord | None = None
    reach: ReachAccount | None = None
    extras: Mapping[str, Any] = extras_field()
    knowledge: KnowledgeRecord | None = None
    updates: UpdatesRecord | None = None
    precision: PrecisionRecord | None = None
    processes: ProcessesRecord | None = None

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        return any(layer.name == name for layer in self.layers)

    def __getitem__(self, name: str) -> LayerRecord:
        """Return the layer call of that name.

        Raises:
            UnknownLayerError: if there is none; the message lists the nearest names.
        """
        return by_name(self.layers, name)

    def parameter(self, name: str) -> ParameterRecord:
        """Return the parameter of that qualified name.

        Raises:
            UnknownLayerError: if there is none; the message lists the nearest names.
        """
        return by_name(self.parameters, name)

    def parameters_of(self, layer: LayerRecord) -> tuple[ParameterRecord, ...]:
        """Return the records of the parameters that a layer call owns."""
        names = set(layer.parameters)
        return tuple(p for p in self.parameters if p.name in names)

    @property
    def graph(self) -> LayerGraph:
        """The layer graph, ready for queries.

        Raises:
            GraphUnavailableError: if the run could not take the graph.
        """
        # The only import against the direction of the layout: a record's data knows nothing of the
        # graph's queries, and is usable without them; this line is the convenience of `record.graph`.
        from gradflow.graph import LayerGraph

        return LayerGraph.from_record(self)

    def compare(self, other: FlowRecord) -> Comparison:
        """Return what changed from this record to another of the same model; see `gradflow.compare`.

        Args:
            other: the record after.

        Raises:
            RecordInputError: if it is no record.
        """
        from gradflow.comparing import compare  # against the direction of the layout, as `graph` is

        return compare(self, other)

    @property
    def failed(self) -> bool:
        """Whether it stands for a look that could not be taken: no step, and a note that says why."""
        return not self.steps and bool(self.provenance.notes)

    def __repr__(self) -> str:
        p = self.provenance
        head = (
            f"FlowRecord({p.model or 'model'}: {len(self.layers)} layer calls, "
            f"{len(self.parameters)} parameters, {self.steps} steps, {p.transform}, {p.device})"
        )
        last = f"{self.losses[0]:.4g} -> {self.losses[-1]:.4g}" if self.steps else "none"
        rows = [f"  {layer}" for layer in self.layers[:40]]
        if len(self.layers) > 40:
            rows.append(f"  ... {len(self.layers) - 40} more")
        return "\n".join([head, f"  loss {last}", *rows])

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the record as strict JSON, and write it to `path` where one is given."""
        return write(self, path)

    def to_npz(self, path: str | os.PathLike[str]) -> None:
        """Write the record to a compressed NumPy archive, which is smaller and faster than JSON.

        Args:
            path: of the file, as it is: no ending is added.
        """
        to_npz(self, path)

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str]) -> FlowRecord:
        """Return the record from a file that `to_npz` wrote.

        Args:
            path: of the file.

        Raises:
            RecordFormatError: if it is no record of this format; the message tells the field.
            FileNotFoundError: if there is no such file.
        """
        return from_npz(cls, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> FlowRecord:
        """Return the record from JSON text, or from a file of it.

        Args:
            source: JSON text, or the path of a file of it.

        Raises:
            RecordFormatError: if it is no record of this format; the message tells the field.
            FileNotFoundError: if it is a `Path` to no file.
        """
        data = read(source)
        if isinstance(data, dict) and {"ok", "record"} <= data.keys():
            raise RecordFormatError.at("expected a record, got a whole report, which Report.from_json reads")
        return from_plain(cls, data)


def read(source: Any) -> Any:
    """Return the data of JSON text, or of a file of it: a path, or the text of one.

    Raises:
        RecordFormatError: if it is neither.
        FileNotFoundError: if it is a `Path` to no file.
    """
    if isinstance(source, os.PathLike):
        return parsed(Path(os.fspath(source)).read_bytes())
    if not isinstance(source, str):
        raise RecordFormatError.at(f"expected JSON text or a path, got {type(source).__name__}")
    if source.lstrip()[:1] in ("{", "["):
        return parsed(source)
    try:
        is_file = os.path.isfile(source)
    except ValueError:  # a zero character
        is_file = False
    if is_file:
        return parsed(Path(source).read_bytes())
    if source.endswith(".json"):
        raise RecordFormatError.at(f"there is no file {source!r} in {os.getcwd()}")
    return parsed(source)


def check_record(call: str, value: Any) -> None:
    """Check that what a call was given is a record.

    Raises:
        RecordInputError: if it is something else.
    """
    if isinstance(value, FlowRecord):
        return
    hint = "analyze(model, batches, loss_fn) returns one, and diagnose has it as report.record"
    if isinstance(getattr(value, "record", None), FlowRecord):
        hint = "pass its `record`"
    raise RecordInputError(f"{call}: expected a FlowRecord, got {type(value).__name__}: {hint}.")
