"""Which modules are the policy's heads and which the value's, by name, by use, or by shape.

NOTE [How heads are found]
A head is what the user names. Otherwise it is looked for in the first measured step, among the last layers:
those with parameters of their own whose output no other such layer takes. A last layer belongs to the policy
if a distribution or a softmax is made of its output, and else if its name, or its name in the model's output,
says so (`actor`, `pi`, `logits`, ...). Names also settle what shapes cannot: a softmax over the atoms of a
`critic` is no policy, and the actor of a critic that takes actions is a head although it is not last. The
value is the last layer of such a name, or one that gives a single number per sample. What was found, and why,
is told in the record's `assumptions`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import ModelInputError, UnknownLayerError
from gradflow.functional.model.layers import owns_parameters
from gradflow.functional.model.trees import named_tensors
from gradflow.functional.policy.seen import Seer, tensors_in
from gradflow.functional.processes.shards import local
from gradflow.functional.tap.calls import Call
from gradflow.functional.tap.nodes import below, nodes_under
from gradflow.functional.tap.probes import is_probe
from gradflow.functional.tap.recorder import Recorder

_WORDS = {
    "policy": "policy policies actor pi action actions logits logit mu mean std logstd sigma dist",
    "value": "value values critic vf v qf q baseline",
}
_KIND = {word: kind for kind, words in _WORDS.items() for word in words.split()}


_NO_POLICY = (
    "No policy head was found: no distribution and no softmax is made of the output of a last layer, and "
    "none is called like a policy. Name it: policy_head_name=..."
)
_NO_VALUE = (
    "No value head was found: no last layer besides the policy's gives one number per sample, or is called "
    "like a value. If there is one, name it: value_head_name=..."
)


@attrs.frozen
class Heads:
    """The heads of a model, by qualified names of modules, and how each was found."""

    policy: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()


def check_names(names: str | Sequence[str] | None, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the names that a user gave as a tuple.

    Raises:
        UnknownLayerError: if there is no callable module of that name; the message lists the nearest names.
        ModelInputError: if they are no names.
    """
    found = (names,) if isinstance(names, str) else tuple(names or ())
    for name in found:
        if not isinstance(name, str):
            raise ModelInputError(
                f"a head or backbone was given as a {type(name).__name__}, not by name. Pass the module's "
                "qualified name, as `model.named_modules()` tells it: `policy_head_name='action_net'`."
            )
        if name not in modules:
            raise UnknownLayerError.at(name, [known for known in modules if known])
    return found


def kind_of_name(name: str) -> str:
    """Return `policy` or `value` if a qualified name says so, else nothing; the last part that tells counts.

    >>> kind_of_name("actor_critic.value_net.2"), kind_of_name("critic.qf0.4"), kind_of_name("fc2")
    ('value', 'value', '')
    """
    for part in reversed(name.split(".")):
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)
        kinds = {_KIND[w.lower()] for w in words if w.lower() in _KIND}
        if len(kinds) == 1:
            return kinds.pop()
    return ""


def is_other(name: str) -> bool:
    """Whether a module is by its name a value's, or a target network.

    >>> is_other("critic"), is_other("actor_target"), is_other("actor")
    (True, True, False)
    """
    return kind_of_name(name) == "value" or "target" in name.lower()


LARGE = 2**18  # bytes of an output from which on few are kept, where it is not known yet that heads are there
_FEW = 2


@attrs.frozen(eq=False)
class Gone:
    """What is known of a large output that was let go: all but its values."""

    grad_fn: Any
    requires_grad: bool
    shape: tuple[int, ...]

    def dim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)


@attrs.define(eq=False)
class Scene:
    """The module calls of one step with their outputs, and who feeds whom.

    Args:
        recorder: of the step.
        sparing: whether outputs that are large are let go, but for the last few of layers, and those that
            are called like a head.
        outputs: the floating-point tensors that each call handed to its caller, by the call's index; `Gone`
            in the place of those that were let go.
        named: the tensors of the outermost calls' outputs, by their names in them.
    """

    recorder: Recorder
    sparing: bool = False
    outputs: dict[int, list[Any]] = attrs.field(factory=dict)
    named: list[tuple[str, Tensor]] = attrs.field(factory=list)
    _storages: dict[int, int] = attrs.field(factory=dict)
    _large: list[int] = attrs.field(factory=list)  # calls with large outputs that are kept for the moment

    def add(self, call: Call, output: object) -> None:
        """Note what a call gave."""
        tensors = tensors_in(output)
        self.outputs[call.index] = tensors
        if self.is_source(call):
            for tensor in (t for t in tensors if t.layout is torch.strided):
                self._storages.setdefault(local(tensor).untyped_storage().data_ptr(), call.index)
        if self.sparing and any(t.numel() * t.element_size() > LARGE for t in tensors):
            self._spare(call)
        if call.parent < 0:
            found = list(named_tensors(output))
            self.named += found or [("", t) for t in tensors]

    def _spare(self, call: Call) -> None:
        """Let the large outputs of a call go, or, if it is a layer's, those of one before the last few."""
        if kind_of_name(call.module):
            return
        gone = call.index
        if self.is_source(call):
            self._large.append(gone)
            if len(self._large) <= _FEW:
                return
            gone = self._large.pop(0)
        outputs, self.outputs[gone] = self.outputs[gone], []
        for tensor in outputs:
            if tensor.layout is torch.strided:
                address = (
                    local(tensor).untyped_storage().data_ptr()
                )  # which another tensor may have from now on
                if self._storages.get(address) == gone:
                    del self._storages[address]
            self.outputs[gone].append(Gone(tensor.grad_fn, tensor.requires_grad, tensor.shape))

    def is_source(self, call: Call) -> bool:
        """Whether a call is of a layer with parameters of its own in which no other layer was called."""
        module = self.recorder.model.modules[call.module]
        return call.is_layer and not call.has_children and owns_parameters(module)

    def sources(self, tensors: Iterable[Tensor]) -> tuple[set[int], list[Tensor]]:
        """Return the nearest calls whose outputs feed tensors, and the leaves that do so past them.

        By autograd's graph; a tensor that has none is known by its storage, such as `logits.detach()`.
        """
        calls: set[int] = set()
        leaves: list[Tensor] = []
        todo = []
        for tensor in tensors:
            if tensor.grad_fn is not None:
                todo.append(tensor.grad_fn)
            elif tensor.requires_grad:
                leaves.append(tensor)
            elif tensor.layout is torch.strided:
                calls |= {self._storages.get(local(tensor).untyped_storage().data_ptr(), -1)} - {-1}
        for node in nodes_under(todo, self._is_of_source):
            if self._is_of_source(node):
                calls.add(node.site.call)
            elif hasattr(node, "variable"):
                leaves.append(node.variable)
        return calls, leaves

    def _is_of_source(self, node: Any) -> bool:
        return is_probe(node) and self.is_source(self.recorder.calls[node.site.call])

    def descends(self, tensors: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
        """Whether tensors are computed from others, by autograd's graph."""
        wanted = {t.grad_fn for t in outputs if t.grad_fn is not None}
        todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
        return any(node in wanted for node in nodes_under(todo))

    def ends(self, takers: Callable[[Call], bool] = lambda call: True) -> list[Call]:
        """Return the calls of layers with parameters whose outputs no other such layer takes.

        Those without a graph, of a target network for instance, are left out: who takes them is not known.

        Args:
            takers: which calls count as taking an output.
        """
        taken: set[int] = set()
        calls = [
            c
            for c in self.recorder.calls
            if self.is_source(c) and any(t.requires_grad for t in self.outputs.get(c.index, ()))
        ]
        for call in filter(takers, calls):
            below = nodes_under(
                [n for t in self.outputs[call.index] for n in children(t)], self._is_of_source
            )
            taken |= {node.site.call for node in below if self._is_of_source(node)}
        return [c for c in calls if c.index not in taken]

    def calls_of(self, names: Iterable[str]) -> list[Call]:
        """Return the calls of modules by name, in the order in which they ended."""
        wanted = set(names)
        return [self.recorder.calls[i] for i in self.outputs if self.recorder.calls[i].module in wanted]

    def lacks(self, names: Iterable[str]) -> bool:
        """Whether an output of modules was let go."""
        return any(isinstance(t, Gone) for call in self.calls_of(names) for t in self.outputs[call.index])

    def within(self, calls: Iterable[int], names: Iterable[str]) -> tuple[str, ...]:
        """Return the modules of calls that are one of `names` or a part of one, in order, each once."""
        found = [self.recorder.calls[i].module for i in sorted(calls)]
        return tuple(dict.fromkeys(m for m in found if any(inside(m, name) for name in names)))


def children(tensor: Tensor) -> list[Any]:
    """Return the autograd nodes that a tensor's own takes."""
    return [] if tensor.grad_fn is None else below(tensor.grad_fn)


def inside(module: str, name: str) -> bool:
    """Whether a module is one of that name, or a part of it."""
    return not name or module == name or module.startswith(f"{name}.")


def find_heads(
    scene: Scene, seer: Seer, loss: Tensor, *, policy: Sequence[str], value: Sequence[str]
) -> Heads:
    """Return the heads; see NOTE [How heads are found].

    Args:
        scene: the step.
        seer: what was done with tensors in it.
        loss: the loss, with its graph.
        policy: names of the policy's heads that the user gave.
        value: names of the value's heads that the user gave.
    """
    keys = _names_in_outputs(scene)
    kinds = {
        call.index: next(filter(None, map(kind_of_name, [call.module, *keys.get(call.index, [])])), "")
        for call in scene.recorder.calls
    }
    said: list[str] = []
    if not policy:
        policy, why = _find_policy(scene, seer, kinds, value)
        said.append(f"Policy heads, by default: {listed(policy)}, since {why}." if policy else _NO_POLICY)
    if not value:
        value, why = _find_value(scene, kinds, policy, loss)
        said.append(f"Value heads, by default: {listed(value)}, since {why}." if value else _NO_VALUE)
    return Heads(tuple(policy), tuple(value), tuple(said))


def _find_policy(
    scene: Scene, seer: Seer, kinds: Mapping[int, str], value: Sequence[str]
) -> tuple[tuple[str, ...], str]:
    def free(calls: Iterable[int]) -> set[int]:
        taken = scene.within(calls, value)
        return {i for i in calls if scene.recorder.calls[i].module not in taken}

    # The actor of a critic that takes actions is not last, but is before no other layer than the critic's.
    last = {call.index for call in scene.ends(lambda call: kinds[call.index] != "value")}
    made = free({i for seen in seer.seen for i in scene.sources(seen.tensors())[0]})
    chosen = {i for i in made if kinds[i] == "policy"} or {
        i for i in made if kinds[i] != "value" and (i in last or not made & last)
    }
    if chosen:
        return _modules(scene, chosen), "a distribution is made of their outputs"
    used = free({i for use in seer.uses if use.tells for i in scene.sources([use.tensor])[0]})
    chosen = {i for i in used if kinds[i] == "policy"} or {i for i in used & last if kinds[i] != "value"}
    if chosen:
        return _modules(scene, chosen), "a softmax or its like is made of their outputs"
    chosen = {i for i in free(last) if kinds[i] == "policy"}
    return _modules(scene, chosen), "they are last layers of such a name"


def _find_value(
    scene: Scene, kinds: Mapping[int, str], policy: Sequence[str], loss: Tensor
) -> tuple[tuple[str, ...], str]:
    free = [c for c in scene.ends() if not scene.within([c.index], policy)]
    chosen = {c.index for c in free if kinds[c.index] == "value"}
    if chosen:
        return _modules(scene, chosen), "they are last layers of such a name"
    read = scene.sources([loss])[0]
    chosen = {
        c.index
        for c in free
        if c.index in read
        and kinds[c.index] != "policy"
        and all(t.dim() and t.shape[-1] == 1 for t in scene.outputs[c.index])
    }
    return _modules(scene, chosen), "they are last layers that give one number per sample"


def _names_in_outputs(scene: Scene) -> dict[int, list[str]]:
    """Return, by the index of a call, the names that the model's output has for what it is made of."""
    found: dict[int, list[str]] = {}
    for name, tensor in scene.named:
        if name:
            for index in scene.sources([tensor])[0]:
                found.setdefault(index, []).append(name)
    return found


def _modules(scene: Scene, calls: Iterable[int]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(scene.recorder.calls[i].module for i in sorted(calls)))


def listed(names: Sequence[str]) -> str:
    """Return names of modules as one text; the model itself, whose name is empty, is `(model)`."""
    return ", ".join(name or "(model)" for name in names)
