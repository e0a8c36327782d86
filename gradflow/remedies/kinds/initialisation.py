"""Remedies of initialisation: weights drawn anew or rescaled, biases at which units fire and gates keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.errors import RemedyError
from gradflow.remedies.remedy import Remedy, on_model
from gradflow.remedies.surgery import access, each, for_each, listed, part

_CALL = re.compile(
    r"nn\.init\.(?P<function>\w+_)\((?P<parameter>[\w.]+)(?:, (?P<options>(?:[^()]|\([^()]*\))*))?\)"
)
_GAIN = re.compile(r"calculate_gain\('(\w+)'\)")


@attrs.frozen
class Init:
    """One call of `torch.nn.init`.

    Args:
        function: its name, such as `kaiming_normal_`.
        parameter: qualified name of what it fills.
        options: its keyword arguments.
    """

    function: str
    parameter: str
    options: Mapping[str, Any] = attrs.field(factory=dict, eq=dict)

    @property
    def layer(self) -> str:
        """The layer that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def code(self) -> str:
        """The call, as code."""
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        owner, _, name = self.parameter.rpartition(".")
        return f"nn.init.{self.function}({access(owner)}.{name}{options})"


def inits_in(text: str) -> tuple[Init, ...]:
    """Return the calls of `torch.nn.init` that a recommended action tells.

    >>> inits_in("Start again: nn.init.xavier_uniform_(fc.weight, gain=nn.init.calculate_gain('tanh')).")
    (Init(function='xavier_uniform_', parameter='fc.weight', options={'gain': 1.6666666666666667}),)
    """
    return tuple(
        Init(match["function"], match["parameter"], _options(match["options"] or ""))
        for match in _CALL.finditer(text)
        if "." in match["parameter"]
    )


def _options(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in re.findall(r"(\w+)=((?:[^,()]|\([^)]*\))+)", text):
        if gain := _GAIN.search(value):
            found[key] = nn.init.calculate_gain(gain[1])  # type: ignore[arg-type]
        elif value.startswith("'"):
            found[key] = value.strip("'")
        else:
            with_number = re.fullmatch(r"-?[\d.]+(?:e-?\d+)?", value)
            if with_number:
                found[key] = float(value)
    return found


def initialised(inits: Sequence[Init], *, zero_bias: bool = False) -> Remedy:
    """Return the remedy that draws weights anew.

    Args:
        inits: what is drawn, and how.
        zero_bias: whether the biases of those layers start at zero as well.

    >>> remedy = initialised([Init("ones_", "0.weight")])
    >>> net = nn.Sequential(nn.Linear(2, 1))
    >>> remedy.name, remedy.apply(net, torch.optim.SGD(net.parameters(), 0.1))[0][0].weight.tolist()
    ('ones_ on 0', [[1.0, 1.0]])
    """
    functions = list(dict.fromkeys(init.function for init in inits))
    layers = [init.layer for init in inits]

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for init in inits:
                _filled(model, init)
                bias = getattr(part(model, init.layer), "bias", None)
                if zero_bias and isinstance(bias, nn.Parameter):
                    nn.init.zeros_(bias)

    lines = [init.code for init in inits]
    if len(inits) > 2 and len({(init.function, str(init.options)) for init in inits}) == 1:
        call = inits[0].code.replace(f"({access(inits[0].layer)}.", "({}.")
        lines = [for_each(layers, call)]
    if zero_bias:
        lines.append(for_each(layers, "nn.init.zeros_({}.bias)"))
    return Remedy(
        name=f"{' and '.join(functions)} on {listed(layers)}" + (", bias 0" if zero_bias else ""),
        general=True,
        words=f"The weights of {listed(layers)} drawn anew"
        + (", their biases at zero." if zero_bias else "."),
        code="\n".join(lines),
        apply=on_model(change),
    )


def _filled(model: nn.Module, init: Init) -> None:
    layer = part(model, init.layer)
    parameter = getattr(layer, init.parameter.rpartition(".")[2], None)
    if not isinstance(parameter, Tensor):
        raise RemedyError(f"the model has no parameter {init.parameter!r}.")
    if not parameter.requires_grad and isinstance(parameter, nn.Parameter):
        raise RemedyError(f"{init.parameter} is not trained, so it is not drawn anew.")
    getattr(nn.init, init.function)(parameter, **init.options)


def rescaled(names: Sequence[str], factor: float) -> Remedy:
    """Return the remedy that multiplies the weights of layers, bias included.

    Args:
        names: of the layers.
        factor: what they are multiplied by.
    """

    def change(model: nn.Module, name: str) -> None:
        layer = part(model, name)
        own = list(layer.parameters(recurse=False)) or list(layer.parameters())
        if not own:
            raise RemedyError(f"{name or 'the model'} has no parameters.")
        for parameter in own:
            parameter.mul_(factor)

    return Remedy(
        name=f"weights of {listed(names)} × {factor:.2g}",
        words=f"The weights of {listed(names)}, times {factor:.3g}.",
        code=f"with torch.no_grad():\n    for p in [p for layer in ({', '.join(map(access, names))},) "
        f"for p in layer.parameters()]:\n        p.mul_({factor:.3g})",
        apply=on_model(each(names, change)),
    )


def biased(names: Sequence[str], value: float) -> Remedy:
    """Return the remedy that starts biases at a value: a small positive one, for units to fire."""

    def change(model: nn.Module, name: str) -> None:
        bias = getattr(part(model, name), "bias", None)
        if not isinstance(bias, Tensor):
            raise RemedyError(f"{name or 'the model'} has no bias.")
        bias.fill_(value)

    return Remedy(
        name=f"bias {value:g} in {listed(names)}",
        words=f"Biases of {listed(names)} at {value:g}.",
        code=for_each(names, f"nn.init.constant_({{}}.bias, {value:g})"),
        apply=on_model(each(names, change)),
    )


def keeping(name: str, bias: float) -> Remedy:
    """Return the remedy that opens the keeping gate of an LSTM (forget) or a GRU (update).

    Args:
        name: of the layer, a recurrent one or a cell.
        bias: of the gate, in all levels and directions; its sigmoid is the share that is kept in a step.
    """

    def change(model: nn.Module, name: str) -> None:
        layer: Any = part(model, name)
        found = [p for n, p in layer.named_parameters(recurse=False) if n.startswith("bias_ih")]
        if not found or not hasattr(layer, "hidden_size"):
            raise RemedyError(f"{name or 'the model'} has no gates with a bias.")
        for parameter in found:
            parameter[layer.hidden_size : 2 * layer.hidden_size] = bias

    place = access(name)
    return Remedy(
        name=f"keeping gate of {name or 'model'} at bias {bias:g}",
        words=f"The gate of {name or 'the model'} that keeps the state starts open, at a bias of {bias:g}.",
        code=f"for name, p in {place}.named_parameters():\n    if name.startswith('bias_ih'):\n"
        f"        p.data[{place}.hidden_size:2 * {place}.hidden_size] = {bias:g}",
        apply=on_model(each([name], change)),
    )


def orthogonal_recurrence(name: str) -> Remedy:
    """Return the remedy that starts recurrent weights orthogonal, each gate's block by itself."""

    def change(model: nn.Module, name: str) -> None:
        layer = part(model, name)
        found = [p for n, p in layer.named_parameters(recurse=False) if n.startswith("weight_hh")]
        if not found:
            raise RemedyError(f"{name or 'the model'} has no recurrent weights.")
        for parameter in found:
            for block in parameter.split(parameter.shape[1]):
                nn.init.orthogonal_(block)

    return Remedy(
        name=f"orthogonal_ recurrent weights in {name or 'model'}",
        words=f"The recurrent weights of {name or 'the model'} orthogonal, gate by gate.",
        code=f"for name, p in {access(name)}.named_parameters():\n    if name.startswith('weight_hh'):\n"
        "        for block in p.data.split(p.shape[1]):\n            nn.init.orthogonal_(block)",
        apply=on_model(each([name], change)),
    )


def like_siblings(parameters: Sequence[str]) -> Remedy:
    """Return the remedy that draws parameters anew with mean and deviation of the same ones of other blocks.

    Args:
        parameters: qualified names; siblings differ from them by the numbers in the name.
    """

    def change(model: nn.Module, name: str) -> None:
        kind = re.sub(r"\d+", "#", name)
        named = dict(model.named_parameters())
        others = [p for n, p in named.items() if n not in parameters and re.sub(r"\d+", "#", n) == kind]
        if name not in named or not others:
            raise RemedyError(f"no other block has a parameter like {name}.")
        mean = float(torch.stack([p.float().mean() for p in others]).median())
        std = float(torch.stack([p.float().std(unbiased=False) for p in others]).median())
        named[name].normal_(mean, std) if std > 0 else named[name].fill_(mean)

    return Remedy(
        name=f"{listed(parameters)} like its siblings",
        words=f"{listed(parameters)} drawn like the same parameters of the other blocks.",
        code="\n".join(
            f"nn.init.normal_({access(n.rpartition('.')[0])}.{n.rpartition('.')[2]}, mean, std)"
            "  # of the other blocks"
            for n in parameters
        ),
        apply=on_model(each(parameters, change)),
    )


def kaiming(names: Sequence[str]) -> Remedy:
    """Return the remedy that draws the weights of layers before rectifiers by He's rule, biases at zero.

    He et al., "Delving deep into rectifiers", 2015.
    """
    inits = [Init("kaiming_normal_", f"{name}.weight", {"nonlinearity": "relu"}) for name in names]
    return initialised(inits, zero_bias=True)


def queries_divided(name: str, factor: float) -> Remedy:
    """Return the remedy that divides the weights that make the queries, and so the attention scores.

    Args:
        name: of the attention module.
        factor: what the scores are divided by, such as the root of the width of a head.
    """

    def change(model: nn.Module, name: str) -> None:
        module = part(model, name)
        named = {n: p for n, p in module.named_parameters() if p.dim() >= 1}
        single = [p for n, p in named.items() if re.search(r"(^|[._])(q|query|q_proj|to_q|wq)\d*\.", n)]
        joint = [p for n, p in named.items() if re.search(r"(in_proj|qkv|query_key_value)", n)]
        if single:
            for parameter in single:
                parameter.div_(factor)
        elif joint:
            for parameter in joint:
                parameter[: parameter.shape[0] // 3].div_(factor)
        else:
            raise RemedyError(f"what makes the queries of {name or 'the model'} cannot be told by its name.")

    return Remedy(
        name=f"queries of {name or 'model'} / {factor:.3g}",
        words=f"The weights that make the queries of {name or 'the model'} divided by {factor:.3g}, "
        "and so its scores.",
        code=f"scores = scores / {factor:.3g}  # in {name or 'the model'}",
        apply=on_model(each([name], change)),
    )
