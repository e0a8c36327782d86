"""What happens in one step: layer calls as they run, probes on their outputs, statistics of the forward pass.

A `Recorder` is the only mutable thing that a run shares with the tapped modules. It is told of every layer
call by the taps (`taps.py`), and of functional operations by the watch (`watch.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from gradflow.functional.model.layers import ancestors
from gradflow.functional.model.trees import is_differentiable, iter_tensors, map_tensors
from gradflow.functional.tap.calls import (
    PASSING,
    Call,
    Observation,
    type_name,
    unit_axis,
    version,
)
from gradflow.functional.tap.probes import (
    Site,
    eager_probe,
    in_place_probe,
    num_nonzero,
    probe,
    statistics_dtype,
    sum_of_squares,
)
from gradflow.functional.torch_private import (
    checkpoint_segment,
    is_view,
    node_number,
    num_writes,
    sequence_number,
    transform_level,
    unwatched,
)


class NeedsRetry(Exception):
    """The step must be run again, for a reason that `Recorder` has noted; never seen by a user."""


@attrs.define(eq=False)
class Recorder:
    """The calls and observations of one step, and what is remembered from step to step.

    Args:
        modules: callable modules by qualified name.
        layer_names: those of them that are layers.
    """

    modules: Mapping[str, nn.Module]
    layer_names: set[str]
    # remembered from step to step
    exact: dict[tuple[str, str], bool] = attrs.field(factory=dict)
    pool: list[Tensor] = attrs.field(factory=list)  # slots, used again in every step
    unprobed: set[str] = attrs.field(factory=set)  # see `check_aliases`
    types: dict[str, str] = attrs.field(factory=dict)
    leaves: set[str] = attrs.field(factory=set)  # modules without callable modules in them
    captured: set[str] = attrs.field(factory=set)  # calls of small outputs: NOTE [Captured gradients]
    hooked: bool = False  # whether there are hooks on tensors, as far as was seen
    num_slots: int = 0  # how many slots a step under `vjp` is given; 0 until it is known
    # of the present step
    active: bool = False
    level: int = 0  # of torch.func transforms that the step itself runs in; see `transform_level`
    structural: bool = False  # containers are looked at as well: in the first step, and in full detail
    ordinary: bool = False  # nothing is taken of the forward pass
    capturing: bool = False  # the like, and nothing of the structure
    known: list[Call] = attrs.field(factory=list)  # the calls of the last ordinary step
    alike: bool = False  # whether all calls were the same so far, in the same order
    edges: set[tuple[int, int]] = attrs.field(factory=set)  # that are captured
    watched: bool = True  # functions are watched, see `watch.py`
    look: bool = False  # the costlier statistics are taken
    calls: list[Call] = attrs.field(factory=list)
    stack: list[int] = attrs.field(factory=list)
    counts: dict[str, int] = attrs.field(factory=dict)
    observations: list[Observation] = attrs.field(factory=list)
    values: list[Tensor] = attrs.field(factory=list)
    sites: list[Site] = attrs.field(factory=list)
    given_slots: list[Tensor] | None = None
    last_type: str = ""
    aliases: list[tuple[str, Tensor, int]] = attrs.field(factory=list)
    rectifiers: dict[str, Any] = attrs.field(factory=dict)  # calls of one alone that is followed -> its key
    after_module: Callable[[Call, Any], None] | None = None  # told of those, where no watch is on
    on_enter: Callable[[Call, Any], None] | None = None
    on_exit: Callable[[Call, Any, Any], None] | None = None
    on_probe: Callable[[Tensor, Tensor], None] | None = None  # told of an output and what stands in for it
    sessions: Sequence[Any] = ()  # those that listen to this step, see `measurement.py`
    in_backward: bool = False
    failure: tuple[BaseException, str] | None = None  # the latest exception, and the innermost call it left

    def __attrs_post_init__(self) -> None:
        parents = {name.rpartition(".")[0] for name in self.modules if name}
        for name in list(parents):
            parents.update(ancestors(name))
        self.leaves = set(self.modules) - parents
        self.types = {name: type_name(module) for name, module in self.modules.items()}

    def forget(self) -> None:
        """Let go of all that the last step left, at the end of a run."""
        self.begin_step(structural=False, look=False)
        self.active, self.pool, self.sessions = False, [], ()
        self.on_enter = self.on_exit = self.on_probe = self.after_module = None

    def begin_step(self, *, structural: bool, look: bool, slots: list[Tensor] | None = None) -> None:
        """Forget the step before, and listen."""
        if self.ordinary and not self.stack:
            self.known = self.calls
        self.active, self.structural, self.look = True, structural, look
        self.in_backward, self.failure = False, None
        self.ordinary = self.capturing = self.alike = False
        self.calls, self.stack, self.counts = [], [], {}
        self.observations, self.values, self.sites, self.aliases = [], [], [], []
        self.given_slots, self.last_type = slots, ""
        self.edges = set()
        self.level = transform_level()

    # ------------------------------------------------------------------ calls

    def run(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a module's forward as a call of this step, and return its (probed) output."""
        if transform_level() > self.level:
            return forward(*args, **kwargs)
        if self.in_backward:
            return self._recompute(name, forward, args, kwargs)
        layer = name in self.layer_names
        if not layer and not self.structural and not self.sessions:
            return forward(*args, **kwargs)
        if self.look or self.watched or self.sessions or self.on_enter is not None:
            return self._run_closely(name, layer, forward, args, kwargs)
        call = self._enter_again(name, layer, args) if self.alike else self._enter(name, layer, args, kwargs)
        try:
            output = forward(*args, **kwargs)
        except BaseException as error:
            self._failed(call, error)
            raise
        self.stack.pop()
        if layer:
            if call.name in self.rectifiers and self.after_module is not None:
                self.after_module(call, output)
            output = self._observe(call, output, args)
        call.end = sequence_number()
        return output

    def _enter_again(self, name: str, layer: bool, args: Any) -> Call:
        """Enter a call as long as all went as in an earlier ordinary step, whose records of it are reused."""
        index, parent = len(self.calls), self.stack[-1] if self.stack else -1
        call = self.known[index] if index < len(self.known) else None
        if call is None or call.module != name or call.parent != parent:
            self.alike = False
            for before in self.calls:
                self.counts[before.module] = before.number + 1
            return self._enter(name, layer, args, {})
        call.sites, call.num_elements, call.start = [], 0, sequence_number()
        if layer:
            call.versions = [version(a) for a in args]
        self.calls.append(call)
        self.stack.append(index)
        return call

    def _run_closely(
        self, name: str, layer: bool, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a call in a step that takes more than the gradients, or whose functions are watched."""
        with unwatched():  # the watch need not see our own operations
            call = self._enter(name, layer, args, kwargs)
            exact = self.exact.get((call.name, "out"), True)
            entering, number = self._input_squares(args, kwargs, exact) if self.look and layer else (None, 0)
            for session in self.sessions:
                with torch.no_grad():
                    session.entered(call, args, kwargs)
        try:
            output = forward(*args, **kwargs)
        except BaseException as error:
            self._failed(call, error)
            raise
        with unwatched():  # the watch need not see our own operations
            if layer:
                if entering is not None:
                    self.note("input", call.index, entering, number)
                output = self._observe(call, output, args)
            for session in self.sessions:
                with torch.no_grad():
                    session.left(call, output)
            self._exit(call, args, output)
        return output

    def _enter(self, name: str, layer: bool, args: Any, kwargs: Any) -> Call:
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        parent = self.stack[-1] if self.stack else -1
        call = Call(
            index=len(self.calls),
            name=self._call_name(name, number),
            module=name,
            type=self.types[name],
            number=number,
            parent=parent,
            is_layer=layer,
        )
        call.grad_enabled = torch.is_grad_enabled()
        call.segment = 0 if call.grad_enabled else checkpoint_segment()
        if layer:
            call.versions = [version(a) for a in args]
        call.start = sequence_number()
        if self.structural and self.on_enter is not None:  # the first step
            call.differentiable = any(t.requires_grad for t in iter_tensors((args, kwargs)))
            self.on_enter(call, (args, kwargs))
        if parent >= 0 and layer:
            for index in self.stack:
                self.calls[index].has_children = True
        self.calls.append(call)
        self.stack.append(call.index)
        return call

    def _call_name(self, module: str, number: int) -> str:
        """Return the name of a module's call: `relu`, `relu@1`, …; no two calls of a step have one name."""
        name = f"{module}@{number}"
        if number and name in self.modules:  # a module's own name; the dots are in none
            name = f"{module}..@{number}"
        return name if number else module

    def _failed(self, call: Call, error: BaseException) -> None:
        """Leave a call that raised; the first to see an exception is the innermost."""
        self.stack.pop()
        if self.failure is None or self.failure[0] is not error:
            self.failure = (error, call.name)

    def _exit(self, call: Call, args: Any, output: Any) -> None:
        self.stack.pop()
        if self.structural:
            call.end = sequence_number()
            if self.on_exit is not None:
                self.on_exit(call, args, output)

    def _input_squares(self, args: Any, kwargs: Any, exact: bool) -> tuple[Tensor | None, int]:
        """Return Σx² of the first floating-point input, taken before the layer may overwrite it."""
        for tensor in iter_tensors((args, kwargs)):
            if is_differentiable(tensor) and tensor.numel() and tensor.layout is torch.strided:
                return sum_of_squares(tensor.detach(), exact=exact), tensor.numel()
        return None, 0

    def _recompute(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Handle a call made by activation checkpointing during the backward pass.

        The reentrant kind ran its forward without grad, so the gradient flows through this call alone: it is
        probed as that earlier call. The other kind recomputes only to fill in saved tensors: it is left
        alone.
        """
        output = forward(*args, **kwargs)
        if name not in self.layer_names or not torch.is_grad_enabled():
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

    def _observe_tensor(self, call: Call, y: Tensor, args: Any, memo: dict[int, Tensor]) -> Tensor:
        if id(y) in memo:
            return memo[id(y)]
        if not is_differentiable(y) or y.numel() == 0 or y.layout is not torch.strided:
            return y
        if not call.shape:
            call.shape = tuple(y.shape)
        call.num_elements += y.numel()
        if self.look:
            self._forward_statistics(call, y.detach())
        if self.capturing and call.name in self.captured and self._capture(call, y):
            memo[id(y)] = y
            return y
        given = [was for a, was in zip(args, call.versions, strict=False) if a is y]
        in_place = bool(given) and given[0] != version(y) and not is_view(y)
        probed = y if call.module in self.unprobed else self._probe(call, y, in_place=in_place)
        if self.on_probe is not None:
            self.on_probe(y, probed)
        if probed is not y and (is_view(y) or given):
            self.aliases.append((call.module, self._counter(probed), num_writes(probed)))
        memo[id(y)] = probed
        return probed

    def _counter(self, y: Tensor) -> Tensor:
        """Return an empty tensor that shares the count of writes with `y`, and does not keep its memory."""
        if self.given_slots is not None:
            return y  # a transform's wrapper, whose data cannot be changed
        counter = y.detach()
        counter.data = counter.new_empty(0)
        return counter

    def _probe(self, call: Call, y: Tensor, *, in_place: bool = False) -> Tensor:
        if not y.requires_grad or not is_differentiable(y) or not torch.is_grad_enabled():
            return y  # without grad mode a probe would cut off what has a graph already
        exact = self.exact.get((call.name, "grad"), True)
        slot = self._slot(y, exact)
        site = Site(call.index, len(call.sites), exact, slot)
        call.sites.append(site)
        self.sites.append(site)
        if in_place:
            return in_place_probe(y, slot, site)
        return eager_probe(y, slot, site) if self.given_slots is None else probe(y, slot, site)

    def _capture(self, call: Call, y: Tensor) -> bool:
        """Have the gradient of an output handed out by its edge, if the call made it."""
        node = y.grad_fn
        if node is None or node_number(node) < call.start:
            return False
        position = id(node), y.output_nr
        if position in self.edges:
            return False
        self.edges.add(position)
        exact = self.exact.get((call.name, "grad"), True)
        site = Site(call.index, len(call.sites), exact, edge=GradientEdge(node, y.output_nr))
        call.sites.append(site)
        self.sites.append(site)
        return True

    def _slot(self, y: Tensor, exact: bool) -> Tensor:
        position = len(self.sites)
        if self.given_slots is not None:
            if position >= len(self.given_slots):
                raise NeedsRetry("more layer calls than slots")
            return self.given_slots[position]
        dtype = statistics_dtype(y, exact=exact)
        if position < len(self.pool):
            slot = self.pool[position]
            if slot.dtype == dtype and slot.device == y.device:
                return slot
        slot = torch.zeros((), dtype=dtype, device=y.device, requires_grad=True)
        self.pool[position : position + 1] = [slot]
        return slot

    def _forward_statistics(self, call: Call, y: Tensor) -> None:
        exact = self.exact.get((call.name, "out"), True)
        self.note("out", call.index, sum_of_squares(y, exact=exact), y.numel())
        self.note("zeros", call.index, y.numel() - num_nonzero(y), y.numel())
        axis = unit_axis(y, call.type)
        rows = y.numel() // max(y.shape[axis], 1) if y.dim() else 1
        mean = y.mean([d for d in range(y.dim()) if d != axis % y.dim()]) if y.dim() > 1 else y
        self.note("mean_row", call.index, sum_of_squares(mean, exact=True) * rows, y.numel())

    def note(self, kind: str, key: Any, value: Tensor, number: int) -> None:
        """Keep a number, or a vector of them, that will be read when the step is over."""
        self.observations.append(Observation(kind, key, number))
        self.values.append(value.detach())

    # ---------------------------------------------------------------- questions

    def innermost_leaf(self) -> Call | None:
        """Return the layer call that is running, if it has no child modules of its own."""
        if not self.stack:
            return None
        call = self.calls[self.stack[-1]]
        return call if call.is_layer and call.module in self.leaves else None

    def check_aliases(self) -> None:
        """Ask for a retry if a probed output that shares its storage with an input was changed in place.

        Then the probe has cut the tie between the two in autograd's books, and gradients would be wrong.
        """
        changed = {module for module, tensor, version in self.aliases if num_writes(tensor) != version}
        if changed:
            self.unprobed |= changed
            raise NeedsRetry("an output that shares its storage with an input was changed in place")
