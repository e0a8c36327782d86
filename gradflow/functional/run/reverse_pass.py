"""The reverse pass of a fused step: gradients of the parameters, and the statistics of every probe."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.functional.model.state import Tensors
from gradflow.functional.model.trees import summable
from gradflow.functional.processes.shards import local, summed
from gradflow.functional.reach.products import asked_edges
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
from gradflow.functional.tap.nodes import Position
from gradflow.functional.tap.probes import Site
from gradflow.functional.tap.recorder import Recorder
from gradflow.functional.tap.sums import magnitude, magnitudes


@attrs.frozen(eq=False)
class Gradients:
    """What a reverse pass gave.

    Args:
        parameters: the gradient of every trainable parameter by name, or what was read off it as it passed;
            None where no path leads there.
        outputs: Σg² of each probe, in the order of the recorder's sites; None where no gradient arrived.
        flows: on every edge, where they were asked for.
        wholes: by call and number of the probe, the gradients that are kept whole.
        products: what products have handed back, where the graph is kept for a walk.
    """

    parameters: Mapping[str, Gradient | None]
    outputs: list[Tensor | None]
    flows: Flows | None = None
    wholes: Mapping[tuple[str, int], Tensor] = attrs.field(factory=dict)
    products: Mapping[Position, Tensor] = attrs.field(factory=dict)

    @property
    def parts(self) -> dict[str, Gradient | None]:
        """The gradients by name, and of a sharded one what this process holds of it."""
        return {n: local(g) if isinstance(g, Tensor) else g for n, g in self.parameters.items()}

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
            for g in self.parts.values()
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
    entering = program.given.stages.inputs
    if program.learned.reentrant:
        found = _accumulated(program, recorder, loss)
        _hand_back(program, [tensor.grad for tensor in entering])
        return found
    if structure is not None:
        check_walkable(structure)
    if program.state.shards.groups:
        found = _exchanged(program, recorder, loss, scale, keep=keep or full)
        _hand_back(program, [tensor.grad for tensor in entering], scale)
        if full and structure is not None:
            return attrs.evolve(
                found, flows=walked(loss, structure, exact=True, ranks=ranks, kept=program.taps.whole_nodes)
            )
        return found
    trainable = program.state.trainable
    # The original of a parameter enters the graph too, where a list or the loss's closure holds it.
    held = program.learned.held
    leaves = [
        *trainable.values(),
        *held.values(),
        *[source for site in recorder.sites if (source := site.edge or site.slot) is not None],
    ]
    number = len(trainable) + len(held)
    num_leaves = len(leaves) - len(held)
    back = [tensor for tensor in entering if tensor.requires_grad] if entering else []
    flows: Flows | None = None
    products: dict[Position, Tensor] = {}
    if full and structure is not None:
        hooked = program.taps.hooked
        found = fused(loss, [*back, *leaves], retain_graph=True) if hooked else []
        found = found[len(back) :]
        kept = program.taps.whole_nodes
        flows = walked(
            loss, structure, exact=True, ranks=ranks, kept=kept
        )  # fast, an underflow goes unnoticed
        _check_flat(recorder, trainable, num_leaves)
        handed = [flows.leaves.get(id(tensor)) for tensor in back]
        if hooked:  # hooks on tensors act in autograd's own pass, not in the walk
            gradients, outputs = found[:number], _outputs(recorder, found[number:])
        else:
            gradients = [flows.leaves.get(id(p)) for p in (*trainable.values(), *held.values())]
            outputs = [flows.probes.get(id(site)) for site in recorder.sites]
    else:
        edges = _edges_for_a_walk(program, structure) if keep and scale == 1.0 else {}
        asked = [*edges.values(), *back, *leaves]
        found = fused(loss, asked, cotangent=_cotangent(loss, scale), retain_graph=keep)
        _check_flat(recorder, trainable, num_leaves)
        if edges:
            products = {position: g for position, g in zip(edges, found, strict=False) if g is not None}
            found = found[len(edges) :]
        handed, found = found[: len(back)], found[len(back) :]
        gradients, outputs = found[:number], _outputs(recorder, found[number:])
        if scale != 1.0:
            gradients = [None if g is None else g / scale for g in gradients]
            outputs = [None if m is None else _unscaled(m, scale) for m in outputs]
    given = {id(tensor): gradient for tensor, gradient in zip(back, handed, strict=True)}
    _hand_back(program, [given.get(id(tensor)) for tensor in entering], scale if flows is None else 1.0)
    asked = found[number:] if flows is None else [_kept(flows, site) for site in recorder.sites]
    wholes = _wholes(program, recorder, asked)
    by_name = _placed(_by_name(trainable, held, gradients), trainable)
    return Gradients(by_name, outputs, flows, wholes, products)


def _edges_for_a_walk(program: Program, structure: Structure | None) -> dict[Position, GradientEdge]:
    """Return the edges that spare a walk its products; see NOTE [Products that are not called].

    Empty where what the pass hands out may be other than what its nodes hand back.
    """
    alone = program.given.stages.alone and not program.taps.exchanges and program.taps.whole_nodes is None
    if structure is None or not alone or program.taps.hooked or program.learned.held:
        return {}
    return asked_edges(structure.nodes)


def _hand_back(program: Program, gradients: Sequence[Tensor | None], scale: float = 1.0) -> None:
    """Keep the gradients at what the stage before has handed on, for it, and leave no `.grad` there."""
    program.given.stages.hand_back(gradients, scale)
    for tensor in program.given.stages.inputs:
        tensor.grad = None


def _kept(flows: Flows, site: Site) -> Tensor | None:
    return next(iter(flows.kept.get(("probe", id(site)), ())), None)


def _wholes(
    program: Program, recorder: Recorder, found: Sequence[Tensor | None]
) -> dict[tuple[str, int], Tensor]:
    """Return the gradients that were asked for by an edge, of the calls of which they are kept."""
    if not program.taps.whole:
        return {}
    return {
        (name, site.index): g
        for site, g in zip(recorder.sites, found, strict=True)
        if site.edge is not None
        and g is not None
        and (name := recorder.calls[site.call].name) in program.taps.whole
    }


def _unscaled(found: Tensor, scale: float) -> Tensor:
    """Return a magnitude without the loss's scale; see NOTE [Exact and fast] in tap/sums.py."""
    return found / scale if found.dtype == torch.float64 else found / scale / scale


def _outputs(recorder: Recorder, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the magnitude at each site, of what was found for its edge or its slot."""
    outputs = list(found)
    fast: list[int] = []
    for i, site in enumerate(recorder.sites):
        g = found[i]
        if g is None or site.edge is None:
            continue
        if site.exact:
            outputs[i] = magnitude(g, exact=True)
        else:
            fast.append(i)
    for i, size in zip(fast, magnitudes([g for i in fast if (g := found[i]) is not None]), strict=True):
        outputs[i] = size
    return outputs


def _accumulated(program: Program, recorder: Recorder, loss: Tensor) -> Gradients:
    """Differentiate by `backward()`, which is all that reentrant checkpoints take."""
    state = program.state
    trainable, held = state.trainable, program.learned.held
    slots = [site.slot for site in recorder.sites if site.slot is not None]
    leaves = [*trainable.values(), *held.values(), *slots, *program.given.stages.inputs]
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


def _exchanged(program: Program, recorder: Recorder, loss: Tensor, scale: float, *, keep: bool) -> Gradients:
    """Differentiate as training does, by `backward()`, in which the processes exchange what they have.

    Gradients of sharded parameters are found in the `.grad` of their slices; see NOTE [Sharded parameters].
    """
    state, cotangent = program.state, _cotangent(loss, scale)
    trainable, shards = state.trainable, state.shards
    whole = shards.leaves().values()
    slots = [site.slot for site in recorder.sites if site.slot is not None]
    plain = [p for name, p in trainable.items() if name not in shards.gathered]
    whole_at: dict[int, Tensor] = {}
    with shards.handing_out(), _told_at([site for site in recorder.sites if site.edge is not None], whole_at):
        theirs = program.given.stages.inputs
        accumulated(loss, [*plain, *slots, *whole, *theirs], cotangent=cotangent, retain_graph=keep)
        found = {name: p.grad for name, p in trainable.items()}
    asked = [whole_at.get(id(site)) for site in recorder.sites]
    outputs = [
        (None if site.slot is None else site.slot.grad) if g is None else magnitude(g, exact=site.exact)
        for site, g in zip(recorder.sites, asked, strict=True)
    ]
    wholes = _wholes(program, recorder, asked)
    _clear({name: p for name, p in trainable.items() if name not in shards.gathered}, recorder)
    if scale != 1.0:
        found = {name: None if g is None else g / scale for name, g in found.items()}
        outputs = [None if m is None else _unscaled(m, scale) for m in outputs]
    return Gradients(_placed(found, trainable), outputs, wholes=wholes)


def _placed(found: dict[str, Tensor | None], trainable: Tensors) -> dict[str, Tensor | None]:
    """Return gradients in the placements of their parameters, where those are spread over processes."""
    return {
        name: g if g is None or type(g) is Tensor else summed(g, trainable[name]) for name, g in found.items()
    }


@contextlib.contextmanager
def _told_at(sites: Sequence[Site], found: dict[int, Tensor]) -> Iterator[None]:
    """Keep, by id of the site, what a backward pass hands to the node that each edge names.

    `autograd.grad` hands out the gradient of an edge; `backward()` does not.
    """

    def note(site: Site, gradients: Sequence[Tensor | None]) -> None:
        assert site.edge is not None
        gradient = gradients[site.edge.output_nr]
        if gradient is not None:
            found[id(site)] = gradient.detach()

    with contextlib.ExitStack() as stack:
        for site in sites:
            assert site.edge is not None
            handle = site.edge.node.register_prehook(functools.partial(note, site))
            stack.callback(handle.remove)
        yield


def _cotangent(loss: Tensor, scale: float) -> Tensor | None:
    """Return the loss's own gradient, None for 1.

    In a short dtype the scale itself may overflow, as it does where a scaler multiplies the loss.
    """
    return None if scale == 1.0 else torch.full_like(loss, scale, dtype=torch.float64).to(loss.dtype)


def _check_flat(recorder: Recorder, trainable: Tensors, num_leaves: int) -> None:
    """Raise if another reverse pass ran inside this one, as in a hand-written reversible layer.

    The inner pass has left its gradients in the `.grad` of our leaves, and has probed calls of its own.
    """
    if len(recorder.sites) + len(trainable) <= num_leaves:
        for parameter in trainable.values():
            if parameter.grad is not None:
                break
        else:
            return
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
