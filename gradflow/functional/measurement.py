"""What a pipeline measures beyond the base: a `Measurement` is chosen, a `Session` listens to one run.

NOTE [Measured steps]
A session is told of what happens in the steps that are looked at closely: the first, powers of four, and
the last (under `vjp`, of the first alone, which is run once more under plain autograd to show its structure).
In such a step it hears, in this order:

1. `begin`, before the forward pass (again, if the step has to be run again: it then forgets what it heard);
2. `entered` and `left` for every module call, and `function` for every call of a PyTorch function, with the
   tensors that the model itself computes with, so that gradients with respect to them can be asked for;
3. `differentiate`, between the forward and the backward pass, with the loss and its whole graph at hand;
4. `end`, once, when the step has gone well and will not be run again.

After the last step, a session that says so in `wants_eval` hears the last batch once more, in eval mode:
`begin`, and then as in 2. Where the model or the loss cannot be run so, it hears a part.

It must leave no trace: no random state moved, nothing written to a tensor that it was shown, no tensor held
after `end`. What `fields` returns is put in `FlowRecord.extras`, and `notes` among the notes of the record's
provenance.

A session that has heard enough, or has found nothing for it in the first step, says so in `listens`: it then
costs nothing in the steps that follow.

What a session may rely on of a `Call`: `name`, the layer call's name as in the record (`relu@1`); `module`,
the qualified name of the module; `type`, its class name; `is_layer`, whether it is a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from gradflow.functional.reverse.reverse import ReentrantCheckpoint, fused
from gradflow.functional.tap.asked import Listener


class Session(Listener):
    """Listens to the measured steps of one run; see NOTE [Measured steps]. This base measures nothing."""

    def listens(self, *, end: bool) -> bool:
        """Return whether it wants to hear of a measured step; asked before each but the first.

        Args:
            end: whether it is the last one, as far as that is known.
        """
        return True

    def beside(self, modules: Mapping[str, str]) -> None:
        """Hear, before the first step, what other stages of a pipeline hold.

        Args:
            modules: the classes of their modules that hold others with parameters, by qualified name.
        """

    def differentiate(self, loss: Tensor) -> None:
        """Take gradients of the loss: `gradients(loss, tensors)` keeps the graph for the pass to come."""

    def end(self) -> None:
        """Keep the numbers of the step, and let go of its tensors."""

    def hears_alone(self) -> bool:
        """Whether it is of use where it only hears, as in a training's own pass.

        Then `differentiate` is never called. By default it is, if it does not override that.
        """
        return type(self).differentiate is Session.differentiate

    def wants_eval(self) -> bool:
        """Whether to hear the last batch once more, in eval mode. Asked once, after the last step."""
        return False

    def wants_curvature(self) -> bool:
        """Whether to measure how the loss bends along an update; asked once, at the end of a run with one."""
        return False

    def fields(self) -> Mapping[str, Any]:
        """Return what was measured, by the names it gets in `FlowRecord.extras`.

        Numbers, texts, NumPy arrays, tuples, lists and mappings of them, and attrs records; see
        `gradflow.register_record`. No tensors. Called once, after the last step.
        """
        return {}

    def notes(self) -> Sequence[str]:
        """Return what a reader must know to trust the numbers."""
        return ()

    def found(self) -> Sequence[str]:
        """Return what it found in the model of its own accord, and why; told in the report's head."""
        return ()


class Measurement(Protocol):
    """A choice of what else to measure: immutable and hashable, so that pipelines can be joined.

    It may have an attribute `names`, the names that its session's `fields` will return: then a name that is
    taken is an error before the run. Without it, a name that another measurement took gets `@2` at its end.
    """

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run.

        Args:
            model: the model, in the mode that it is run in.
            modules: its callable modules by qualified name.
        """
        ...


def some_of(names: Iterable[str], most: int = 2) -> str:
    """Return names as one text, the first few of them if there are many.

    >>> some_of(["a", "b", "c", "d"])
    'a, b and 2 more'
    """
    every = list(names)
    left = len(every) - most
    if left <= 0:
        return " and ".join(filter(None, (", ".join(every[:-1]), *every[-1:])))
    return f"{', '.join(every[:most])} and {left} more"


def gradients(
    loss: Tensor, tensors: Sequence[Tensor], cotangent: Tensor | None = None
) -> list[Tensor | None]:
    """Return the gradients of a tensor with respect to others, with the graph kept; None where no path leads.

    Args:
        loss: a tensor with its graph.
        tensors: tensors that it was computed from, leaves or not; those without a graph give None.
        cotangent: ∂L/∂loss, of its shape; None where it is the scalar loss itself.
    """
    known = [t for t in tensors if t.requires_grad]
    if loss.grad_fn is None or not known:
        return [None] * len(tensors)
    try:
        found = iter(fused(loss, known, cotangent=cotangent, retain_graph=True))
    except ReentrantCheckpoint:
        return [None] * len(tensors)
    return [next(found) if t.requires_grad else None for t in tensors]
