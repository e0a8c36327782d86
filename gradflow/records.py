"""The immutable records that every part of gradflow hands to the next, and the two enums.

A record holds numbers and names, never a tensor and never a verdict, with two exceptions that are
verdicts by definition: `Issue` and `Cause`. Arrays are read-only NumPy arrays whose first axis is the
step; a value that was not measured at a step is NaN. Nothing here imports torch.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from gradflow.errors import RecordFormatError, UnknownLayerError

if TYPE_CHECKING:  # the one name that points down the layout: see FlowRecord.graph
    from gradflow.graph import LayerGraph

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

FORMAT_VERSION = 1


class IssueType(enum.Enum):
    """The seven kinds of illness. `member.value` is the name in capitals."""

    VANISHING = "VANISHING"
    EXPLODING = "EXPLODING"
    DEAD = "DEAD"
    UNSTABLE = "UNSTABLE"
    NUMERICAL = "NUMERICAL"
    BOTTLENECK = "BOTTLENECK"
    SATURATION = "SATURATION"


class IssueSeverity(enum.Enum):
    """How much an issue matters, most severe first. Ordered: ``CRITICAL > HIGH > ... > INFO``."""

    CRITICAL = "CRITICAL"
    HIGH = "HIGH"
    MEDIUM = "MEDIUM"
    LOW = "LOW"
    INFO = "INFO"

    @property
    def rank(self) -> int:
        """0 for INFO up to 4 for CRITICAL."""
        return len(IssueSeverity) - 1 - list(IssueSeverity).index(self)

    def __lt__(self, other: IssueSeverity) -> bool:
        return self.rank < other.rank

    def __le__(self, other: IssueSeverity) -> bool:
        return self.rank <= other.rank

    def __gt__(self, other: IssueSeverity) -> bool:
        return self.rank > other.rank

    def __ge__(self, other: IssueSeverity) -> bool:
        return self.rank >= other.rank


# NOTE [Arrays in frozen records]
# `attrs.frozen` compares fields with `==`, which for arrays is elementwise and has no truth value, so
# every array field is declared with `array_field`, which compares by content (NaN equal to NaN). Frozen
# is shallow: the converter copies and clears the write flag, and mappings become `MappingProxyType`.
# A NaN differs from itself, and its sign depends on the processor and the operation that made it; every
# converter puts the one object `NAN` in its place, so that records compare, and survive JSON, all the same.

NAN = float("nan")


def _float(value: float) -> float:
    return NAN if value != value else value


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(_float(value) for value in values)


def _boxed(value: float) -> tuple[float]:
    return (value,)  # tuples compare their members by identity first


def _number_field(default: Any = attrs.NOTHING) -> Any:
    return attrs.field(default=default, converter=_float, eq=_boxed)


def _read_only(dtype: type, nullable: bool = False) -> Any:
    def convert(value: Any) -> Any:
        if value is None and nullable:
            return None
        array = np.array(value, dtype=dtype)
        if dtype is np.float64:
            array[np.isnan(array)] = np.nan  # one bit pattern, so that equal content is equal bytes
        if np.issubdtype(dtype, np.floating):
            array[np.isnan(array)] = NAN
        array.setflags(write=False)
        return array

    return convert


def _same_array(value: Any) -> Any:
    return None if value is None else (value.shape, value.tobytes())


def array_field(dtype: type = np.float64, *, nullable: bool = False) -> Any:
    """Return an attrs field for a read-only array that is compared by content."""
    if nullable:
        return attrs.field(default=None, converter=_read_only(dtype, True), eq=_same_array, repr=False)
    return attrs.field(converter=_read_only(dtype), eq=_same_array, repr=False)


def float_field(default: float) -> Any:
    """Return an attrs field for a float that may be NaN, and then equals another NaN."""
    return attrs.field(default=default, converter=float, eq=lambda v: None if v != v else v)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value)
    return _float(value) if isinstance(value, float) else value


def _read_only_mapping(value: Mapping[str, Any]) -> Mapping[str, Any]:
    return types.MappingProxyType({str(k): _plain(v) for k, v in value.items()})


def mapping_field() -> Any:
    """Return an attrs field for a read-only mapping from names to plain values."""
    return attrs.field(factory=dict, converter=_read_only_mapping, eq=dict)


def _tuple(value: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(value)


@attrs.frozen(kw_only=True)
class Issue:
    """A verdict on one layer.

    Args:
        layer: name of the layer call at fault (`encoder.0`, `relu@1`); `""` is the model itself.
        layer_type: class name of that layer, such as `Linear`.
        issue_type: which of the seven kinds.
        severity: how much it matters.
        description: one or two sentences with the number that decided it.
        magnitude: that number; its unit is told in the description.
        recommended_actions: what to change, most likely cure first.
        metrics: the evidence, by name; plain numbers, strings and tuples.

    >>> print(Issue(layer="fc", layer_type="Linear", issue_type=IssueType.DEAD,
    ...             severity=IssueSeverity.HIGH, description="No unit ever fires.", magnitude=1.0,
    ...             recommended_actions=("Use LeakyReLU.",)))
    [HIGH] DEAD in fc (Linear)
      Description: No unit ever fires.
      Magnitude: 1.00e+00
      Recommended Actions:
        - Use LeakyReLU.
    """

    layer: str
    layer_type: str
    issue_type: IssueType
    severity: IssueSeverity
    description: str
    magnitude: float = _number_field()
    recommended_actions: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    metrics: Mapping[str, Any] = mapping_field()

    def __str__(self) -> str:
        name = self.layer or "(model)"
        lines = [
            f"[{self.severity.value}] {self.issue_type.value} in {name} ({self.layer_type})",
            f"  Description: {self.description}",
            f"  Magnitude: {self.magnitude:.2e}",
        ]
        if self.recommended_actions:
            lines.append("  Recommended Actions:")
            lines.extend(f"    - {action}" for action in self.recommended_actions)
        return "\n".join(lines)


@attrs.frozen(kw_only=True)
class Cause:
    """The one layer and mechanism that explains a group of issues.

    Args:
        layer: the layer at fault; where the gradient is cut, the layer whose output is cut.
        issue_type: the illness at that layer.
        mechanism: what happens there, in one sentence.
        issues: the issues this explains, the one at `layer` first.
        confidence: between 0 and 1.
        reason: why the confidence is what it is.
        evidence: what was seen along the path from the loss, one line each.
    """

    layer: str
    issue_type: IssueType
    mechanism: str
    issues: tuple[Issue, ...] = attrs.field(converter=_tuple)
    confidence: float
    reason: str = ""
    evidence: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.frozen(kw_only=True)
class LayerRecord:
    """What was measured at one layer call, over all steps.

    All arrays have shape (steps,). `grad_*` are about the output gradient, ∂L/∂(output), in units of
    loss per unit of activation.

    Args:
        name: name of the layer call: the module's qualified name, then `@1`, `@2`, ... for later calls
            in the same step. The model itself is `""`.
        module: qualified name of the module.
        type: class name of the module.
        call: 0 for the first call in a step.
        order: position in the order of execution.
        composite: whether other layers are called inside it.
        parameters: names of the parameters it owns (all calls of a module share them).
        shape: shape of its (first) output at the last step it ran.
        inputs_differentiable: whether, in the first step, any input carried a gradient graph.
        called: whether it ran in this step.
        reached: whether a path leads from the loss to its output in this step.
        grad_norm: ‖g‖₂; 0 is exactly zero, NaN where not reached, or where the gradient holds a NaN.
        grad_finite: whether every element of the gradient is finite (True where not reached).
        num_elements: number of elements of its differentiable outputs.
        output_rms: root mean square of the output.
        output_finite: whether every element of the output is finite (True where not called).
        output_zero_share: share of output elements that are exactly zero, NaN where not looked at.
        output_variation: ‖Y − mean row‖_F / ‖Y‖_F of the output as a matrix (rows × features): 0 where all
            samples (and positions) look alike; NaN where not looked at.
        input_rms: root mean square of its first floating-point input; NaN where not looked at.
    """

    name: str
    module: str
    type: str
    call: int
    order: int
    composite: bool = False
    parameters: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    shape: tuple[int, ...] = attrs.field(default=(), converter=_tuple)
    inputs_differentiable: bool = True
    called: Bools = array_field(np.bool_)
    reached: Bools = array_field(np.bool_)
    grad_norm: Floats = array_field()
    grad_finite: Bools = array_field(np.bool_)
    num_elements: Ints = array_field(np.int64)
    output_rms: Floats = array_field()
    output_finite: Bools = array_field(np.bool_)
    output_zero_share: Floats = array_field()
    output_variation: Floats = array_field()
    input_rms: Floats = array_field()

    @property
    def grad_rms(self) -> Floats:
        """‖g‖₂ / √(number of elements), shape (steps,)."""
        return self.grad_norm / np.sqrt(np.maximum(self.num_elements, 1))

    @property
    def grad_zero(self) -> Bools:
        """Whether the output gradient was there and exactly zero, shape (steps,)."""
        return self.reached & (self.grad_norm == 0.0)

    def __str__(self) -> str:
        return f"{self.name or '(model)'} ({self.type}): grad_rms {_spread(self.grad_rms)}"


@attrs.frozen(kw_only=True)
class ParameterRecord:
    """What was measured at one parameter, over all steps. Arrays have shape (steps,).

    Args:
        name: qualified name, as in `model.named_parameters()`.
        layer: qualified name of the module that owns it.
        shape: its shape.
        dtype: its dtype, such as `float32`.
        trainable: whether it requires a gradient.
        optimized: whether the optimizer steps it (True where no optimizer was given).
        reached: whether a path leads from the loss to it in this step.
        grad_norm: ‖∂L/∂p‖₂; NaN where not reached.
        grad_finite: whether every element of the gradient is finite.
        grad_zero_share: share of gradient elements that are exactly zero; NaN where not looked at.
        norm: ‖p‖₂ before the step.
    """

    name: str
    layer: str
    shape: tuple[int, ...] = attrs.field(converter=_tuple)
    dtype: str
    trainable: bool
    optimized: bool = True
    reached: Bools = array_field(np.bool_)
    grad_norm: Floats = array_field()
    grad_finite: Bools = array_field(np.bool_)
    grad_zero_share: Floats = array_field()
    norm: Floats = array_field()

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


@attrs.frozen(kw_only=True)
class ActivationRecord:
    """What was measured at one use of an activation, module or functional alike.

    A unit is one index of the channel axis (the last axis, or axis 1 behind a convolution). A rectifier
    unit *fires* where its output is above zero; a bounded unit (sigmoid, tanh, softmax, hard bounds) is
    *saturated* where its local derivative is below 1 percent of the largest one it can have.

    Args:
        name: the activation module's layer call, or `OP` behind the feeding layer: `fc1:relu`.
        op: `relu`, `sigmoid`, `tanh`, `softmax`, ...
        kind: `rectifier` (can be off), `bounded` (can saturate) or `softmax`.
        functional: whether it was applied as a function and not as a module.
        layer: the layer call at fault if it is sick: the module itself, or the layer whose output
            feeds the function (`""` if none does).
        num_units: number of units; 0 if it changed between steps.
        fired_share: share of elements that fire, shape (steps,); NaN where not looked at.
        saturated_share: share of elements that are saturated, shape (steps,); NaN where not looked at.
        never_fired: share of units that fired in no batch of the run (rectifiers), else NaN.
        always_saturated: share of units saturated for every sample looked at (bounded), else NaN.
        input_rms: root mean square of what enters, shape (steps,); NaN where not looked at.
        width: number of alternatives of a softmax (last step); 0 for others.
    """

    name: str
    op: str
    kind: str
    functional: bool
    layer: str
    num_units: int
    fired_share: Floats = array_field()
    saturated_share: Floats = array_field()
    input_rms: Floats = array_field()
    never_fired: float = _number_field(NAN)
    always_saturated: float = _number_field(NAN)
    width: int = 0


@attrs.frozen(kw_only=True)
class NumericalRecord:
    """Where a NaN or an Inf was born: found by running the step again with every operation watched.

    Args:
        step: the step it appeared in.
        layer: the layer call it was born in, or whose output feeds the function it was born in.
        layer_type: class name of that layer.
        op: the operation: `sqrt`, `exp`, `div`, ... or the name of the autograd node in a backward pass.
        phase: `input`, `parameter`, `forward` or `backward`.
        value: `nan` or `inf`.
        input_min: smallest value that entered the operation (NaN if unknown).
        input_max: largest value that entered the operation (NaN if unknown).
        line: `file:line` of the user's code that called the operation, if it was seen.
        loss_finite: whether the loss of that step is finite.
    """

    step: int
    layer: str
    layer_type: str
    op: str
    phase: str
    value: str
    input_min: float = _number_field(NAN)
    input_max: float = _number_field(NAN)
    line: str = ""
    loss_finite: bool = True


@attrs.frozen(kw_only=True)
class NodeRecord:
    """One node of the graph as the gradient sees it. Arrays have shape (measured steps,).

    Args:
        name: unique: a layer call's name, an op (`add`, `relu@3`), an input (`input.0`), or `loss`.
            The model itself, where it is a layer, is `(model)`.
        kind: `layer`, `op`, `input` or `loss`.
        layer: qualified module name for a layer; for an op, the innermost module it ran in.
        type: class name, or the op's name.
        shape: shape of its output, if known.
        num_elements: number of elements of its output; 0 if unknown.
        parameters: names of the parameters that enter here.
        order: position in the order of execution; the loss has the largest.
        grad_norm: ‖g_v‖ of its output; empty if only the topology was taken.
        input_grad_norm: ‖c_v‖, all of its input cotangents together (parameters excluded).
        effective_rank: exp of the entropy of the normalised squared singular values of g_v as a matrix
            (samples × features), layers only; NaN where not measured.
        reachable: whether a gradient can flow from the loss to it.
        reason: for an unreachable node, why, in one sentence.
    """

    name: str
    kind: str
    layer: str = ""
    type: str = ""
    shape: tuple[int, ...] = attrs.field(default=(), converter=_tuple)
    num_elements: int = 0
    parameters: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    order: int = 0
    grad_norm: Floats = array_field()
    input_grad_norm: Floats = array_field()
    effective_rank: Floats = array_field()
    reachable: bool = True
    reason: str = ""


@attrs.frozen(kw_only=True)
class EdgeRecord:
    """An edge u → v in the direction of the data; the gradient runs along it from v back to u.

    Args:
        source: name of u.
        target: name of v.
        flow: f(u→v) = ‖c_uv‖, the norm of the cotangent that v hands back to u, shape (measured
            steps,); empty if only the topology was taken.
        severed: whether it is known to carry nothing: cut, or exactly zero at every measured step.
        reason: the op that cuts it (`detach`, `argmax`, ...), if severed by one.
    """

    source: str
    target: str
    flow: Floats = array_field()
    severed: bool = False
    reason: str = ""


@attrs.frozen(kw_only=True)
class GraphRecord:
    """The graph's plain data; `gradflow.graph.LayerGraph` gives it its queries.

    Args:
        nodes: in the order of execution.
        edges: source → target in the direction of the data.
        steps: which steps were measured; empty if only the topology was taken.
    """

    nodes: tuple[NodeRecord, ...] = attrs.field(converter=_tuple)
    edges: tuple[EdgeRecord, ...] = attrs.field(converter=_tuple)
    steps: tuple[int, ...] = attrs.field(default=(), converter=_tuple)

    @property
    def measured(self) -> bool:
        """Whether the edges carry flows."""
        return bool(self.steps)


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
        transform: `fused` or `vjp`, and why it was chosen.
        mode: `train`, `eval` or `keep`.
        detail: `cheap` or `full`.
        optimizer: class name of the optimizer whose copy stepped, or `""`.
        learning_rates: of its parameter groups.
        notes: what a reader must know to trust the numbers.
    """

    versions: Mapping[str, str] = mapping_field()
    device: str = "cpu"
    dtypes: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    model: str = ""
    num_parameters: int = 0
    seed: int | None = None
    requested_steps: int = 0
    transform: str = "fused"
    transform_reason: str = ""
    mode: str = "train"
    detail: str = "cheap"
    optimizer: str = ""
    learning_rates: tuple[float, ...] = attrs.field(default=(), converter=_floats)
    notes: tuple[str, ...] = attrs.field(default=(), converter=_tuple)


@attrs.frozen(kw_only=True, repr=False)
class FlowRecord:
    """Everything that one run measured; no verdicts.

    Iterating gives the layer calls in the order of execution; `record["encoder.0"]` gives one of them;
    `record.graph` is the layer graph.

    Args:
        steps: number of steps that ran (fewer than asked for if the batches ended).
        losses: the loss of each step, shape (steps,).
        layers: one record per layer call, in the order of execution.
        parameters: one record per parameter, in the order of `model.named_parameters()`.
        activations: one record per activation, module or functional.
        numerics: birth certificates of NaN and Inf, in the order of steps.
        never_called: qualified names of modules with parameters that no step ran or used.
        graph_record: the graph's data, or None if it could not be taken.
        provenance: where the numbers come from.
    """

    steps: int
    losses: Floats = array_field()
    layers: tuple[LayerRecord, ...] = attrs.field(converter=_tuple)
    parameters: tuple[ParameterRecord, ...] = attrs.field(converter=_tuple)
    activations: tuple[ActivationRecord, ...] = attrs.field(default=(), converter=_tuple)
    numerics: tuple[NumericalRecord, ...] = attrs.field(default=(), converter=_tuple)
    never_called: tuple[str, ...] = attrs.field(default=(), converter=_tuple)
    graph_record: GraphRecord | None = None
    provenance: Provenance = attrs.field(factory=Provenance)

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
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UnknownLayerError.at(name, [layer.name for layer in self.layers])

    def parameter(self, name: str) -> ParameterRecord:
        """Return the parameter of that qualified name.

        Raises:
            UnknownLayerError: if there is none; the message lists the nearest names.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise UnknownLayerError.at(name, [p.name for p in self.parameters])

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
        return _write(to_plain(self), path)

    @classmethod
    def from_json(cls, source: str | Path) -> FlowRecord:
        """Return the record from JSON text, or from a `Path` to a file of it.

        Raises:
            RecordFormatError: if the text is not a record of this format.
        """
        text = source.read_text() if isinstance(source, Path) else source
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecordFormatError.at(f"the text is not JSON: {error}") from error
        return from_plain(cls, data)


def _spread(values: Floats) -> str:
    known = values[~np.isnan(values)]
    if not len(known):
        return "none"
    low, high = float(known.min()), float(known.max())
    return f"{low:.2e}" if low == high else f"{low:.2e} to {high:.2e}"


# ------------------------------------------------------------------------------------ JSON

_T = TypeVar("_T")


def _write(data: Any, path: str | Path | None) -> str:
    text = json.dumps(data, allow_nan=False)
    if path is not None:
        Path(path).write_text(text)
    return text


def _number(value: float) -> float | str:
    return value if np.isfinite(value) else repr(float(value))  # "nan", "inf", "-inf"


def to_plain(value: Any) -> Any:
    """Return a record as dicts, lists, strings and numbers that strict JSON takes.

    Non-finite numbers become the strings `nan`, `inf` and `-inf`.
    """
    if attrs.has(type(value)):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in attrs.fields(type(value))}
        if isinstance(value, FlowRecord):
            plain = {"format": FORMAT_VERSION, **plain}
        return plain
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.ndarray):
        return [to_plain(v) for v in value.tolist()]
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return _number(value) if isinstance(value, float) else value


def from_plain(cls: type[_T], data: Any) -> _T:
    """Return the record of class `cls` from what `to_plain` gave.

    Raises:
        RecordFormatError: if a field is missing or unknown, or the format's version is another.
    """
    if not isinstance(data, Mapping):
        raise RecordFormatError.at(f"expected an object for {cls.__name__}, got {type(data).__name__}")
    data = dict(data)
    if cls is FlowRecord and (version := data.pop("format", None)) != FORMAT_VERSION:
        raise RecordFormatError.at(f"expected format {FORMAT_VERSION}, got {version!r}")
    hints = typing.get_type_hints(cls, localns={"LayerGraph": object})
    known = {f.name: f for f in attrs.fields(typing.cast(Any, cls))}
    missing = [n for n, f in known.items() if n not in data and f.default is attrs.NOTHING]
    unknown = [n for n in data if n not in known]
    if missing or unknown:
        raise RecordFormatError.at(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")
    return cls(**{name: _value(hints[name], value) for name, value in data.items()})


def _value(hint: Any, value: Any) -> Any:
    """Rebuild one field from its type hint."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        inner = [a for a in args if a is not type(None)]
        return None if value is None else _value(inner[0], value)
    if isinstance(hint, type) and attrs.has(hint):
        return from_plain(hint, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if origin is np.ndarray:
        return [float(v) if isinstance(v, str) else v for v in value]
    if origin is tuple:
        return tuple(_value(args[0], v) for v in value)
    if origin in (Mapping, dict):
        return {k: _free(v) for k, v in value.items()}
    if hint is float:
        return float(value)
    return value


def _free(value: Any) -> Any:
    """Rebuild a value of no declared type: numbers that JSON has no word for come back as floats."""
    if isinstance(value, list):
        return tuple(_free(v) for v in value)
    return float(value) if value in ("nan", "inf", "-inf") else value
