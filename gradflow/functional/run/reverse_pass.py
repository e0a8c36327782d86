"""The reverse pass of a fused step: gradients of the parameters, and the statistics of every probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from gradflow.functional.model.state import Tensors
from gradflow.functional.model.trees import summable
from gradflow.functional.reverse.autograd_graph import Structure
from gradflow.functional.reverse.passing import Gradient, Passed
from gradflow.functional.reverse.reverse import (
    Flows,
    ReentrantCheckpoint,
    accumulated,
    check_walkable,
    fused,
    walked,
)
from gradflow.functional.run.program import Program
from gradflow.functional.tap.probes import magnitude
from gradflow.functional.tap.recorder import Recorder


@attrs.frozen(eq=False)
class Gradients:
    """What a reverse pass gave.

    Args:
        parameters: the gradient of every trainable parameter by name, or what was read off it as it passed;
            None where no path leads there.
        outputs: Σg² of each probe, in the order of the recorder's sites; None where no gradient arrived.
        flows: on every edge, where they were asked for.
    """

    parameters: Mapping[str, Gradient | None]
    outputs: list[Tensor | None]
    flows: Flows | None = None

    @property
    def are_none(self) -> bool:
        """Whether no path leads to any parameter."""
        return all(gradient is None for gradient in self.parameters.values())

    @property
    def kept(self) -> dict[str, Tensor | None]:
        """The gradients of a step whose gradients are kept."""
        return {name: g for name, g in self.parameters.items() if not isinstance(g, Passed)}

    @property
    def finite(self) -> bool:
        """Whether every gradient of a parameter is finite."""
        return all(
            g.finite if isinstance(g, Passed) else bool(torch.isfinite(summable(g)).all())
            for g in self.parameters.values()
            if g is not None
        )


def reverse_pass(
    program: Program,
    recorder: Recorder,
    loss: Tensor,
    structure: Structure | None,
    *,
    full: bool = False,
    ranks: bool = False,
    keep: bool = False,
    scale: float = 1.0,
) -> Gradients:
    """Differentiate the loss of a step.

    Args:
        program: whose working parameters are meant.
        recorder: of the step.
        loss: its loss, with its graph.
        structure: the contracted graph, if it was built.
        full: measure the flow on every edge.
        ranks: and the effective rank of every layer's output gradient.
        keep: leave the autograd graph as it is, so that it can be walked again.
        scale: of the loss while it is differentiated; what is returned is unscaled.

    Raises:
        ReentrantCheckpoint: if the step must be run again, with `backward()` for its reverse pass.
    """
    if program.learned.reentrant:
        return _accumulated(program, recorder, loss)
    if structure is not None:
        check_walkable(structure)
    trainable = program.state.trainable
    # The original of a parameter enters the graph too, where a list or the loss's closure holds it.
    held = program.learned.held
    leaves = [
        *trainable.values(),
        *held.values(),
        *(source for site in recorder.sites if (source := site.edge or site.slot) is not None),
    ]
    number = len(trainable) + len(held)
    flows = None
    if full and structure is not None:
        hooked = program.taps.hooked
        found = fused(loss, leaves, retain_graph=True) if hooked else []
        flows = walked(loss, structure, exact=True, ranks=ranks)  # an underflow would go unnoticed
        _check_flat(recorder, trainable, len(leaves) - len(held))
        if hooked:  # hooks on tensors act in autograd's own pass, not in the walk
            gradients, outputs = found[:number], _outputs(recorder, found[number:])
        else:
            gradients = [flows.leaves.get(id(p)) for p in (*trainable.values(), *held.values())]
            outputs = [flows.probes.get(id(site)) for site in recorder.sites]
    else:
        # In a short dtype the scale itself may overflow, as it does where a scaler multiplies the loss.
        cotangent = None if scale == 1.0 else torch.full_like(loss, scale, dtype=torch.float64).to(loss.dtype)
        found = fused(loss, leaves, cotangent=cotangent, retain_graph=keep)
        _check_flat(recorder, trainable, len(leaves) - len(held))
        gradients, outputs = found[:number], _outputs(recorder, found[number:])
        if scale != 1.0:
            gradients = [None if g is None else g / scale for g in gradients]
            outputs = [None if m is None else _unscaled(m, scale) for m in outputs]
    return Gradients(_by_name(trainable, held, gradients), outputs, flows)


def _unscaled(found: Tensor, scale: float) -> Tensor:
    """Return a magnitude without the loss's scale; see NOTE [Exact and fast] in tap/probes.py."""
    return found / scale if found.dtype == torch.float64 else found / scale / scale


def _outputs(recorder: Recorder, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the magnitude at each site, of what was found for its edge or its slot."""
    return [
        g if site.edge is None or g is None else magnitude(g, exact=site.exact)
        for site, g in zip(recorder.sites, found, strict=True)
    ]


def _accumulated(program: Program, recorder: Recorder, loss: Tensor) -> Gradients:
    """Differentiate by `backward()`, which is all that reentrant checkpoints take."""
    state = program.state
    trainable, held = state.trainable, program.learned.held
    slots = [site.slot for site in recorder.sites if site.slot is not None]
    leaves = [*trainable.values(), *held.values(), *slots]
    ours = [leaf for leaf in leaves if id(leaf) not in state.originals]
    outside = accumulated(loss, ours, state.originals)
    found = {name: p.grad for name, p in trainable.items()}
    for key, gradient in outside.items():
        name = state.originals[key]
        found[name] = _sum(found[name], gradient)
    own = [site.slot for site in recorder.sites]  # those made while it ran included
    outputs = [slot.grad if slot is not None else None for slot in own]
    _clear(trainable, recorder)
    return Gradients(found, outputs)


def _check_flat(recorder: Recorder, trainable: Tensors, num_leaves: int) -> None:
    """Raise if another reverse pass ran inside this one, as in a hand-written reversible layer.

    The inner pass has left its gradients in the `.grad` of our leaves, and has probed calls of its own.
    """
    if len(recorder.sites) + len(trainable) > num_leaves or any(
        p.grad is not None for p in trainable.values()
    ):
        _clear(trainable, recorder)
        raise ReentrantCheckpoint


def _clear(trainable: Tensors, recorder: Recorder) -> None:
    """Leave no `.grad` on our leaves."""
    for leaf in (*trainable.values(), *(site.slot for site in recorder.sites)):
        if leaf is not None:
            leaf.grad = None


def _by_name(
    trainable: Tensors, held: Tensors, gradients: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Return the gradients of the working parameters by name, with those of `held` ones added."""
    found = dict(zip(trainable, gradients, strict=False))
    for name, other in zip(held, gradients[len(trainable) :], strict=False):
        found[name] = _sum(found[name], other)
    return found


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
