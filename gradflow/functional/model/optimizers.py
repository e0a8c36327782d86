"""A copy of the user's optimizer that steps the working copies of the parameters."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import inspect
import math
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from gradflow.errors import OptimizerMismatchError
from gradflow.functional.model.closures import is_plain, plain_copy, reachable
from gradflow.functional.model.undo import may_hold_state, python_module, same_bits, slot_values
from gradflow.functional.torch_private import step_hooks


def copy_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, parameters: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """Return a copy of `optimizer`, its state included, that holds the working copies.

    Args:
        optimizer: any optimizer on the model's parameters; it is left as it was.
        model: the model, whose parameters the optimizer holds.
        parameters: working copies by qualified name.

    Raises:
        OptimizerMismatchError: if it is no optimizer, or holds none of the model's parameters.
    """
    (copied,), _ = copy_training([optimizer], None, model, parameters)
    return copied


def copy_training(
    optimizers: Sequence[Any], others: Any, model: nn.Module, parameters: Mapping[str, Tensor]
) -> tuple[list[Any], Any]:
    """Return copies of optimizers that hold the working copies, and of what holds those optimizers.

    Args:
        optimizers: on the model's parameters; they are left as they were.
        others: what refers to them: schedulers, a scaler.
        model: the model, whose parameters they hold.
        parameters: working copies by qualified name.

    Raises:
        OptimizerMismatchError: if one is no optimizer, or holds none of the model's parameters; or if one of
            `others` cannot be copied.
    """
    memo: dict[int, Any] = {id(p): parameters[name] for name, p in model.named_parameters()}
    for optimizer in optimizers:
        _check_holds_some(optimizer, memo)
    copies = [_copied(optimizer, memo) for optimizer in optimizers]
    try:
        return copies, copy.deepcopy(others, memo)
    except Exception as error:
        raise OptimizerMismatchError(
            f"a scheduler or scaler cannot be copied ({type(error).__name__}: {error}), and the run must not "
            "move the one given. Leave it out; then the rates stay as they are."
        ) from error


def check_optimizers(optimizers: Iterable[Any], model: nn.Module) -> None:
    """Check that each is an optimizer on some of the model's parameters.

    Raises:
        OptimizerMismatchError: if one is not.
    """
    known = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        _check_holds_some(optimizer, known)


def _check_holds_some(optimizer: Any, known: Mapping[int, Any]) -> None:
    if not isinstance(getattr(optimizer, "param_groups", None), list):
        raise OptimizerMismatchError(
            f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer. "
            "Pass the optimizer itself: `optimizer=torch.optim.Adam(model.parameters())`."
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in known for p in held):
        raise OptimizerMismatchError(
            f"none of the optimizer's {len(held)} parameters belongs to the model. It may have been built "
            "for another model, or before the model was replaced (a deep copy, say). "
            "Build it on this one: `torch.optim.Adam(model.parameters())`."
        )


# NOTE [Copying an optimizer]
# `copy.deepcopy` of an optimizer ends in `Optimizer.__setstate__`, which puts a wrapper on the `step` of its
# class: an optimizer that wraps another and never called `Optimizer.__init__` could not step any more. So a
# copy is made by hand: an empty object of the class, and deep copies of the attributes. Left out is what
# stands in the object in place of a method: a scheduler puts a `step` there that steps the original. What
# cannot be copied (a lock, a stream) is shared. Of hooks on its step, a copy has copies where all of them can
# touch nothing but the optimizer that they are handed, its parameters, numbers of their own and schedulers of
# PyTorch on that optimizer, as one that sets the rate; else it has none, since they may act on the model.


_ATOMS = (type, str, bytes, int, float, complex, type(None), types.FunctionType, types.BuiltinFunctionType)


def _copied(optimizer: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an optimizer and of those that it wraps; see NOTE [Copying an optimizer]."""
    found: list[Any] = []
    _prepare(optimizer, memo, found, set())
    shells = [(original, object.__new__(type(original))) for original in found]
    memo.update((id(original), shell) for original, shell in shells)
    for original, shell in shells:
        for name, value in vars(original).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                hooks = value.items() if "_step_" in name and runs_hooks(original) else ()
                for function in _functions_of(rule for _, hook in hooks for rule in _rules(hook)):
                    plain_copy(function, memo)  # `deepcopy` takes a function as it is
                copied = type(value)((key, plain_copy(hook, memo)) for key, hook in hooks)
                object.__setattr__(shell, name, copied)
            elif not (callable(value) and hasattr(type(original), name)):
                vars(shell)[name] = copy.deepcopy(value, memo)
        for slot, value in slot_values(original):
            slot.__set__(shell, copy.deepcopy(value, memo))
    return memo[id(optimizer)]


def runs_hooks(optimizer: Any) -> bool:
    """Whether copies of an optimizer run the hooks on its step; see NOTE [Copying an optimizer]."""
    hooks = step_hooks(optimizer)
    if not hooks:
        return True
    known = {id(optimizer), *(id(p) for group in optimizer.param_groups for p in group["params"])}
    rules = [rule for hook in hooks for rule in _rules(hook)]
    if any(rule.optimizer is not optimizer for rule in rules):
        return False
    known.update(map(id, rules))
    states = [v for rule in rules for n, v in vars(rule).items() if n not in ("optimizer", "_schedulers")]
    functions = _functions_of(rules)
    plain = all(is_plain(function, known) for function in functions)
    known.update(map(id, functions))
    return plain and all(is_plain(value, known) for value in (*states, *hooks))


def is_left_alone(optimizer: Any) -> bool:
    """Whether a scheduler has set all rates of an optimizer to zero, and none is left that could raise them.

    Whatever has a `step` and holds the optimizer may: a scheduler of PyTorch, of another library, of the
    user's own. A schedule that nobody keeps, as it was made by a function that returned the optimizer alone,
    stands where it began.
    """
    groups = optimizer.param_groups
    built = any(number_of(group, "initial_lr") > 0 for group in groups)
    if not built or any(number_of(group, "lr") != 0 for group in groups):
        return False
    held = [optimizer, *(v for v in vars(optimizer).values() if hasattr(v, "param_groups"))]
    return not any(_steps_along(one, object) for one in held)


def has_scheduler(optimizer: Any) -> bool:
    """Whether a scheduler of PyTorch holds an optimizer."""
    return _steps_along(optimizer, LRScheduler)


def number_of(group: Mapping[str, Any], name: str) -> float:
    """Return a number that a parameter group holds; NaN where it holds none of that name."""
    value = group.get(name)
    return float(value) if isinstance(value, (int, float, Tensor)) else math.nan


def _steps_along(optimizer: Any, kind: type, depth: int = 4) -> bool:
    """Whether something of a kind that is no optimizer, and has a `step`, holds one, by itself or in lists
    and dicts. What watches it for gradflow does not count."""
    todo, seen = [optimizer], {id(optimizer)}
    for _ in range(depth):
        holders = [h for h in gc.get_referrers(*todo) if id(h) not in seen and h is not todo] if todo else []
        seen.update(map(id, holders))
        for holder in (h for h in holders if isinstance(h, kind)):
            own = python_module(type(holder)).partition(".")[0] == "gradflow"
            if callable(getattr(type(holder), "step", None)) and not (own or hasattr(holder, "param_groups")):
                return True
        todo = [h for h in holders if isinstance(h, (dict, list, tuple, types.CellType))]
    return False


def _rules(hook: Any) -> list[Any]:
    """Return the schedulers of PyTorch that a hook holds, and those in them; none of a user's class."""
    found = [value for value in reachable([hook]) if _is_rule(value)]
    for rule in found:  # grows while it is walked
        found += [inner for inner in getattr(rule, "_schedulers", ()) if _is_rule(inner)]
    return found


def _is_rule(value: Any) -> bool:
    kind = type(value)
    return issubclass(kind, LRScheduler) and python_module(kind) == LRScheduler.__module__


def _functions_of(rules: Iterable[Any]) -> list[Any]:
    """Return the functions of the user's that schedulers ask for their rates, those in lists included."""
    held = (value for rule in rules for value in vars(rule).values())
    several = (v if isinstance(v, (list, tuple)) else (v,) for v in held)
    return [f for values in several for f in values if isinstance(f, types.FunctionType)]


def _prepare(value: Any, memo: dict[int, Any], found: list[Any], seen: set[int]) -> None:
    """Find the optimizers in a value, and enter in the memo what `deepcopy` cannot copy."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or id(value) in memo or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            waiting += list(value)
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif _is_optimizer(value) or (
            (hasattr(value, "__dict__") or slot_values(value)) and may_hold_state(value)
        ):
            if _is_optimizer(value):
                found.append(value)
            waiting += [*getattr(value, "__dict__", {}).values(), *(v for _, v in slot_values(value))]
        else:
            memo[id(value)] = _copied_or_shared(value)


def _is_optimizer(value: Any) -> bool:
    return hasattr(value, "param_groups") and callable(getattr(value, "step", None))


def _copied_or_shared(value: Any) -> Any:
    try:
        return value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)
    except Exception:
        return value


def optimized(optimizers: Iterable[torch.optim.Optimizer], model: nn.Module) -> set[str]:
    """Return the qualified names of the model's parameters that optimizers step."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


def learning_rates(optimizers: Iterable[torch.optim.Optimizer]) -> tuple[float, ...]:
    """Return the learning rate of every parameter group."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return tuple(float(group["lr"]) for group in groups if "lr" in group)


def clip_gradients(
    gradients: Iterable[Tensor | None], max_norm: float, added: Callable[[float], float] | None = None
) -> Tensor | None:
    """Scale gradients, in place, so that their norm over all of them is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` does: by max_norm / (norm + 1e-6), where that is below 1.

    Args:
        gradients: they themselves; None where there is none.
        max_norm: of all of them.
        added: sums the squared norm over processes that hold others; None where there are none.

    Returns:
        What they were multiplied by, of shape (); None where there are none.
    """
    known = [gradient.detach() for gradient in gradients if gradient is not None]
    if not known and added is None:
        return None
    total = torch.nn.utils.get_total_norm(known)
    if added is not None:
        whole = float(total.full_tensor() if hasattr(total, "full_tensor") else total)  # type: ignore[operator]
        total = torch.tensor(added(whole**2) ** 0.5, dtype=torch.float64)
    share = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in known:
        gradient.mul_(share.to(gradient.device, gradient.dtype) if added else share.to(gradient.device))
    return share


def asks_again(optimizer: Any) -> bool:
    """Whether an optimizer cannot step without a closure that evaluates the loss anew."""
    takes = inspect.signature(optimizer.step).parameters.get("closure")
    return takes is not None and takes.default is takes.empty


def is_handed_closure(optimizer: Any) -> bool:
    """Whether an optimizer's step is handed a closure that evaluates the loss anew.

    An optional one is passed to classes of the user's, since some fail without it after all; those of PyTorch
    do the same without it.
    """
    takes = inspect.signature(optimizer.step).parameters.get("closure")
    return takes is not None and (_is_the_users(optimizer) or takes.default is takes.empty)


def _is_the_users(optimizer: Any) -> bool:
    return not python_module(type(optimizer)).startswith("torch.optim")


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    again: Callable[[], Any],
    loss: Tensor,
    *,
    handed: bool | None = None,
) -> None:
    """Step the working copies with the gradients of the step that was measured.

    An optimizer that takes a closure may call it any number of times, with the parameters moved in between.
    The first call, if they have not moved, is answered with the loss and the gradients that were measured.

    Args:
        optimizer: the copy.
        parameters: working copies by qualified name.
        gradients: their gradients; None where there is none.
        again: evaluates loss and gradients anew, for optimizers that look at other points (LBFGS, SAM).
        loss: the loss that was measured.
        handed: what `is_handed_closure` says of the optimizer, where that is known.
    """
    handed = is_handed_closure(optimizer) if handed is None else handed
    kept = handed and _is_the_users(optimizer)
    values = {n: p.detach().clone() for n, p in parameters.items()} if kept else {}
    first = True

    def hand_gradients() -> None:
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]

    def closure() -> Any:
        nonlocal first
        moved = not all(same_bits(parameters[name], was) for name, was in values.items())
        if first and not moved:
            first = False
            hand_gradients()
            return loss.detach()
        first = False
        with torch.enable_grad():
            return again()

    hand_gradients()
    quiet = warnings.catch_warnings() if step_hooks(optimizer) else contextlib.nullcontext()
    try:
        with quiet:
            if step_hooks(optimizer):  # a copy has no trace of what counts its steps for a scheduler
                warnings.filterwarnings("ignore", message=".*optimizer.step.*", category=UserWarning)
            optimizer.step(closure) if handed else optimizer.step()  # type: ignore[call-overload]
    except Exception as error:
        error.add_note(f"gradflow: raised by the step of a copy of the {type(optimizer).__name__}.")
        raise
    finally:
        for parameter in parameters.values():
            parameter.grad = None
