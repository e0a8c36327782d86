"""What a step shows of a text: its tokens, its padding, and whether targets are tokens shifted by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.functional.model.trees import iter_tensors
from gradflow.functional.tap.calls import Call

_LOSSES = frozenset({"cross_entropy", "nll_loss"})
_PAIRS = 256  # of equal tokens that are compared
_ALIKE = 0.99  # share of targets that must be the next token


class Texts:
    """Listens to the embeddings, the model's own call and the loss of one step.

    Args:
        modules: the model's modules by qualified name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._waiting: dict[int, Tensor] = {}
        self._embedded: list[
            tuple[Tensor, Tensor, int | None]
        ] = []  # tokens, what they became, padding index
        self._masks: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._output: list[Tensor] = []

    @property
    def padding_told(self) -> bool:
        """Whether the model is told of padding by a mask among its inputs."""
        return bool(self._masks)

    def entered(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at what enters the model, and an embedding."""
        tensors = list(iter_tensors((args, dict(kwargs))))
        if call.parent == -1:
            self._masks += [t for t in tensors if _is_mask(t)]
        elif "embedding" in call.type.lower():
            tokens = next((t for t in tensors if t.dtype in (torch.int64, torch.int32)), None)
            if tokens is not None and tokens.dim() == 2:
                self._waiting[call.index] = tokens

    def left(self, call: Call, output: Any) -> None:
        """Look at what leaves the model, and an embedding."""
        if (tokens := self._waiting.pop(call.index, None)) is not None and isinstance(output, Tensor):
            index = getattr(self._modules[call.module], "padding_idx", None)
            self._embedded.append((tokens, output, index if isinstance(index, int) else None))
        if call.parent == -1:
            self._output = [t for t in iter_tensors(output) if t.is_floating_point() and t.dim() == 3]

    def function(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Look at the targets of a loss."""
        if name in _LOSSES:
            target = args[1] if len(args) > 1 else kwargs.get("target")
            if isinstance(target, Tensor) and target.dtype == torch.int64:
                self._targets.append(target.detach())

    def padding(self) -> Tensor | None:
        """Return which positions hold padding, shape (samples, positions); None where none is known."""
        for mask in self._masks:
            tokens = self._under(mask)
            if tokens is None:
                continue
            hidden = _hidden(mask, tokens)
            if bool(hidden.any()) and not bool(hidden.all(-1).any()):
                return hidden
        for tokens, _, index in self._embedded:
            if index is not None:
                hidden = tokens == index
                if bool(hidden.any()) and not bool(hidden.all(-1).any()):
                    return hidden
        return None

    def _under(self, mask: Tensor) -> Tensor | None:
        """Return the tokens that a mask speaks of, which are not the mask itself; None without any."""
        return next((t for t, _, _ in self._embedded if t.shape == mask.shape and t is not mask), None)

    def repeated(self) -> tuple[Tensor, Tensor] | None:
        """Return embedded tokens and the model's output, if targets are the very tokens at their places."""
        found = self._asked(_is_itself)
        return None if found is None else found[1:]

    def shifted(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return tokens, embedded tokens and the model's output, if targets are the tokens shifted by one."""
        return self._asked(_is_next)

    def _asked(self, are: Callable[[Tensor, Tensor], bool]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return tokens, embedded tokens and the model's output, if some targets are as asked."""
        for tokens, embedded, _ in self._embedded:
            output = next((y for y in self._output if y.shape[:2] == tokens.shape), None)
            if output is not None and any(are(tokens, target) for target in self._targets):
                return tokens, embedded, output
        return None


def _hidden(mask: Tensor, tokens: Tensor) -> Tensor:
    """Return where a mask has padding: at its ones where all tokens are one there, and not so at its zeros.

    Both senses are in use: ones for words (tokenizers), and True for padding (`key_padding_mask`).
    """
    zeros = mask == 0
    alike = [bool((of := tokens[part]).numel() and (of == of[0]).all()) for part in (zeros, ~zeros)]
    return ~zeros if alike == [False, True] else zeros


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor may tell padding from words: (samples, positions) of zeros and ones, of both."""
    if tensor.layout is not torch.strided or tensor.dim() != 2 or tensor.is_complex() or not tensor.numel():
        return False
    return bool(((tensor == 0) | (tensor == 1)).all()) and bool((tensor == 0).any() and (tensor == 1).any())


def _is_next(tokens: Tensor, target: Tensor) -> bool:
    """Whether targets are the tokens that come next."""
    samples, positions = tokens.shape
    if positions < 3 or samples == 0:
        return False
    if target.numel() == samples * positions:
        target = target.reshape(samples, positions)[:, :-1]
    elif target.numel() == samples * (positions - 1):
        target = target.reshape(samples, positions - 1)
    else:
        return False
    counts = target >= 0
    following = (target == tokens[:, 1:])[counts]
    same = (target == tokens[:, :-1])[counts]
    if following.numel() == 0:
        return False
    return float(following.float().mean()) >= _ALIKE and float(same.float().mean()) < _ALIKE


def _is_itself(tokens: Tensor, target: Tensor) -> bool:
    """Whether targets are the tokens at their own places, of which those next to one another differ."""
    if target.numel() != tokens.numel() or tokens.shape[1] < 3 or not tokens.numel():
        return False
    target = target.reshape(tokens.shape)
    counts, varied = target >= 0, tokens[:, 1:] != tokens[:, :-1]
    if not bool(counts.any()) or float(varied.float().mean()) < 0.1:
        return False
    return float((target == tokens)[counts].float().mean()) >= _ALIKE


def tells_order(tokens: Tensor, output: Tensor) -> bool:
    """Whether equal tokens of one sequence get different outputs; True where no two are equal.

    Without positions, and without a mask that hides some, a transformer gives the same wherever a token is.
    """
    rows, first, second = torch.nonzero(tokens[:, :, None] == tokens[:, None, :], as_tuple=True)
    pairs = torch.nonzero(first < second)[:_PAIRS, 0]
    if len(pairs) == 0:
        return True
    a, b = output.detach()[rows[pairs], first[pairs]], output.detach()[rows[pairs], second[pairs]]
    return bool((a - b).float().norm() > 1e-4 * a.float().norm())
