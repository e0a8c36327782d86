"""At which layers the remedies of a cause are applied: read off the record and the cause."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import attrs

from gradflow.detect.evidence import activations_of, early, last_layers, late, row_gain
from gradflow.detect.view import Flow, flow_of
from gradflow.detect.wiring import layer_name, node_name
from gradflow.records import ActivationRecord, Cause, FlowRecord, Issue

SMALL_GAIN, LARGE_GAIN = 0.3, 2.0  # of rows: outside of these, weights are not of a usual size


@attrs.frozen(eq=False)
class Target:
    """A cause with the layers that it speaks of.

    Args:
        cause: the cause.
        flow: the record that it was seen in, along its wiring.
    """

    cause: Cause
    flow: Flow

    @classmethod
    def of(cls, cause: Cause, record: FlowRecord) -> Target:
        """Return the target for a cause that was seen in a record."""
        return cls(cause, flow_of(record))

    @property
    def node(self) -> str:
        """The node of the layer at fault."""
        return node_name(self.cause.layer)

    @property
    def module(self) -> str:
        """Qualified name of the module at fault."""
        return module_of(self.cause.layer)

    @property
    def same(self) -> tuple[Issue, ...]:
        """The issues of the cause's type that it explains, its own first."""
        return tuple(i for i in self.cause.issues if i.issue_type == self.cause.issue_type)

    @property
    def group(self) -> list[str]:
        """The modules with a weight matrix that have an issue of the cause's type."""
        return self._matrices(node_name(issue.layer) for issue in self.same)

    @property
    def hidden(self) -> list[str]:
        """All modules with a weight matrix but those that the loss is computed from, in order."""
        last = set(last_layers(self.flow))
        return self._matrices(n for n in self.flow.layers if n not in last)

    @property
    def weighted(self) -> list[str]:
        """Those of the hidden modules whose matrix is called `weight`, as that of attention is not."""
        return [n for n in self.hidden if f"{n}.weight" in self.flow.parameters]

    @property
    def matrices(self) -> list[str]:
        """All modules with a weight matrix, in order."""
        return self._matrices(self.flow.layers)

    @property
    def entry(self) -> str:
        """The first module with a weight matrix that is no table: what the numbers of a batch enter."""
        found = self._matrices(n for n in self.flow.layers if not self.flow.is_table(n))
        return found[0] if found else self.module

    @property
    def actions(self) -> tuple[str, ...]:
        """All that is recommended for its own issue."""
        return self.cause.issues[0].recommended_actions if self.cause.issues else ()

    @property
    def description(self) -> str:
        """What its own issue says."""
        return self.cause.issues[0].description if self.cause.issues else ""

    def readers(self) -> list[str]:
        """Return the modules with parameters that the output of the layer at fault enters next."""
        found, todo, seen = [], [self.node], {self.node}
        while todo:
            for node in self.flow.wiring.after(todo.pop()):
                if node not in seen:
                    seen.add(node)
                    (found if self.flow.layers[node].parameters else todo).append(node)
        return list(dict.fromkeys(module_of(layer_name(n)) for n in found))

    def blocks(self) -> list[str]:
        """Return the repeated blocks that the layer at fault stands in, whose names differ in a number:
        `layers.0` to `layers.9` for `layers.2.fc`; empty where nothing is repeated.
        """
        parts = self.module.split(".")
        for depth in range(len(parts), 0, -1):
            if parts[depth - 1].isdigit():
                found = self.alike(".".join(parts[:depth]))
                return found if len(found) > 1 else []
        return []

    def bare_blocks(self) -> list[str]:
        """Return the repeated blocks if no skip connection leads round them already.

        One does where something behind a block is fed by a layer in it and by one before it. Some blocks of
        a run may be dropped, and a skip round them all joins at the last alone: a tenth of them decides.
        """
        found, joined = self.blocks(), set()
        for node in self.flow.layers:
            before = [module_of(layer_name(b)) for b in self.flow.wiring.before(node)]
            for block in found:
                inside = [name == block or name.startswith(f"{block}.") for name in before]
                if any(inside) and not all(inside):
                    joined.add(block)
        return [] if 10 * len(joined) >= len(found) else found

    def alike(self, module: str) -> list[str]:
        """Return the modules whose names differ from one by numbers alone, itself at least."""
        pattern = _numberless(module)
        every = dict.fromkeys(
            ".".join(parts[:depth])
            for parts in (layer.module.split(".") for layer in self.flow.record.layers)
            for depth in range(1, len(parts) + 1)
        )
        return [name for name in every if _numberless(name) == pattern] or [module]

    def parameters_alike(self, name: str) -> list[str]:
        """Return the parameters of as many numbers that have the last name of one."""
        own = self.flow.parameters.get(name)
        if own is None:
            return []
        last = name.rpartition(".")[2]
        return [
            p.name
            for p in self.flow.record.parameters
            if p.name.rpartition(".")[2] == last and p.num_elements == own.num_elements and p.trainable
        ]

    def ops(self) -> frozenset[str]:
        """Return the types of all operations in the graph, in small letters."""
        return frozenset(node.type.lower() for node in self.flow.wiring.nodes.values() if node.kind == "op")

    def norms_on_the_path(self) -> tuple[list[str], list[str]]:
        """Return the norms that stand on the path from block to block, and the layers that read them.

        Such a norm is fed by another one and by the branch that starts there: the nearest layers before it
        are that norm and the end of the branch.
        """
        flow = self.flow
        every = [n for n in flow.layers if flow.is_norm(n)]
        linked = [
            n for n in every if any(flow.is_norm(m) for m in (*flow.wiring.before(n), *flow.wiring.after(n)))
        ]
        sources = dict.fromkeys([*linked, *(b for n in linked for b in flow.wiring.before(n))])
        readers = dict.fromkeys(
            a
            for s in sources
            for a in flow.wiring.after(s)
            if not flow.is_norm(a) and flow.layers[a].parameters
        )
        return [module_of(layer_name(n)) for n in linked], list(
            dict.fromkeys(module_of(layer_name(n)) for n in readers)
        )

    def rectified(self) -> list[str]:
        """Return the hidden modules with a weight matrix that feed a rectifier or its like."""
        smooth = {"gelu", "silu", "relu", "leakyrelu", "leaky_relu", "elu", "relu6", "mish"}
        return [
            n
            for n in self.weighted
            if any(a.kind == "rectifier" for a in activations_of(self.flow, node_name(n)))
            or {
                self.flow.layers[b].type.lower()
                for b in self.flow.wiring.after(node_name(n))
                if b in self.flow.layers
            }
            & smooth
            or set(self.flow.wiring.ops_after(node_name(n))) & smooth
        ]

    def off_scale(self) -> list[str]:
        """Return the modules whose weights began as much too small, or too large, as those of the cause."""
        own = row_gain(self.flow, self.node, early) if self.node in self.flow.layers else math.nan
        if own < SMALL_GAIN:
            return [n for n in self.matrices if row_gain(self.flow, node_name(n), early) < SMALL_GAIN]
        if own >= LARGE_GAIN:
            return [n for n in self.matrices if row_gain(self.flow, node_name(n), early) >= LARGE_GAIN]
        return []

    @property
    def feeder(self) -> str:
        """The module with a weight matrix at the fault: the layer itself, or the nearest one before it."""
        if self.flow.has_matrix(self.node) or "@" in self.node or self.node not in self.flow.layers:
            return self.module
        before = [n for n in self.flow.wiring.before(self.node) if self.flow.layers[n].parameters]
        return module_of(layer_name(before[0])) if before else self.module

    def activations(
        self, kinds: Iterable[str] = ("rectifier", "bounded", "softmax")
    ) -> list[ActivationRecord]:
        """Return the activations at the layer at fault: itself, or those that it feeds."""
        own = [a for a in self.flow.record.activations if self.cause.layer in (a.name, a.layer)]
        fed = list(activations_of(self.flow, self.node)) if self.node in self.flow.layers else []
        wanted = set(kinds)
        return [a for a in dict.fromkeys([*own, *fed]) if a.kind in wanted]

    def all_activations(self, kinds: Iterable[str], ops: Iterable[str] = ()) -> list[ActivationRecord]:
        """Return all hidden activations of some kinds, or of some operations, in the record."""
        wanted, named = set(kinds), set(ops)
        return [
            a
            for a in self.flow.record.activations
            if (a.kind in wanted) and (not named or a.op in named) and not self.is_output(a)
        ]

    def is_output(self, activation: ActivationRecord) -> bool:
        """Whether an activation module is the last layer on its way to the loss."""
        node = node_name(activation.layer)
        return node in self.flow.layers and self.flow.wiring.is_last(node) and not activation.functional

    def entering(self) -> float:
        """Return the rms of what enters the activation at fault; NaN if that is not known."""
        found = [late(a.input_rms) for a in self.activations()]
        return max((value for value in found if math.isfinite(value)), default=math.nan)

    def _matrices(self, nodes: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(module_of(layer_name(n)) for n in nodes if self.flow.has_matrix(n)))


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def module_of(call: str) -> str:
    """Return the module of a layer call, or of the activation behind it.

    >>> module_of("relu@1"), module_of("fc1:relu")
    ('relu', 'fc1')
    """
    return call.split("@")[0].split(":")[0]
