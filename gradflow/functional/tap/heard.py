"""What a loss does with the outputs that it is given, heard while it is computed.

NOTE [What a loss cannot mean]
Some functions of PyTorch take numbers of one meaning and check nothing. Targets of a binary cross entropy are
probabilities, from 0 to 1. A cross entropy makes probabilities of scores itself: given some already, which
never lie further apart than 1, it cannot fall to zero. `nll_loss`, `kl_div` and `ctc_loss` take logarithms of
probabilities, none of which is above zero. And an operation of two tensors with equally many elements, (N, 1)
and (N,), sets every element of one against every one of the other: no sample is held against its own target.
"""

from __future__ import annotations

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
_SLACK = 1e-3  # what rounding may add


class Heard(TorchFunctionMode):
    """Hears what a loss does with outputs.

    Args:
        output: the model's; what is computed of it is known as such.
    """

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._made: dict[int, Tensor] = {id(tensor): tensor for tensor in iter_tensors(output)}
        self.odds: tuple[float, ...] = ()
        self.misgiven: dict[str, None] = {}
        self.scored = False
        self.crossed: tuple[tuple[int, ...], ...] = ()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        given = [*args, *kwargs.values()]
        if name in _OF_ODDS:
            self._hear_odds(kwargs.get("target", args[1] if len(args) > 1 else None))
        elif name == "cross_entropy":
            self._hear_scores(kwargs.get("input", args[0] if args else None))
        elif name in _OF_LOGARITHMS:
            self._hear_logarithms(name, kwargs.get(_OF_LOGARITHMS[name], args[0] if args else None))
        if name in _BY_ELEMENT and not self.crossed:
            self._hear_pair([x for x in given if isinstance(x, Tensor)])
        made = func(*args, **kwargs)
        if any(id(x) in self._made for x in given if isinstance(x, Tensor)):
            self._made |= {id(tensor): tensor for tensor in iter_tensors(made)}
        return made

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
        if bool((scores.detach().float().sum(axis) - 1).abs().max() < _SLACK):
            self.misgiven["probabilities as scores"] = None

    def _hear_logarithms(self, name: str, values: Any) -> None:
        if not isinstance(values, Tensor) or not values.numel() or not values.is_floating_point():
            return
        low, high = (float(x) for x in values.detach().aminmax())
        if high > _SLACK and id(values) in self._made:
            whole = low >= 0 and high <= 1 + _SLACK
            self.misgiven[f"{'probabilities' if whole else 'scores'} as logarithms"] = None

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
