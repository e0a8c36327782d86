"""A model whose calls are led past a recorder, and what is known of it from step to step."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.layers import ancestors, callable_modules, is_layer
from gradflow.functional.model.threads import OneThread
from gradflow.functional.tap.calls import Call, type_name
from gradflow.functional.torch_private import has_gradient_hooks, stores
from gradflow.functional.torch_sharded import is_parallel, is_sharded

if TYPE_CHECKING:
    from gradflow.functional.tap.recorder import Recorder


Likeness = tuple[type[nn.Module], tuple[tuple[str, tuple[int, ...]], ...]]


def likeness(module: nn.Module) -> Likeness:
    """Return what a module has in common with its copies: its class, and its parameters' names and shapes."""
    return type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


@attrs.define(eq=False)
class TappedModel:
    """The modules of a model under taps, for as long as it is measured.

    Args:
        modules: callable modules by qualified name.
        layer_names: those of them that are layers.
    """

    modules: Mapping[str, nn.Module]
    layer_names: set[str]
    thread: OneThread = attrs.field(factory=OneThread)  # the one that runs the steps
    types: dict[str, str] = attrs.field(init=False)
    parallel: set[str] = attrs.field(init=False)  # modules whose hooks make DTensors of what they take
    exchanges: bool = attrs.field(init=False)  # whether modules exchange tensors with other processes
    leaves: set[str] = attrs.field(init=False)  # modules without callable modules in them
    exact: dict[tuple[str, str], bool] = attrs.field(factory=dict)  # by call, and kind of sum
    unprobed: set[str] = attrs.field(factory=set)  # modules; see `Recorder.check_aliases`
    entered: set[str] = attrs.field(factory=set)  # calls whose outputs are used past their probes
    whole: set[str] = attrs.field(factory=set)  # calls of which the gradients are kept whole
    whole_nodes: Collection[str] | None = None  # of the graph, the same; None on one process
    keeps_means: bool = False  # whether means over samples and positions are kept as vectors
    hooked: bool = False  # whether there are hooks on tensors, as far as was seen
    known: list[Call] = attrs.field(factory=list)  # the calls of the last ordinary step
    recorder: Recorder | None = None  # of the step that is running
    _strangers: set[Likeness] = attrs.field(factory=set)  # of modules that ran and are not the model's
    _pool: list[Tensor] = attrs.field(factory=list)  # slots, used again in every step

    def __attrs_post_init__(self) -> None:
        parents = {name.rpartition(".")[0] for name in self.modules if name}
        for name in list(parents):
            parents.update(ancestors(name))
        self.leaves = set(self.modules) - parents
        self.parallel = {name for name, module in self.modules.items() if is_parallel(module)}
        gathered = any(map(is_sharded, self.modules.values()))
        self.exchanges = bool(self.parallel) or gathered
        self.types = {name: type_name(module) for name, module in self.modules.items()}

    @classmethod
    def of(cls, model: nn.Module, beside: Mapping[str, nn.Module] = MappingProxyType({})) -> TappedModel:
        """Return the callable modules of a model, and which of them are layers.

        Args:
            model: the model.
            beside: modules that are called in its steps and are no part of it, by a name for each.
        """
        modules = {**beside, **callable_modules(model)}
        return cls(modules, {name for name, module in modules.items() if is_layer(module)})

    @contextlib.contextmanager
    def heard_by(self, recorder: Recorder) -> Iterator[None]:
        """Have a recorder told of every call, for the length of the context."""
        self.recorder = recorder
        try:
            yield
        finally:
            self.recorder = None
            if recorder.asked.ordinary and not recorder.stack:
                self.known = recorder.calls

    def forget(self) -> None:
        """Let go of all that the steps have left, at the end of a run."""
        self.recorder, self.known, self._pool = None, [], []

    def promote(self, names: Iterable[str]) -> None:
        """Take some more modules for layers."""
        self.layer_names.update(names)

    def leave_unprobed(self, names: Iterable[str]) -> None:
        """Put no probes on the outputs of some modules from now on."""
        self.unprobed.update(names)

    def gather_whole(self, calls: Iterable[str]) -> None:
        """Take the whole gradient of some calls' outputs from now on, as they are used past their probes."""
        self.entered.update(calls)

    def keep_whole(self, calls: Iterable[str], nodes: Collection[str]) -> None:
        """Keep the whole gradients of some calls' outputs, and of some nodes of the graph, from now on."""
        self.whole.update(calls)
        self.whole_nodes = nodes
        self.entered.update(calls)

    def keep_means(self) -> None:
        """Keep means over samples and positions as vectors from now on."""
        self.keeps_means, self.whole_nodes = True, ()

    def look_for_hooks(self) -> None:
        """See whether modules or parameters have hooks that act on gradients."""
        self.hooked = any(
            has_gradient_hooks(owner)
            for module in self.modules.values()
            for owner in (module, *stores(module)[0].values())
            if owner is not None
        )

    def saw_hook(self) -> None:
        """Hear that a hook is put on a tensor."""
        self.hooked = True

    def saw_stranger(self, module: nn.Module) -> None:
        """Hear that a module ran in a step that is no part of the model."""
        first = self.recorder is not None and self.recorder.asked.structural
        if first and not any(module is own for own in self.modules.values()):
            self._strangers.add(likeness(module))

    def copied(self) -> set[str]:
        """Return the names of the modules with parameters of which a like one ran that is not the model's."""
        alike = {name: likeness(module) for name, module in self.modules.items()} if self._strangers else {}
        return {name for name, own in alike.items() if own[1] and own in self._strangers}

    def sum_exactly(self) -> None:
        """Measure every magnitude exactly in the next step, until precisions are chosen anew."""
        self.exact.clear()

    def set_exact(self, call: str, kind: str, exact: bool) -> None:
        """Choose how a magnitude is measured from now on; see NOTE [Exact and fast] in sums.py."""
        self.exact[call, kind] = exact

    def slot(self, position: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the slot of the probe at a position in a step, that of an earlier step if it fits."""
        if position < len(self._pool):
            slot = self._pool[position]
            if slot.dtype == dtype and slot.device == device:
                return slot
        slot = torch.zeros((), dtype=dtype, device=device, requires_grad=True)
        self._pool[position : position + 1] = [slot]
        return slot
