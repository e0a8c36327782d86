"""The graph as the gradient sees it: nodes, edges, and what flows along them."""

from __future__ import annotations

import attrs

from gradflow.records.fields import Floats, array_field, to_tuple


@attrs.frozen(kw_only=True)
class NodeRecord:
    """One node of the graph as the gradient sees it. Arrays have shape (measured steps,).

    Args:
        name: unique: a layer call's name, an op (`add`, `relu@3`), an input (`input.0`), or `loss`.
            The model itself, where it is a layer, is `(model)`. Where a layer has one of these names, the
            other is put in brackets. A layer call that some steps run in another order is `act (2)` for them.
        kind: `layer`, `op`, `input` or `loss`.
        layer: qualified module name for a layer; for an op, the innermost module it ran in.
        type: class name, or the op's name.
        shape: shape of its output, if known.
        num_elements: number of elements of its output; 0 if unknown.
        parameters: names of the parameters that enter here.
        taken: for an op that takes one slice of an axis (`x[:, -1]`): the axis, the index from 0, and the
            size of the axis; empty for others.
        along: for a softmax or its logarithm, or a layer that takes one: the axis, from 0; -1 for others.
        order: position in the order of execution; the loss has the largest.
        grad_norm: ‖g_v‖ of its output; empty if only the topology was taken.
        input_grad_norm: ‖c_v‖, all of its input cotangents together (parameters excluded).
        effective_rank: exp of the entropy of the normalised squared singular values of g_v as a matrix
            (samples × features), of layers at the first and the last step; NaN elsewhere.
        reachable: whether a gradient can flow from the loss to it.
        reason: for an unreachable node, why, in one sentence.
    """

    name: str
    kind: str
    layer: str = ""
    type: str = ""
    shape: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    num_elements: int = 0
    parameters: tuple[str, ...] = attrs.field(default=(), converter=to_tuple)
    taken: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)
    along: int = -1
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

    nodes: tuple[NodeRecord, ...] = attrs.field(converter=to_tuple)
    edges: tuple[EdgeRecord, ...] = attrs.field(converter=to_tuple)
    steps: tuple[int, ...] = attrs.field(default=(), converter=to_tuple)

    @property
    def measured(self) -> bool:
        """Whether the edges carry flows."""
        return bool(self.steps)
