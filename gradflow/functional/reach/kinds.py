"""What kinds of operation can end a gradient, by the names of autograd's nodes."""

from __future__ import annotations

import enum
import re
from typing import Any

import torch

from gradflow.functional.tap.nodes import Node, operation
from gradflow.functional.torch_private import input_metadata


class Kind(enum.Enum):
    """How an operation can hand back nothing."""

    STEP = "step"
    """Flat everywhere: rounding, signs."""
    PART = "part"
    """Takes a fixed part of a tensor; nothing comes back for the rest, or for a part that nobody uses."""
    CHOICE = "choice"
    """Picks by an index, a mask or the largest."""
    SLOPE = "slope"
    """Of slope zero in some range."""
    NORMALISED = "normalised"
    """Gives the same for all inputs that differ by a shift or a scale."""
    FACTOR = "factor"
    """Multiplies by something else: all other operations."""


_WORDS: dict[Kind, tuple[str, ...]] = {
    Kind.STEP: ("round", "floor", "ceil", "sign", "sgn", "trunc", "heaviside"),
    Kind.PART: (
        "slice", "select", "split", "split_with_sizes", "safe_split", "chunk", "unbind", "narrow", "unfold",
        "diagonal", "constant_pad_nd", "as_strided", "copy_slices", "triu", "tril",
    ),
    Kind.CHOICE: (
        "embedding", "embedding_bag", "index", "index_select", "gather", "take", "masked_select", "max",
        "min", "amax", "amin", "topk", "sort", "kthvalue", "median", "nanmedian", "mode", "where",
        "masked_fill", "masked_scatter", "scatter", "index_put", "index_fill", "index_copy", "cummax",
        "cummin", "scatter_reduce", "segment_reduce", "nll_loss", "nll_loss2d", "nll_loss_nd",
        "grid_sampler2d", "grid_sampler3d", "scatter_add", "index_add",
    ),
    Kind.SLOPE: (
        "relu", "threshold", "clamp", "clamp_min", "clamp_max", "hardtanh", "hardsigmoid", "hardswish",
        "hardshrink", "softshrink", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "silu", "gelu",
        "mish", "softplus", "log_sigmoid", "sigmoid", "tanh", "glu", "erf", "threshold_backward", "abs",
        "maximum", "minimum", "fmax", "fmin", "exp", "expm1",
    ),
    Kind.NORMALISED: (
        "softmax", "log_softmax", "native_layer_norm", "native_batch_norm", "native_group_norm",
        "cudnn_batch_norm", "miopen_batch_norm", "fused_rms_norm", "logsumexp", "std", "var", "std_mean",
        "var_mean", "add", "sub", "rsub", "sum", "mean",
    ),
}  # fmt: skip
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words}
_POOL = re.compile(r"max_?pool")

VIEWS = frozenset((
    "t", "view", "transpose", "permute", "expand", "unsafe_view", "clone", "to_copy", "alias", "reshape",
    "squeeze", "unsqueeze", "reshape_alias", "contiguous", "movedim", "copy", "neg",
))  # fmt: skip
# By name of an operation, its inputs that are only added, and so are no factor of another.
ADDED = {"addmm": (0,), "baddbmm": (0,), "addmv": (0,), "addcmul": (0,), "addcdiv": (0,), "convolution": (2,)}


def kind_of(node: Node) -> Kind:
    """Return how a node of autograd's can hand back nothing."""
    op = operation(node)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return Kind.SLOPE
    if _POOL.search(op):
        return Kind.CHOICE
    return _KINDS.get(op, Kind.FACTOR)


def saved(node: Node, name: str) -> Any:
    """Return what a node has kept under a name, None if nothing."""
    return getattr(node, f"_saved_{name}", None)


def is_over_one(node: Node, shape: tuple[int, ...]) -> bool:
    """Whether a node normalises over a single number.

    Args:
        node: of a softmax or a norm layer.
        shape: of its output.
    """
    groups = saved(node, "group")
    if isinstance(groups, int) and operation(node) == "native_group_norm":
        return saved(node, "C") * saved(node, "HxW") == groups
    if "norm" not in operation(node) and "softmax" not in operation(node):
        return False
    dim = saved(node, "dim")
    if isinstance(dim, int) and shape:
        dim = dim - 2**64 if dim >= 2**63 else dim
        return shape[dim] == 1
    normalized = saved(node, "normalized_shape")
    return normalized is not None and all(length == 1 for length in normalized)


def is_constant(node: Node) -> bool:
    """Whether a node normalises over a single number, so that what it gives does not depend on that."""
    if kind_of(node) is not Kind.NORMALISED:
        return False
    metadata = input_metadata(node)
    return is_over_one(node, tuple(metadata[0].shape) if metadata else ())
