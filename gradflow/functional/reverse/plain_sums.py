"""Whether a loss is nothing but the sum or the mean of what the model returned.

Such a loss hands every element of the output the same gradient, whatever the output says. It stands where a
loss is missing: in a trial run, or for a part of a model whose output is for the next part. It can be meant,
too: a model that returns one loss per token is rightly averaged. So this is a fact for the record, and no
reason to refuse.
"""

from __future__ import annotations

import math

from gradflow.functional.reverse.autograd_graph import Group, Structure

# Operations that hand all elements of what they take one gradient, if all elements of theirs have one.
_EVEN = frozenset(
    (
        "add", "alias", "clone", "mean", "neg", "permute", "rsub", "squeeze", "sub", "sum", "t", "to_copy",
        "transpose", "unsafe_view", "unsqueeze", "view",
    )
)  # fmt: skip
_SCALING = frozenset(("div", "mul"))  # even if their other factor is one number


def plainly_summed(structure: Structure) -> tuple[int, ...]:
    """Return the shape of an output of the model that the loss is the sum or the mean of, up to a factor.

    Args:
        structure: of a step.

    Returns:
        The shape of the first such output with more than one element for each sample; empty if there is none,
        or if the loss takes anything else of the model as well.
    """
    ends = [call.end for call in structure.calls if not call.module]
    end = max(ends, default=0)
    into: dict[str, list[str]] = {}
    for source, target in structure.edges:
        into.setdefault(target, []).append(source)
    outputs: dict[str, tuple[int, ...]] = {}
    todo = list(into.get(structure.loss, ()))
    while todo:
        group = structure.groups[todo.pop()]
        if group.kind == "layer" or (group.kind == "op" and group.order < end):
            outputs[group.name] = group.shape
        elif _is_even(group, len(into.get(group.name, ()))):
            todo += into[group.name]
        else:
            return ()
    wide = (shape for shape in outputs.values() if len(shape) > 1 and math.prod(shape[1:]) > 1)
    return next(wide, ())


def _is_even(group: Group, num_sources: int) -> bool:
    """Whether an operation behind the model hands on the same gradient to every element."""
    if group.kind != "op" or not num_sources:
        return False
    return group.type in _EVEN or (group.type in _SCALING and num_sources == 1 and group.shape == ())
