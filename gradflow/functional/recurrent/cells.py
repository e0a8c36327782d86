"""Recurrent cells as pure functions of an input's drive and the state before it, with their gates in sight.

NOTE [Drive and state]
One step of a recurrent layer is s_t = F(d_t, s_{t-1}). The drive d_t = W_ih x_t + b_ih is what the input
brings to the gates, or to the tanh; it needs no state, so it is computed for all steps at once, and the
gradient with respect to it is what step t has to say to W_ih and b_ih. The state s is (h,), or (h, c) for an
LSTM. The equations are those of `torch.nn.RNN`, `LSTM` (with its projection) and `GRU`, whose kernels keep
all of this to themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.model.setting import Setting
from gradflow.functional.model.threads import exclusive

State = tuple[Tensor, ...]  # (h,) or (h, c), each (samples, size)

KINDS = {"RNN_TANH": "tanh", "RNN_RELU": "relu", "LSTM": "lstm", "GRU": "gru"}


@attrs.frozen(eq=False, kw_only=True)
class Cell:
    """One step of a recurrent layer, as a pure function.

    Args:
        kind: `tanh`, `relu`, `lstm`, `gru`; or `identity`, a linear recurrence.
        weight_hh: recurrent weights, (gates · hidden, state size).
        bias_hh: their bias, (gates · hidden,), or None.
        weight_hr: projection of an LSTM's h, (projection, hidden), or None.

    >>> cell = Cell(kind="identity", weight_hh=0.5 * torch.eye(2))
    >>> (h,), _ = cell(torch.zeros(1, 2), (torch.ones(1, 2),))
    >>> h
    tensor([[0.5000, 0.5000]])
    """

    kind: str
    weight_hh: Tensor
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None

    def __call__(self, drive: Tensor, state: State) -> tuple[State, dict[str, Tensor]]:
        """Return the next state, and the gates by name.

        Args:
            drive: W_ih x + b_ih, (samples, gates · hidden).
            state: (h,) or (h, c).
        """
        return _STEPS[self.kind](self, drive, state)

    def recurrent(self, h: Tensor) -> Tensor:
        """Return W_hh h + b_hh."""
        return nn.functional.linear(h, self.weight_hh, self.bias_hh)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the state's parts: (h,) or (h, c)."""
        own = self.weight_hh.shape[1]
        return (own, self.weight_hh.shape[0] // 4) if self.kind == "lstm" else (own,)

    def flat(self, drive: Tensor, s: Tensor) -> Tensor:
        """Return the next state as one vector per sample, given the state as one."""
        state, _ = self(drive, tuple(s.split(self.sizes, -1)))
        return torch.cat(state, -1)


def _plain(cell: Cell, drive: Tensor, state: State) -> tuple[State, dict[str, Tensor]]:
    entering = drive + cell.recurrent(state[0])
    h = _NONLINEAR[cell.kind](entering)
    return (h,), {"state": h} if cell.kind == "tanh" else {}


def _lstm(cell: Cell, drive: Tensor, state: State) -> tuple[State, dict[str, Tensor]]:
    entering = drive + cell.recurrent(state[0])
    i, f, g, o = entering.chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * state[1] + i * g
    h = o * torch.tanh(c)
    if cell.weight_hr is not None:
        h = nn.functional.linear(h, cell.weight_hr)
    return (h, c), {"input": i, "forget": f, "candidate": g, "output": o}


def _gru(cell: Cell, drive: Tensor, state: State) -> tuple[State, dict[str, Tensor]]:
    (h,) = state
    from_x, from_h = drive.chunk(3, -1), cell.recurrent(h).chunk(3, -1)
    r, z = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
    n = torch.tanh(from_x[2] + r * from_h[2])
    return ((1 - z) * n + z * h,), {"reset": r, "update": z, "candidate": n}


_NONLINEAR: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda x: x,
}
_STEPS: Mapping[str, Callable[[Cell, Tensor, State], tuple[State, dict[str, Tensor]]]] = {
    **dict.fromkeys(_NONLINEAR, _plain),
    "lstm": _lstm,
    "gru": _gru,
}


@attrs.frozen(eq=False, kw_only=True)
class Level:
    """One level of a recurrent layer in one direction: a cell and what drives it.

    Args:
        index: 0 for the level that the input enters.
        reverse: whether it reads from the last step to the first.
        cell: the cell.
        weight_ih: input weights, (gates · hidden, input size).
        bias_ih: their bias, or None.
    """

    index: int
    reverse: bool
    cell: Cell
    weight_ih: Tensor
    bias_ih: Tensor | None = None

    @property
    def name(self) -> str:
        """PyTorch's suffix for its parameters: `l0`, `l1_reverse`, ..."""
        return f"l{self.index}" + ("_reverse" if self.reverse else "")

    def drive(self, x: Tensor) -> Tensor:
        """Return W_ih x + b_ih for any number of steps and samples."""
        return nn.functional.linear(x, self.weight_ih, self.bias_ih)


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 if a tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def first_state(cell: Cell, x: Tensor, state: State | None, place: int) -> State:
    """Return the state that a level begins with: zeros, or its own of the states of all levels."""
    if state is None:
        return tuple(x.new_zeros(x.shape[1], size) for size in cell.sizes)
    return tuple(part[place] for part in state)


def levels_of(module: nn.RNNBase, dtype: torch.dtype | None = None) -> tuple[Level, ...]:
    """Return the levels of a recurrent layer, forward before reverse, as they are now.

    The weights are taken by name, so parametrised ones (weight norm) come as computed. They are detached.

    Args:
        module: an `nn.RNN`, `nn.LSTM` or `nn.GRU`.
        dtype: to compute in; by default the weights', at least float32.

    >>> [level.name for level in levels_of(nn.GRU(3, 4, num_layers=2, bidirectional=True))]
    ['l0', 'l0_reverse', 'l1', 'l1_reverse']
    """
    named = _weights(module, module._flat_weights_names)
    dtype = dtype or work_dtype(*named.values())
    kind = KINDS[module.mode]
    found = []
    for index in range(module.num_layers):
        for reverse in (False, True) if module.bidirectional else (False,):
            suffix = f"l{index}" + ("_reverse" if reverse else "")
            parts = {
                part: named[f"{part}_{suffix}"].to(dtype) if f"{part}_{suffix}" in named else None
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            }
            found.append(_level(kind, parts, index, reverse))
    return tuple(found)


def level_of_cell(module: nn.RNNCellBase, dtype: torch.dtype | None = None) -> Level:
    """Return the one level of an `nn.RNNCell`, `nn.LSTMCell` or `nn.GRUCell`, as it is now; as `levels_of`.

    >>> level_of_cell(nn.LSTMCell(3, 4)).cell.sizes
    (4, 4)
    """
    weights = _weights(module, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    dtype = dtype or work_dtype(*weights.values())
    gated = "lstm" if isinstance(module, nn.LSTMCell) else "gru" if isinstance(module, nn.GRUCell) else ""
    kind = gated or str(getattr(module, "nonlinearity", ""))
    return _level(kind, {part: w.to(dtype) for part, w in weights.items()}, 0, False)


@exclusive()
def _weights(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return a module's weights by name, detached; parametrised ones are computed without side effects."""
    parametrized = nn.utils.parametrize.is_parametrized(module)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        Setting.of(module).evaluating() if parametrized else contextlib.nullcontext(),
    ):
        found = {name: getattr(module, name, None) for name in names}
        plain = {name: w.detach() for name, w in found.items() if w is not None}
        return {name: w.clone() if w.is_inference() else w for name, w in plain.items()}


def _level(kind: str, parts: Mapping[str, Tensor | None], index: int, reverse: bool) -> Level:
    weight_hh, weight_ih = parts.get("weight_hh"), parts.get("weight_ih")
    assert weight_hh is not None
    assert weight_ih is not None
    bias_hh, weight_hr = parts.get("bias_hh"), parts.get("weight_hr")
    cell = Cell(kind=kind, weight_hh=weight_hh, bias_hh=bias_hh, weight_hr=weight_hr)
    return Level(index=index, reverse=reverse, cell=cell, weight_ih=weight_ih, bias_ih=parts.get("bias_ih"))
