"""What a step's graph shows beside the parameters: leaves outside of them, dead terms, and functions whose
backward pass does not heed what it is handed.

NOTE [Deaf functions]
A node of autograd's graph is a linear map of the gradient that it is handed. A function of the user's may be
none on purpose: it clips that gradient, or gives it unit length; or it adds something of its own. But all of
these heed it: for minus that gradient and for three times it, no such function gives the same to the bit as
for that gradient itself, in everything that it gives. One that does has left it out of its backward pass,
and with it every weight, mean and sign that stands between it and the loss.

Left out are zeros (a function that cuts on purpose), and single numbers (a term that is smuggled into the
graph to have a gradient of one: the balancing loss of experts). Functions are called once the numbers of the
step have been taken, as a backward pass may write to what it has kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.reverse.reverse import call_custom, fused
from gradflow.functional.tap.nodes import Node, converts, exchanges, nodes_under, operation
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.torch_private import input_metadata
from gradflow.records import DeafRecord, OutsideRecord, TermRecord

_LINEAR = frozenset(("add", "sub", "rsub", "neg", "mul", "div", "mean", "sum", "to_copy", "view", "squeeze"))
_COMPILED = ("CompiledFunctionBackward",)  # written by a compiler, which has each of them called once
_TAKEN_OUT = frozenset(("detach", "data"))  # which somebody wrote down: they mean it
_REGISTERS = frozenset(vars(nn.Module()))  # attributes that every module has: what they hold is registered


def constant_terms(structure: Structure | None, dataflow: DataFlow) -> list[TermRecord]:
    """Return the summands of the loss that were computed from the model and carry no gradient.

    Those are left out that were detached by name: a constant that is meant to be one.

    Args:
        structure: the graph.
        dataflow: what of the data went on without its gradient, and into which node.
    """
    if structure is None or not structure.nodes:
        return []
    found: dict[Node, TermRecord] = {}
    summands = set(_summing(next(iter(structure.nodes))))
    for node, (kind, layer), reason in dataflow.joins:
        if node in summands and kind == "layer" and reason and reason not in _TAKEN_OUT:
            op = structure.group_of.get(node, operation(node))
            found.setdefault(node, TermRecord(op=op, made_by=reason, layer=layer, reason="no graph"))
    return list(found.values())


def _summing(root: Node) -> Iterator[Node]:
    """Yield the nodes at which terms are added to the loss, as numbers."""
    for node in nodes_under([root], stops=lambda n: operation(n) not in _LINEAR):
        metadata = input_metadata(node)
        scalar = bool(metadata) and not tuple(metadata[0].shape)
        if operation(node) in ("add", "sub", "rsub") and scalar:
            yield node


def outside_records(
    leaves: Collection[Tensor], model: nn.Module, known: Collection[int], optimized: Collection[int]
) -> list[OutsideRecord]:
    """Return the leaves that require a gradient and belong to no registered parameter.

    Args:
        leaves: those that are neither working parameters nor tensors of the batch.
        model: whose modules are searched for their names.
        known: ids of the registered parameters.
        optimized: ids of the tensors that the optimizer holds.
    """
    strange = [leaf for leaf in leaves if id(leaf) not in known]
    names = _names(model) if strange else {}
    return [
        OutsideRecord(name=names.get(id(leaf), ""), shape=tuple(leaf.shape), optimized=id(leaf) in optimized)
        for leaf in strange
        if id(leaf) in names or id(leaf) in optimized
    ]


def _names(model: nn.Module) -> Mapping[int, str]:
    """Return where modules hold tensors past their registers: on attributes, in lists, in modules there."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _REGISTERS:
                _search(value, f"{path}.{key}".lstrip("."), found, 3)
    return found


def _search(value: Any, name: str, found: dict[int, str], depth: int) -> None:
    if isinstance(value, Tensor):
        found.setdefault(id(value), name)
    elif isinstance(value, nn.Module):
        for key, parameter in value.named_parameters():
            found.setdefault(id(parameter), f"{name}.{key}")
    elif isinstance(value, (list, tuple)) and depth:
        for i, entry in enumerate(value[:1000]):
            _search(entry, f"{name}[{i}]", found, depth - 1)
    elif isinstance(value, dict) and depth:
        for key, entry in list(value.items())[:1000]:
            _search(entry, f"{name}[{key!r}]", found, depth - 1)
    elif not isinstance(value, (str, bytes, int, float, list, tuple, dict)) and value is not None:
        for i, tensor in enumerate(iter_tensors(value)):
            found.setdefault(id(tensor), f"{name}[{i}]")


def has_own_functions(structure: Structure | None) -> bool:
    """Whether a graph holds nodes of functions written in Python."""
    return structure is not None and any(map(_is_own, structure.nodes))


def deaf_functions(structure: Structure) -> list[DeafRecord]:
    """Return the functions whose backward pass does not heed what it is handed; see NOTE [Deaf functions].

    Args:
        structure: the graph of a step, kept.
    """
    assert structure.root is not None
    own = {node: len(input_metadata(node)) for node in structure.nodes if _is_own(node)}
    edges: list[Any] = [GradientEdge(node, i) for node, number in own.items() for i in range(number)]
    arrived = iter(fused(structure.root, edges, retain_graph=True) if edges else [])
    found = []
    with torch.no_grad():
        for node, number in own.items():
            handed = [next(arrived) for _ in range(number)]
            known = [g for g in handed if g is not None and g.is_floating_point() and g.numel()]
            if known and _is_deaf(node, handed):
                found.append(
                    DeafRecord(
                        name=type(node).__name__.removesuffix("Backward"),
                        at=structure.group_of.get(node, ""),
                        layer_at=_layer_before(structure, node),
                        least=min(float(g.min()) for g in known),
                        largest=max(float(g.max()) for g in known),
                    )
                )
    return found


def _is_own(node: Node) -> bool:
    custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    return custom and not (
        is_probe(node) or converts(node) or exchanges(node) or type(node).__name__ in _COMPILED
    )


def _is_deaf(node: Node, handed: list[Tensor | None]) -> bool:
    """Whether a function gives the same for a gradient, for minus that, and for three times it."""
    first: list[Tensor] | None = None
    for factor in (1.0, -1.0, 3.0):
        # Where all that came is zero, anything else will do.
        some = any(g is not None and bool(g.any()) for g in handed)
        given = [g if g is None else factor * (g if some else torch.ones_like(g)) for g in handed]
        results = [r for r in call_custom(node, given) if r is not None and r.numel() > 1 and bool(r.any())]
        if first is None:
            first = [r.clone() for r in results]  # a backward pass may write to what it has given before
        elif len(results) != len(first) or not all(map(torch.equal, results, first)):
            return False
        if not first:
            return False
    return True


def _layer_before(structure: Structure, node: Node) -> str:
    """Return the layer call that a node is in, or else whose output it takes."""
    groups = structure.groups
    names = [structure.group_of.get(node, "")]
    below = nodes_under([node], stops=is_probe, nearest_first=True)
    names += [structure.group_of[n] for n in below if is_probe(n)]
    calls = (groups[name].call for name in names if name in groups)
    return next((call.name for call in calls if call is not None), "")
