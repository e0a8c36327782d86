"""The gradients of one loss that flow through the policy's heads and through the value's, apart.

NOTE [Gradients through heads]
Every path from the loss to a shared parameter leads through some head. Let P be the heads of the policy, V
those of the value. The gradient through P is the sum over all paths that meet an output of P; the gradient
through V is over those that meet an output of V and none of P (a critic that judges the actor's action is not
a second way to the actor). Where the loss is a policy loss plus a value loss, they are what two backward
passes give, one of each.

By vector-Jacobian products: c, the gradient of the loss with respect to an output y of P, is pulled back from
y to the parameters, which sums the paths through y. Where one output of P feeds another, a path through both
would count twice, so c is first lessened by what came to y through the later ones: what remains are the paths
on which y is the head nearest to the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from gradflow.functional.measurement import gradients
from gradflow.functional.model.purity import preserved
from gradflow.functional.model.threads import exclusive
from gradflow.functional.policy.scene import children
from gradflow.functional.tap.nodes import nodes_under
from gradflow.functional.torch_private import node_number

Tensors = dict[str, Tensor]


@attrs.frozen(eq=False)
class HeadGradients:
    """Gradients of the parameters that flow through the policy's heads and through the value's.

    Args:
        policy: through the policy's heads, by name; parameters that none of these paths meets are left out.
        value: through the value's heads and not the policy's.
        shared: names of the parameters that both kinds of paths meet, in the order of the parameters.
        policy_reached: whether a path leads from the loss to the policy's heads.
        value_reached: whether one leads to the value's.
    """

    policy: Tensors
    value: Tensors
    shared: tuple[str, ...]
    policy_reached: bool
    value_reached: bool


def head_gradients(
    loss: Tensor, policy: Sequence[Tensor], value: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> HeadGradients:
    """Return the gradients of a loss through the policy's and through the value's heads, apart.

    See NOTE [Gradients through heads]. The graph is kept, and no `.grad` is touched.

    Args:
        loss: a scalar with its graph.
        policy: outputs of the policy's heads that the loss was computed from.
        value: outputs of the value's heads.
        parameters: by name; those that require no gradient are left out.

    >>> trunk, actor, critic = (torch.nn.Linear(2, 2) for _ in range(3))
    >>> h = trunk(torch.ones(4, 2))
    >>> logits, values = actor(h), critic(h)
    >>> names = {"trunk": trunk.weight, "actor": actor.weight}
    >>> found = head_gradients(logits[:, 0].sum() + values.sum(), [logits], [values], names)
    >>> found.shared, list(found.policy), list(found.value)
    (('trunk',), ['trunk', 'actor'], ['trunk'])
    """
    with exclusive(), preserved(), torch.inference_mode(False):  # a backward may run code of the user's
        return _head_gradients(loss, _with_graph(policy), _with_graph(value), parameters)


def _head_gradients(
    loss: Tensor, policy: list[Tensor], value: list[Tensor], parameters: Mapping[str, Tensor]
) -> HeadGradients:
    known = {name: p for name, p in parameters.items() if p.requires_grad}
    arrived = gradients(loss, [*policy, *value])
    to_policy, to_value = arrived[: len(policy)], arrived[len(policy) :]
    last = _last(policy, to_policy)
    past = gradients_of(policy, last, value)  # what comes to the value by way of the policy
    to_value = [_minus(c, p) for c, p in zip(to_value, past, strict=True)]
    last_value = _last(value, to_value)
    names, tensors = list(known), list(known.values())
    by_policy = gradients_of(policy, last, tensors)
    by_value = gradients_of(value, last_value, tensors)
    on = gradients_of(value, last_value, policy)  # and what goes on from the value to the policy
    again = gradients_of(policy, _last(policy, on), tensors)
    met = _leaves(value, stop=policy)
    through_value = {
        name: rest
        for name, p, g, a in zip(names, tensors, by_value, again, strict=True)
        if (rest := _minus(g, a)) is not None and id(p) in met
    }
    through_policy = {n: g for n, g in zip(names, by_policy, strict=True) if g is not None}
    behind = _leaves(policy, stop=value)
    return HeadGradients(
        through_policy,
        through_value,
        tuple(n for n, p in known.items() if id(p) in met and id(p) in behind),
        any(c is not None for c in to_policy),
        any(c is not None for c in to_value),
    )


def gradients_of(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients with respect to `tensors` of Σ⟨output, cotangent⟩; None where no path leads."""
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if c is not None]
    if not pairs or not tensors:
        return [None] * len(tensors)
    with torch.enable_grad():
        total = sum((y * c.detach()).sum() for y, c in pairs)
    assert isinstance(total, Tensor)
    return gradients(total, tensors)


def _last(outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the cotangents of the paths on which no other of `outputs` is nearer to the loss."""
    order = sorted(range(len(outputs)), key=lambda i: node_number(outputs[i].grad_fn))
    fns = {t.grad_fn for t in outputs}
    found = list(cotangents)
    for at, i in reversed(list(enumerate(order))):
        before = order[:at]
        below = nodes_under(children(outputs[i]))
        if found[i] is None or not before or not any(node in fns for node in below):
            continue
        more = gradients_of([outputs[i]], [found[i]], [outputs[j] for j in before])
        for j, extra in zip(before, more, strict=True):
            found[j] = _minus(found[j], extra)
    return found


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if a is None or b is None else a - b


def _with_graph(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors if t.grad_fn is not None}.values())


def _leaves(outputs: Sequence[Tensor], stop: Sequence[Tensor]) -> set[int]:
    """Return the ids of the leaves that outputs are computed from on paths that meet none of `stop`."""
    ends = {t.grad_fn for t in stop}
    roots = [t.grad_fn for t in outputs if t.grad_fn not in ends]
    below = nodes_under(roots, ends.__contains__)
    return {id(n.variable) for n in below if n not in ends and hasattr(n, "variable")}
