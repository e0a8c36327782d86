"""What the graph of the first step shows beside the parameters: leaves outside of them, and dead terms."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.dataflow import DataFlow
from gradflow.functional.tap.nodes import Node, nodes_under, operation
from gradflow.functional.torch_private import input_metadata
from gradflow.records import OutsideRecord, TermRecord

_LINEAR = frozenset(("add", "sub", "rsub", "neg", "mul", "div", "mean", "sum", "to_copy", "view", "squeeze"))
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
    summands = set(_summing(structure.nodes[0]))
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
