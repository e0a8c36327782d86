"""`chance`: dropout layers, and dropout that goes on in eval mode.

NOTE [Dropout in eval mode]
A dropout layer is switched off by `model.eval()`; a function is, if it is told so. Whether it is told by
`self.training` or by a constant does not show in training. So where the model itself calls dropout as a
function, its last batch is run once more in eval mode, and what drops there is named. Other random numbers in
eval mode (samples of a policy, of a latent variable) are meant, and are not told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import nn

from gradflow.functional.measurement import Session
from gradflow.functional.tap.calls import type_name
from gradflow.functional.tap.recorder import Recorder
from gradflow.records import DropoutRecord, PartsRecord

_POSITION = {  # of the share and of `training` among the arguments of functions that drop
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), (1, 2)),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout", "feature_dropout"), (1, 2)),
}
_SCORES = "scaled_dot_product_attention"


@attrs.frozen
class Chance:
    """The measurement of dropout; see `chance`."""

    def start(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> Session:
        """Return the session of one run."""
        return ChanceSession(modules)


def chance() -> Chance:
    """Return the measurement of dropout: `analyze` takes it in every run.

    >>> import torch, gradflow as gf
    >>> class Net(nn.Linear):
    ...     def forward(self, x):
    ...         return nn.functional.dropout(super().forward(x), 0.3)
    >>> record = gf.analyze(Net(4, 4), [torch.randn(8, 4)], lambda y: y.square().mean())
    >>> [(d.p, d.in_eval) for d in record.parts.dropouts]
    [(0.3, True)]
    """
    return Chance()


class ChanceSession(Session):
    """Listens for functions that drop; see `chance`."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._types = {name: type_name(module) for name, module in modules.items()}
        self._layers = {
            name: float(module.p)
            for name, module in modules.items()
            if isinstance(module, nn.modules.dropout._DropoutNd)
        }
        self._called: set[str] = set()  # modules that call dropout as a function
        self._in_eval: dict[str, float] = {}
        self._evaluating = False
        self._recorder: Recorder | None = None

    def listens(self, *, end: bool) -> bool:
        """In the first step and the last alone."""
        return end

    def begin(self, step: int, recorder: Recorder) -> None:
        """Start a step."""
        self._recorder = recorder

    def function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Any], None] | None:
        """Look whether a function drops."""
        share = _dropped(getattr(func, "__name__", ""), args, kwargs)
        if share > 0 and self._recorder is not None:
            running = self._recorder.running()
            module = running[-1].module if running else ""
            if self._evaluating:
                self._in_eval[module] = max(share, self._in_eval.get(module, 0.0))
            elif module not in self._layers:
                self._called.add(module)
        return None

    def end(self) -> None:
        """Let go of the step."""
        self._recorder = None

    def wants_eval(self) -> bool:
        """Whether dropout was called as a function, which eval mode may not switch off."""
        self._evaluating = bool(self._called)
        return self._evaluating

    def fields(self) -> Mapping[str, Any]:
        """Return the records."""
        names = [*self._layers, *(name for name in self._in_eval if name not in self._layers)]
        dropouts = [
            DropoutRecord(
                name=name, type=self._types.get(name, ""), in_eval=name in self._in_eval,
                p=self._layers.get(name, self._in_eval.get(name, 0.0)),
            )
            for name in names
        ]  # fmt: skip
        return {"parts": PartsRecord(dropouts=dropouts)}


def _dropped(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return the share that a call of a function drops; 0 if it does not."""
    if name == _SCORES:
        return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if name not in _POSITION:
        return 0.0
    share, training = (
        kwargs.get(word, args[at] if len(args) > at else default)
        for at, word, default in zip(_POSITION[name], ("p", "training"), (0.5, True), strict=True)
    )
    return float(share) if training else 0.0
