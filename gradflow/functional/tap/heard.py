"""What a loss does with the outputs that it is given, heard while it is computed.

NOTE [What a loss cannot mean]
Some functions of PyTorch take numbers of one meaning and check nothing. Targets of a binary cross entropy
are probabilities, from 0 to 1. A cross entropy makes probabilities of scores itself: given some already,
which never lie further apart than 1, it cannot fall to zero; nor can a binary one that takes scores.
`nll_loss`, `kl_div` and `ctc_loss` take logarithms of probabilities, none of which is above zero; those of
one sample add up to one, and where those of one class do instead, the softmax ran over the wrong axis. And an
operation of two tensors with equally many elements, (N, 1) and (N,), sets every element of one against every
one of the other: no sample is held against its own target.

NOTE [Pooled before it is squashed]
A log-sigmoid of the sum over all pairs is not the sum of their log-sigmoids: once the sum is large, its slope
is gone for those too that are on the wrong side. So of every single number that is a sum or a mean of
outputs, or one of those less another, its parts are kept, row by row, to be asked where it is squashed.

NOTE [Alternatives left out]
A contrastive loss leaves out what equals the right answer. Of outputs that are alike for all samples, as
guesses are, it may leave out every wrong answer, and the right one alone costs nothing. So the alternatives
that are not masked are counted: a guess that leaves less than half of those that the outputs do is asked of
another loss, and tells nothing of what ignorance costs in this one. And where masks leave a row nothing but
its right answer, that row costs nothing and teaches nothing, whatever the scores are: such rows are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradflow.functional.model.trees import iter_tensors

_OF_ODDS = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_OF_LOGARITHMS = {"nll_loss": "input", "kl_div": "input", "ctc_loss": "log_probs"}
_BY_ELEMENT = frozenset(
    ("sub", "rsub", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "mul", "rmul", "div", "truediv")
)
_ERRORS = frozenset(("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"))
_POOLS = ("sum", "mean")
_LINEAR = ("add", "radd", "sub", "rsub", "neg", "mul", "rmul", "div", "truediv")
_SQUASHES = ("sigmoid", "logsigmoid", "softplus", "tanh", "binary_cross_entropy_with_logits")
_CHOOSES = ("cross_entropy", "log_softmax", "softmax")
_ADDS_UP = "logsumexp"  # a cross entropy that is written out
_MASKED = -9000.0  # masks are filled with the smallest float, -1e9 or -1e4
_MOST = 0.9  # of the choices
_FLAT = 0.01  # of the largest slope
_SEVERAL = 16  # numbers, of which chance does not put all between 0 and 1
_SLACK = 1e-3  # what rounding may add


class Choices(TorchFunctionMode):
    """Counts the alternatives that a loss chooses among; see NOTE [Alternatives left out]."""

    def __init__(self) -> None:
        super().__init__()
        self.alternatives = 0  # that are not masked, of all choices among scores
        self._choices = self._forced = 0  # all choices, and those of which masks leave one alternative

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.count(getattr(func, "__name__", "").strip("_"), args, kwargs)
        return func(*args, **kwargs)

    def count(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Count the alternatives that are not masked, and the choices that are left but one."""
        scores = kwargs.get("input", args[0] if args else None)
        if not (name in _CHOOSES or name == _ADDS_UP):
            return
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or not scores.dim():
            return
        left = scores.detach() > _MASKED
        if name != _ADDS_UP:
            self.alternatives += int(left.sum())
        axis = _axis_of_choices(name, scores, args, kwargs)
        if axis is not None and scores.shape[axis] > 1:
            self._choices += left.numel() // left.shape[axis]
            self._forced += int((left.sum(axis) == 1).sum())


class Heard(Choices):
    """Hears what a loss does with outputs.

    Args:
        output: the model's; what is computed of it is known as such.
        rows: the number of its rows.
    """

    def __init__(self, output: Any, rows: int = 0) -> None:
        super().__init__()
        self._rows, self._parts = rows, dict[int, Tensor]()
        self._pooled: list[Tensor] = []  # kept alive, so that none takes the id of another
        self.against = math.nan
        self._made: dict[int, Tensor] = {id(tensor): tensor for tensor in iter_tensors(output)}
        self.odds: tuple[float, ...] = ()
        self.misgiven: dict[str, None] = {}
        self.scored = False
        self.crossed: tuple[tuple[int, ...], ...] = ()
        self._errors: list[float] = []  # what functions that measure one gave, of outputs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        given = [*args, *kwargs.values()]
        if name in _OF_ODDS:
            self._hear_odds(kwargs.get("target", args[1] if len(args) > 1 else None))
            if name.endswith("logits") and _are_odds(kwargs.get("input", args[0] if args else None)):
                self.misgiven["odds as scores"] = None
        elif name == "cross_entropy":
            self._hear_scores(kwargs.get("input", args[0] if args else None))
        elif name in _OF_LOGARITHMS:
            self._hear_logarithms(name, kwargs.get(_OF_LOGARITHMS[name], args[0] if args else None))
        self.count(name, args, kwargs)
        if name in _BY_ELEMENT and not self.crossed:
            self._hear_pair([x for x in given if isinstance(x, Tensor)])
        made = func(*args, **kwargs)
        in_place = any(made is x for x in given)
        if self._rows and isinstance(made, Tensor) and made.numel() == 1 and not in_place:
            self._hear_pooled(name.replace("log_sigmoid", "logsigmoid"), func, args, made)
        if any(id(x) in self._made for x in given if isinstance(x, Tensor)):
            if name in _ERRORS and isinstance(made, Tensor) and made.numel() == 1:
                self._errors.append(float(made))
            self._made |= {id(tensor): tensor for tensor in iter_tensors(made)}
        return made

    def hear_whole(self, loss: float) -> None:
        """Hear what the loss gives, once it is done: an error with a minus asks for errors, and choices of
        which masks leave one alternative ask for nothing."""
        if self._forced >= _MOST * max(self._choices, 1):
            self.misgiven["scores masked but for one"] = None
        if any(loss < 0 < error and math.isclose(loss, -error, rel_tol=1e-6) for error in self._errors):
            self.misgiven["an error with a minus"] = None

    def _hear_odds(self, target: Any) -> None:
        if isinstance(target, Tensor) and target.numel():
            low, high = target.detach().aminmax()
            self.odds = (min([*self.odds[:1], float(low)]), max([*self.odds[1:], float(high)]))

    def _hear_scores(self, scores: Any) -> None:
        if not isinstance(scores, Tensor) or not scores.numel() or not scores.is_floating_point():
            return
        self.scored |= id(scores) in self._made
        axis = 1 if scores.dim() > 1 else 0
        if scores.shape[axis] < 2 or not bool((scores >= 0).all()):
            return
        if _add_up(scores.detach(), axis):
            self.misgiven["probabilities as scores"] = None
        elif scores.dim() == 2 and _add_up(scores.detach(), 0):
            self.misgiven["probabilities over samples"] = None

    def _hear_logarithms(self, name: str, values: Any) -> None:
        if not isinstance(values, Tensor) or not values.numel() or not values.is_floating_point():
            return
        low, high = (float(x) for x in values.detach().aminmax())
        if high > _SLACK and id(values) in self._made:
            whole = low >= 0 and high <= 1 + _SLACK
            self.misgiven[f"{'probabilities' if whole else 'scores'} as logarithms"] = None
        elif name == "nll_loss" and values.dim() == 2 and id(values) in self._made:
            odds = values.detach().float().exp()
            if _add_up(odds, 0) and not _add_up(odds, 1):
                self.misgiven["probabilities over samples"] = None

    def _hear_pooled(self, name: str, func: Any, args: tuple[Any, ...], made: Tensor) -> None:
        """Keep by row what a single number is made of, and ask it where that number is squashed."""
        given = args[0] if args else None
        if not isinstance(given, Tensor):
            return
        whole = id(given) in self._made and given.numel() > 1 and given.numel() % self._rows == 0
        if name in _POOLS and whole and given.shape[0] in (self._rows, given.numel()):
            self._keep(made, given.detach().reshape(self._rows, -1).sum(1))
        elif name in _LINEAR and any(id(x) in self._parts for x in args):
            parts = [self._parts.get(id(x), x) for x in args]
            if all(not isinstance(x, Tensor) or x.numel() in (1, self._rows) for x in parts):
                self._keep(made, func(*parts))
        elif name in _SQUASHES and id(given) in self._parts:
            value, parts = float(given), self._parts[id(given)]
            if _is_flat(name, value, made):
                self.against = float((parts * value < 0).float().mean())

    def _keep(self, pooled: Tensor, parts: Tensor) -> None:
        self._pooled.append(pooled)
        self._parts[id(pooled)] = parts

    def _hear_pair(self, pair: list[Tensor]) -> None:
        """Whether outputs and as many numbers that do not come of them are set against each other."""
        if len(pair) != 2 or pair[0].numel() != pair[1].numel() or pair[0].numel() < 3:
            return
        first, second = pair
        if (id(first) in self._made) == (id(second) in self._made):
            return
        try:
            shape = torch.broadcast_shapes(first.shape, second.shape)
        except RuntimeError:
            return
        if shape.numel() >= 2 * first.numel():
            output, other = (first, second) if id(first) in self._made else (second, first)
            self.crossed = (tuple(output.shape), tuple(other.shape))


def _axis_of_choices(
    name: str, scores: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | None:
    """The axis that the alternatives lie along; None where that is none, or several."""
    if name == "cross_entropy":
        return 1 if scores.dim() > 1 else 0
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    axis = axis[0] if isinstance(axis, (tuple, list)) and len(axis) == 1 else axis
    return axis if isinstance(axis, int) and -scores.dim() <= axis < scores.dim() else None


def _are_odds(scores: Any) -> bool:
    """Whether numbers that differ lie between 0 and 1, all of them."""
    if not isinstance(scores, Tensor) or scores.numel() < _SEVERAL or not scores.is_floating_point():
        return False
    low, high = (float(x) for x in scores.detach().aminmax())
    return 0 <= low < high <= 1


def _add_up(odds: Tensor, axis: int) -> bool:
    """Whether numbers add up to one along an axis."""
    return bool((odds.float().sum(axis) - 1).abs().max() < _SLACK)


def _is_flat(name: str, value: float, made: Tensor) -> bool:
    """Whether a squashed number lies where the slope is as good as gone."""
    if name == "tanh":
        return 1 - math.tanh(value) ** 2 < _FLAT
    if name == "binary_cross_entropy_with_logits":
        return float(made) < _FLAT
    far = 1 / (1 + math.exp(min(abs(value), 700.0)))
    flat_side = {"logsigmoid": value > 0, "softplus": value < 0}
    return far < (_FLAT if name in flat_side else _FLAT / 4) and flat_side.get(name, True)
