"""What happens in one step: layer calls as they run, probes on their outputs, statistics of the forward pass.

A `Recorder` is made anew for each step. It is told of every layer call by the taps (`taps.py`), and of
functional operations by the watch (`watch.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradflow.functional.model.trees import is_differentiable, iter_tensors, map_tensors
from gradflow.functional.processes.shards import local, settled
from gradflow.functional.tap.asked import Asked, MoreSlots, NeedsRetry
from gradflow.functional.tap.calls import (
    PASSING,
    ActivationKey,
    Call,
    Given,
    Observation,
    counter,
    split_of_output,
    unit_axis,
    version,
)
from gradflow.functional.tap.probes import (
    Site,
    eager_probe,
    in_place_probe,
    is_custom,
    probe,
)
from gradflow.functional.tap.sums import magnitude, num_positive, num_zero, statistics_dtype
from gradflow.functional.tap.tapped import TappedModel
from gradflow.functional.torch_private import Aside, is_view, node_number, transform_level, unwatched


@attrs.define(eq=False)
class Recorder:
    """The calls and observations of one step.

    Args:
        model: whose calls it is told of.
        asked: what is asked of the step.
    """

    model: TappedModel
    asked: Asked
    known: list[Call] = attrs.field(init=False)  # the calls of an earlier ordinary step
    alike: bool = attrs.field(init=False)  # whether all calls were the same so far, in the same order
    level: int = attrs.field(factory=transform_level)  # of torch.func transforms that the step itself runs in
    calls: list[Call] = attrs.field(factory=list)
    stack: list[int] = attrs.field(factory=list)
    observations: list[Observation] = attrs.field(factory=list)
    sites: list[Site] = attrs.field(factory=list)
    last_type: str = ""  # of the layer that ran last, but for those that keep the units before them
    grad_enabled: bool = True  # the model's own grad mode, while listeners are told
    failure: tuple[BaseException, str] | None = None  # the latest exception, and the innermost call it left
    in_backward: bool = False
    _again: int = 0  # outputs that were captured as in the step before
    _counts: dict[str, int] = attrs.field(factory=dict)
    _edges: set[tuple[int, int]] = attrs.field(factory=set)  # that are captured
    _aliases: list[tuple[str, Tensor, int]] = attrs.field(factory=list)
    _given: Given | None = None  # by the layer that ran last

    def __attrs_post_init__(self) -> None:
        self.known, self.alike = self.model.known, self.asked.ordinary

    def start_backward(self) -> None:
        """Hear that the reverse pass begins: calls that are made in it are made by checkpoints."""
        self.in_backward = True

    def telling(self) -> Aside:
        """Return the context in which listeners are told: without grad mode, and functions are unwatched."""
        self.grad_enabled = torch.is_grad_enabled()
        return Aside()

    # ------------------------------------------------------------------ calls

    def run(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's forward as a call of this step, and return its (probed) output."""
        if transform_level() > self.level:
            return forward(*args, **kwargs)
        if self.in_backward:
            return self._recompute(name, forward, args, kwargs)
        asked, layer = self.asked, name in self.model.layer_names
        if not layer and not asked.structural and not asked.listeners:
            return forward(*args, **kwargs)
        if asked.watched:
            return self._run_closely(name, layer, forward, args, kwargs)
        call = self._entered_again(name, args) if self.alike else None
        call = self._enter(name, layer, args, kwargs) if call is None else call
        try:
            output = forward(*args, **kwargs)
        except BaseException as error:
            self._failed(call, error)
            raise
        self.stack.pop()
        if layer:
            if call.name in asked.rectifiers:
                self._follow(asked.rectifiers[call.name], output)
            if not (self.alike and self._is_captured_again(call, output)):
                output = self._observe(call, output, args)
        if asked.structural:
            call.finish()
        return output

    def _entered_again(self, name: str, args: Any) -> Call | None:
        """Enter a call as long as all went as in an earlier ordinary step, whose records of it are reused.

        None where it is another call than it was then.
        """
        stack, index = self.stack, len(self.calls)
        call = self.known[index] if index < len(self.known) else None
        if call is None or call.module != name or call.parent != (stack[-1] if stack else -1):
            self.alike = False
            for before in self.calls:
                self._counts[before.module] = before.number + 1
            return None
        call.begin_again(args)
        self.calls.append(call)
        stack.append(index)
        return call

    def _run_closely(
        self, name: str, layer: bool, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a call in a step that takes more than the gradients, or whose functions are watched."""
        asked = self.asked
        with unwatched():
            call = self._enter(name, layer, args, kwargs)
            entering, number = self._input_size(call, args, kwargs)
        if asked.listeners:
            with self.telling():
                for listener in asked.listeners:
                    listener.entered(call, args, kwargs)
        try:
            output = forward(*args, **kwargs)
        except BaseException as error:
            self._failed(call, error)
            raise
        with unwatched():
            if entering is not None:
                self.note("input", call.index, entering, number)
            if layer:
                output = self._observe(call, output, args)
        if asked.listeners:
            with self.telling():
                for listener in asked.listeners:
                    listener.left(call, output)
        self.stack.pop()
        if asked.structural:
            call.finish()
        return output

    def _enter(self, name: str, layer: bool, args: Any, kwargs: Any) -> Call:
        number = self.numbered(name)
        parent = self.stack[-1] if self.stack else -1
        call = Call(
            index=len(self.calls),
            name=self._call_name(name, number),
            module=name,
            type=self.model.types[name],
            number=number,
            parent=parent,
            is_layer=layer,
        )
        call.begin(args)
        if self.asked.inputs:
            call.note_inputs((args, kwargs))
        if parent >= 0 and layer:
            for index in self.stack:
                self.calls[index].note_child()
        self.calls.append(call)
        self.stack.append(call.index)
        return call

    def numbered(self, name: str) -> int:
        """Return how often something of this name was met before in the step, and count it."""
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        return number

    def _call_name(self, module: str, number: int) -> str:
        """Return the name of a module's call: `relu`, `relu@1`, …; no two calls of a step have one name."""
        name = f"{module}@{number}"
        if number and name in self.model.modules:  # a module's own name; the dots are in none
            name = f"{module}..@{number}"
        return name if number else module

    def _failed(self, call: Call, error: BaseException) -> None:
        """Leave a call that raised; the first to see an exception is the innermost."""
        self.stack.pop()
        if self.failure is None or self.failure[0] is not error:
            self.failure = (error, call.name)

    def _input_size(self, call: Call, args: Any, kwargs: Any) -> tuple[Tensor | None, int]:
        """Return the magnitude of the first floating-point input, taken before the layer may overwrite it."""
        if self.asked.look and call.is_layer:
            for tensor in iter_tensors((args, kwargs)):
                if is_differentiable(tensor) and tensor.numel() and tensor.layout is torch.strided:
                    here = settled(tensor.detach())
                    if self.asked.structural and self.model.parallel:
                        call.note_entering(split_of_output(self.calls, tensor))
                    return self.entering_size(tensor, here, self._exactly(call, "input")), here.numel()
        return None, 0

    def _recompute(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a call made by activation checkpointing during the backward pass.

        The reentrant kind ran its forward without grad, so the gradient flows through this call alone: it is
        probed as that earlier call. The other kind recomputes only to fill in saved tensors: it is left
        alone.
        """
        output = forward(*args, **kwargs)
        if name not in self.model.layer_names or not torch.is_grad_enabled():
            return output
        waiting = [c for c in self.calls if c.module == name and not c.grad_enabled and not c.sites]
        waiting = [c for c in waiting if c.segment] or waiting
        # Checkpoints are recomputed from the last to the first, but what is in one runs in its old order.
        call = next((c for c in waiting if c.segment == waiting[-1].segment), None)
        if call is None:
            return output
        return map_tensors(functools.partial(self._probe, call), output)

    # ----------------------------------------------------------------- outputs

    def _observe(self, call: Call, output: Any, args: Any) -> Any:
        if call.type not in PASSING:
            self.last_type = call.type
        if isinstance(output, Tensor):
            return self._observe_tensor(call, output, args, {})
        memo: dict[int, Tensor] = {}
        return map_tensors(lambda t: self._observe_tensor(call, t, args, memo), output)

    def _is_captured_again(self, call: Call, y: Any) -> bool:
        """Do what `_observe` does where the only output is captured, as in the step before; else say no."""
        if type(y) is not Tensor or y.shape != call.shape or call.name not in self.asked.captured:
            return False
        number = y.numel()
        if call.split or not number or y.layout is not torch.strided or not self._capture(call, y):
            return False
        call.note_size(number)
        if call.type not in PASSING:
            self.last_type = call.type
        self._again += 1
        return True

    def _observe_tensor(self, call: Call, y: Tensor, args: Any, memo: dict[int, Tensor]) -> Tensor:
        if id(y) in memo:
            return memo[id(y)]
        if not is_differentiable(y) or y.numel() == 0 or y.layout is not torch.strided:
            return y
        call.note_output(y)
        asked, size = self.asked, None
        if asked.structural and self.model.parallel:
            call.note_split(split_of_output(self.calls, y), tuple(local(y).shape))
        if asked.look:
            size = self._forward_statistics(call, settled(y.detach()))
        if call.name in asked.captured and self._capture(call, y):
            memo[id(y)] = y
            return y
        given = [was for a, was in zip(args, call.versions, strict=False) if a is y]
        in_place = bool(given) and given[0] != version(y) and not is_view(y)
        probed = y if call.module in self.model.unprobed else self._probe(call, y, in_place=in_place)
        for listener in asked.listeners:
            listener.probed(y, probed)
        if probed is not y and (is_view(y) or given):
            shared = counter(probed) if self.asked.slots is None else probed  # a transform's wrapper
            self._aliases.append((call.module, shared, version(probed)))
        if size is not None:
            self._given = Given.of(probed, size, exact=self._exactly(call, "out"))
        memo[id(y)] = probed
        return probed

    def _probe(self, call: Call, y: Tensor, *, in_place: bool = False) -> Tensor:
        if not y.requires_grad or not is_differentiable(y) or not torch.is_grad_enabled():
            return y  # without grad mode a probe would cut off what has a graph already
        exact = self.model.exact.get((call.name, "grad"), True)
        slot = self._slot(y, exact)
        used = call.name in self.model.entered and self.asked.slots is None and y.grad_fn is not None
        edge = GradientEdge(y.grad_fn, y.output_nr) if used else None  # type: ignore[arg-type]
        site = Site(call.index, len(call.sites), exact, slot, edge)
        call.sites.append(site)
        self.sites.append(site)
        if in_place:
            return in_place_probe(y, slot, site)
        return eager_probe(y, slot, site) if self.asked.slots is None else probe(y, slot, site)

    def _capture(self, call: Call, y: Tensor) -> bool:
        """Have the gradient of an output handed out by its edge, if the call made it."""
        node = y.grad_fn
        if node is None or node_number(node) < call.start or is_custom(node):
            return False
        position = id(node), y.output_nr
        if position in self._edges:
            return False
        self._edges.add(position)
        exact = self.model.exact.get((call.name, "grad"), True)
        site = Site(call.index, len(call.sites), exact, edge=GradientEdge(node, y.output_nr))
        call.sites.append(site)
        self.sites.append(site)
        return True

    def _slot(self, y: Tensor, exact: bool) -> Tensor:
        position, given = len(self.sites), self.asked.slots
        if given is None:
            return self.model.slot(position, statistics_dtype(y, exact=exact), y.device)
        if position >= len(given):
            raise MoreSlots
        return given[position]

    def _forward_statistics(self, call: Call, y: Tensor) -> Tensor:
        size = magnitude(y, exact=self._exactly(call, "out"))
        self.note("out", call.index, size, y.numel())
        self.note("zeros", call.index, num_zero(y), y.numel())
        axis = unit_axis(y, call.type)
        mean = y.mean([d for d in range(y.dim()) if d != axis % y.dim()]) if y.dim() > 1 else y
        self.note("mean_row", call.index, magnitude(mean, exact=True), mean.numel())
        if self.model.keeps_means and y.dim() > 1:
            self.note("mean", call.index, mean, y.numel() // max(mean.numel(), 1))
        return size

    def _exactly(self, call: Call, kind: str) -> bool:
        """Return whether magnitudes of a kind are taken exactly at a call."""
        return self.model.exact.get((call.name, kind), True)

    def entering_size(self, x: Tensor, here: Tensor, exact: bool) -> Tensor:
        """Return the magnitude of what comes to a layer or function, of which this process holds `here`."""
        known = None if self._given is None else self._given.size_of(x, exact=exact)
        return magnitude(here, exact=exact) if known is None else known

    def _follow(self, key: ActivationKey, output: Any) -> None:
        """Note what a rectifier module gave, in a step without a watch."""
        if isinstance(output, Tensor) and output.requires_grad and output.numel():
            self.note_rectifier(key, settled(output.detach()))

    def note_rectifier(self, key: ActivationKey, y: Tensor) -> None:
        """Note the largest output of every unit of a rectifier, and at looks how many elements fire."""
        axis = unit_axis(y, self.last_type)
        dims = [d for d in range(y.dim()) if d != axis % y.dim()] if y.dim() > 1 else []
        self.note("peak", key, y.amax(dims) if dims else y.clone(), y.numel())
        if self.asked.look:
            self.note("fired", key, num_positive(y), y.numel())

    def note(self, kind: str, key: Any, value: Tensor, number: int) -> None:
        """Keep a number, or a vector of them, that will be read when the step is over."""
        kept = value.detach() if value.requires_grad else value
        self.observations.append(Observation(kind, key, kept, number))

    def renew(self, values: list[Tensor]) -> None:
        """Take the values of the observations as a transform has handed them out."""
        pairs = zip(self.observations, values, strict=True)
        self.observations = [attrs.evolve(observation, value=value) for observation, value in pairs]

    # ---------------------------------------------------------------- questions

    @property
    def repeats(self) -> bool:
        """Whether every call was that of an earlier ordinary step, and its one output was captured again."""
        return self.alike and self._again == len(self.calls) == len(self.known)

    def running(self) -> list[Call]:
        """Return the calls that are running, outermost first, containers included."""
        return [self.calls[index] for index in self.stack]

    def innermost_leaf(self) -> Call | None:
        """Return the layer call that is running, if it has no child modules of its own."""
        if not self.stack:
            return None
        call = self.calls[self.stack[-1]]
        return call if call.is_layer and call.module in self.model.leaves else None

    def check_aliases(self) -> None:
        """Ask for a retry if a probed output that shares its storage with an input was changed in place.

        Then the probe has cut the tie between the two in autograd's books, and gradients would be wrong.
        """
        if not self._aliases:
            return
        changed = {module for module, tensor, written in self._aliases if version(tensor) != written}
        if changed:
            self.model.leave_unprobed(changed)
            raise NeedsRetry("an output that shares its storage with an input was changed in place")
