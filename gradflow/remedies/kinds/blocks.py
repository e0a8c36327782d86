"""Remedies of blocks: skip connections, norms on the branch instead of the path, and wider passages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradflow.errors import RemedyError
from gradflow.remedies.kinds.structure import each_put, norm_before, normed, without
from gradflow.remedies.remedy import Remedy, on_model
from gradflow.remedies.surgery import access, listed, part, put, with_tensors_like


class Residual(nn.Module):
    """x + layer(x), or x + layer(norm(x)).

    Args:
        layer: what is added to its own input.
        norm: whether a norm over the features stands before it.
        strict: whether shapes must be the same; else, where they are not, the layer stays alone.
    """

    def __init__(self, layer: nn.Module, *, norm: bool = False, strict: bool = True) -> None:
        super().__init__()
        self.layer, self.norm, self.strict = layer, norm, strict

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the layer, and add its input."""
        can = self.norm and isinstance(x, Tensor) and x.is_floating_point()
        y = self.layer(normed(x, images=x.dim() == 4) if can else x, *args, **kwargs)
        first = y[0] if isinstance(y, tuple) else y
        if not isinstance(x, Tensor) or x.shape != first.shape:
            if self.strict:
                raise RemedyError("input and output differ in shape, so no skip connection fits.")
            return y
        return (x + first, *y[1:]) if isinstance(y, tuple) else x + first


def skip_round(names: Sequence[str], *, norm: bool = False) -> Remedy:
    """Return the remedy that adds the input of modules to their outputs, where the shapes are the same.

    He et al., "Deep residual learning for image recognition", 2016; with a norm on the branch: Xiong et al.,
    "On layer normalization in the transformer architecture", 2020.

    Args:
        names: of the modules; of several, those whose input and output differ in shape stay as they are.
        norm: whether a norm stands before each, so that what is added keeps its scale at any depth.
    """
    inner = "norm(x)" if norm else "x"
    strict = len(names) == 1
    return Remedy(
        name=f"a skip connection round {listed(names)}" + (", with a norm" if norm else ""),
        general=True,
        words=f"The input of {listed(names)} added to the output"
        + (", a norm before each." if norm else "."),
        code="\n".join(f"# in forward(): x = x + {access(name)}({inner})" for name in names),
        apply=each_put(names, lambda old, _: Residual(old, norm=norm, strict=strict)),
    )


def pre_norm(norms: Sequence[str], entries: Sequence[str]) -> Remedy:
    """Return the remedy that moves norms from the path into the branches: x + f(norm(x)), not norm(x + f(x)).

    Xiong et al., "On layer normalization in the transformer architecture", 2020.

    Args:
        norms: those that stand on the path.
        entries: the layers that read the path, the one behind the last block included.
    """
    stripped, before = without(norms), norm_before(entries)

    def change(model: nn.Module, optimizer: Any) -> Any:
        layers = [
            m
            for m in model.modules()
            if isinstance(m, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        ]
        for layer in layers:
            layer.norm_first = True
        if layers:
            return model, optimizer
        return before.apply(*stripped.apply(model, optimizer))

    return Remedy(
        name=f"pre-norm for {listed(norms)}",
        general=True,
        words=f"The norms {listed(norms)} moved off the path, to the beginning of each branch.",
        code="# in forward(): x = x + attention(norm1(x)); x = x + mlp(norm2(x)); a norm before the head\n"
        "# nn.TransformerEncoderLayer(..., norm_first=True)",
        apply=change,
    )


def wider(name: str, readers: Sequence[str], width: int) -> Remedy:
    """Return the remedy that gives a linear layer more outputs, and those that read it as many inputs.

    Args:
        name: of the layer.
        readers: the layers that its output enters.
        width: how many outputs it has then.
    """

    def change(model: nn.Module) -> nn.Module:
        old: Any = part(model, name)
        if not isinstance(old, nn.Linear):
            raise RemedyError(f"{name or 'the model'} is a {type(old).__name__}, no linear layer.")
        new = nn.Linear(old.in_features, width, old.bias is not None)
        model = put(model, name, with_tensors_like(new, old))
        for reader in readers:
            model = put(model, reader, _read(part(model, reader), old.out_features, width))
        return model

    return Remedy(
        name=f"{name} with {width} outputs",
        words=f"{name} gives {width} numbers, and what reads it takes as many.",
        code=f"{access(name)} = nn.Linear(..., {width})  # and the inputs of {listed(readers)}",
        apply=on_model(change),
    )


def _read(old: nn.Module, before: int, width: int) -> nn.Module:
    """Return a layer like an old one for so many more inputs than those that have become wider."""
    more = width - before
    with torch.no_grad():
        if isinstance(old, nn.Linear):
            new: nn.Module = nn.Linear(old.in_features + more, old.out_features, old.bias is not None)
        elif isinstance(old, (nn.RNN, nn.GRU, nn.LSTM)):
            new = type(old)(
                old.input_size + more, old.hidden_size, old.num_layers, old.bias, old.batch_first,
                old.dropout, old.bidirectional,
            )  # fmt: skip
        elif isinstance(old, nn.LayerNorm) and old.normalized_shape == (before,):
            new = nn.LayerNorm(width, old.eps, old.elementwise_affine)
        else:
            raise RemedyError(f"how a {type(old).__name__} reads more inputs is not known.")
    return with_tensors_like(new, old)
