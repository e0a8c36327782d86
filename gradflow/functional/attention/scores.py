"""The scores and weights of fused attention, from the arguments of its call, a part of the batch at a time.

`scaled_dot_product_attention` and `multi_head_attention_forward` do not return their weights, or not always.
They are computed again here, in single precision at least, and without dropout.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from gradflow.functional.tap.watch import MASKED

PART = 2**22  # elements of weights that are held at a time
_SMALL = 2**20  # up to which they are computed in double precision


@attrs.frozen(eq=False)
class Part:
    """The attention of some samples of a batch; each of shape (samples, heads, queries, keys).

    Args:
        weights: what the softmax gives, before dropout; 0 in rows where no key is allowed.
        allowed: which keys a query may attend to.
        logits: what enters the softmax, up to a shift of each row; None if that is not known.
    """

    weights: Tensor
    allowed: Tensor
    logits: Tensor | None


@attrs.frozen(kw_only=True, eq=False)
class Scored:
    """Attention by queries, keys and a mask.

    Args:
        query: shape (samples, heads, queries, features).
        key: shape (samples, heads, keys, features).
        value: shape (samples, heads, keys, features).
        mask: what is added to the scores, or which keys are allowed if boolean; broadcastable to them.
        causal: whether query t attends to the keys 0 to t only.
        scale: the scores are query · key × scale.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(samples, heads, queries, keys)."""
        n, heads, queries, _ = self.query.shape
        return n, heads, queries, self.key.shape[-2]

    def of(self, chosen: Tensor) -> Scored:
        """Return the attention of some samples, by their indices."""
        samples = self.shape[0]
        masked = self.mask is not None and self.mask.shape[0] == samples > 1
        return attrs.evolve(
            self,
            query=self.query[chosen],
            key=self.key[chosen],
            value=self.value[chosen],
            mask=self.mask[chosen] if masked and self.mask is not None else self.mask,
        )

    def parts(self) -> Iterator[Part]:
        """Yield the attention, some samples at a time."""
        samples, heads, queries, keys = self.shape
        step = max(1, PART // max(heads * queries * keys, 1))
        for start in range(0, samples, step):
            yield self._part(slice(start, start + step))

    def _part(self, part: slice) -> Part:
        q, k = self.query[part].detach(), self.key[part].detach()
        number = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        double = q.dtype == torch.float64 or (number <= _SMALL and q.device.type != "mps")
        wide = torch.float64 if double else torch.float32
        with torch.autocast(q.device.type, enabled=False):
            logits = (q.to(wide) * self.scale) @ k.to(wide).transpose(-2, -1)
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if self.causal:
            allowed = allowed.tril()
        if self.mask is not None:
            mask = self.mask if self.mask.shape[0] == 1 else self.mask[part]
            if mask.dtype == torch.bool:
                allowed = allowed & mask
            else:
                logits = logits + mask.to(wide)
                allowed = allowed & (mask > MASKED)
        hidden = logits.masked_fill(~allowed, -math.inf) if self.causal or self.mask is not None else logits
        weights = torch.softmax(hidden, -1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        return Part(weights, allowed, logits)


def scored_by_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Scored:
    """Return the attention of a call of `scaled_dot_product_attention`, whose arguments these are.

    Leading axes are (samples..., heads), as PyTorch has them; with three axes in all the first is the
    samples. `is_causal` aligns at the top left. With `enable_gqa` each key head serves several query heads.
    """
    axes = max(query.dim(), key.dim())
    if axes <= 3:
        query, key, value = (t[None] if t.dim() == 2 else t for t in (query, key, value))
        query, key, value = (t[:, None] for t in (query, key, value))
        attn_mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    if enable_gqa and value.shape[-3] != query.shape[-3]:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    query, key, value = (t.expand(*lead, *t.shape[-2:]) for t in (query, key, value))
    mask = attn_mask
    if mask is not None:
        if mask.dim() > 4:
            mask = mask.expand(*lead, *mask.shape[-2:]).flatten(0, -4)
        mask = mask[(None,) * (4 - mask.dim())]
    return Scored(
        query=query.flatten(0, -4),
        key=key.flatten(0, -4),
        value=value.flatten(0, -4),
        mask=mask,
        causal=is_causal,
        scale=1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
    )


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def packed_arguments(args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of `multi_head_attention_forward` by name, with their defaults."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def projection_weights(a: dict[str, Any]) -> list[Tensor]:
    """Return the weights that make queries, keys and values: one tensor of all three, or three."""
    if a["use_separate_proj_weight"]:
        return [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    return [a["in_proj_weight"]]


def scored_by_projection(a: dict[str, Any]) -> Scored:
    """Return the attention of a call of `multi_head_attention_forward`, by its in-projection.

    Args:
        a: its arguments by name.
    """
    query, key, value = (t[:, None] if t.dim() == 2 else t for t in (a["query"], a["key"], a["value"]))
    heads, samples = a["num_heads"], query.shape[1]
    weights = projection_weights(a)
    parts = weights if len(weights) == 3 else weights[0].chunk(3)
    biases = [None] * 3 if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (
            F.linear(x.to(w.dtype), w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True)
        )
    if a["bias_k"] is not None and a["bias_v"] is not None:
        k = torch.cat([k, a["bias_k"].to(k.dtype).expand(1, samples, -1)])
        v = torch.cat([v, a["bias_v"].to(v.dtype).expand(1, samples, -1)])

    def by_head(x: Tensor) -> Tensor:
        return x.view(len(x), samples, heads, -1).permute(1, 2, 0, 3)

    q, k, v = by_head(q), by_head(k), by_head(v)
    if a["static_k"] is not None:
        k = a["static_k"].view(samples, heads, *a["static_k"].shape[1:])
    if a["static_v"] is not None:
        v = a["static_v"].view(samples, heads, *a["static_v"].shape[1:])
    if a["add_zero_attn"]:
        k, v = (torch.cat([x, x.new_zeros(samples, heads, 1, x.shape[-1])], 2) for x in (k, v))
    # With no key padding and no weights asked for, PyTorch ignores the mask and masks causally itself.
    causal = a["is_causal"] and a["key_padding_mask"] is None and not a["need_weights"]
    mask = _joint_mask(a, samples, heads, k.shape[2], causal)
    return Scored(query=q, key=k, value=v, mask=mask, causal=causal, scale=1.0 / math.sqrt(q.shape[-1]))


def _joint_mask(a: dict[str, Any], samples: int, heads: int, keys: int, causal: bool) -> Tensor | None:
    """Return both masks of the call as one: what is added to scores, or which keys are allowed."""
    found: list[Tensor] = []
    mask, padding = a["attn_mask"], a["key_padding_mask"]
    if mask is not None and not causal:
        found.append(mask.view(-1, heads, *mask.shape[-2:]) if mask.dim() == 3 else mask[None, None])
    if padding is not None:
        padding = padding[None] if padding.dim() == 1 else padding
        found.append(padding[:, None, None, :])
    widened = []
    for m in found:  # keys that were added behind the others are always allowed
        extra = keys - m.shape[-1]
        widened.append(F.pad(m, (0, extra), value=0) if extra > 0 else m)
    if not widened:
        return None
    if all(m.dtype == torch.bool for m in widened):
        hidden = widened[0] if len(widened) == 1 else widened[0] | widened[1]
        return ~hidden  # here, True is what is hidden
    added = [
        torch.zeros_like(m, dtype=torch.float32).masked_fill(m, -math.inf) if m.dtype == torch.bool else m
        for m in widened
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
