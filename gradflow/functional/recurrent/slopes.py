"""The derivative of a step of a recurrent cell in closed form: what it makes of tangents, and of gradients.

NOTE [Slopes of a step]
With u = W_hh h + b_hh, what the state before brings, every cell here is made of products unit by unit:

* plain: h' = φ(d + u), so dh' = φ' du;
* GRU: h' = (1 − z) n + z h, r = σ(d_r + u_r), z = σ(d_z + u_z), n = tanh(d_n + r u_n), so
  dh' = z dh + Σ_k S_k du_k with S_n = (1 − z)(1 − n²) r, S_r = (1 − z)(1 − n²) u_n r (1 − r) and
  S_z = (h − n) z (1 − z); at the drive the slopes are the same, but for that of n, which lacks the r;
* LSTM: c' = f c + i g, h' = o tanh c', so dc' = f dc + Σ_k S_k du_k with S_i = g i (1 − i),
  S_f = c f (1 − f) and S_g = i (1 − g²), and dh' = o (1 − tanh² c') dc' + tanh c' o (1 − o) du_o.

A Jacobian-vector product, or its transpose, is then one matrix product with W_hh and a few products of such
slopes, for any number of steps, samples and vectors at once: no graph is built, and nothing is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from gradflow.functional.recurrent.cells import Cell, State


@attrs.frozen(eq=False, kw_only=True)
class Slopes:
    """The derivative of a step, or of many; axes before those named here are of steps and samples.

    Args:
        cell: the cell.
        into: slopes of the part of the state that is carried (an LSTM's c) at u, (..., gates, hidden).
        keep: its slope at itself, (..., hidden); None for a plain cell.
        driven: slopes at the drive where they are others than those at u (a GRU); else None.
        at_c: of an LSTM, slope of its h, before a projection, at its c.
        at_o: and at what enters its output gate.
    """

    cell: Cell
    into: Tensor
    keep: Tensor | None = None
    driven: Tensor | None = None
    at_c: Tensor | None = None
    at_o: Tensor | None = None

    def push(self, v: State) -> State:
        """Return A v, A = ∂s'/∂s: what a tangent of the state becomes.

        Args:
            v: in the parts of the state, (..., size); further axes in front are of vectors.
        """
        u = nn.functional.linear(v[0], self.cell.weight_hh)
        u = u.unflatten(-1, (-1, self.into.shape[-1]))
        if self.at_c is None or self.at_o is None or self.keep is None:
            h = (self.into * u).sum(-2) if self.into.shape[-2] > 1 else (self.into * u).squeeze(-2)
            return (h if self.keep is None else torch.addcmul(h, self.keep, v[0]),)
        c = torch.addcmul((self.into * u[..., :3, :]).sum(-2), self.keep, v[1])
        h = torch.addcmul(self.at_c * c, self.at_o, u[..., 3, :])
        return (h if self.cell.weight_hr is None else nn.functional.linear(h, self.cell.weight_hr)), c

    def pull(self, w: State) -> tuple[State, Tensor]:
        """Return Aᵀ w, and the gradient at the drive: what a gradient at the state after comes from.

        Args:
            w: in the parts of the state, (..., size); further axes in front are of gradients.
        """
        weight = self.cell.weight_hh
        if self.at_c is None or self.at_o is None or self.keep is None:
            at_u = (w[0].unsqueeze(-2) * self.into).flatten(-2)
            if self.cell.kind == "relu":  # what is off hands on nothing, not 0 · inf
                at_u = torch.where(self.into.flatten(-2) > 0, at_u, 0.0)
            h = at_u @ weight if self.keep is None else torch.addcmul(at_u @ weight, w[0], self.keep)
            return (h,), at_u if self.driven is None else (w[0].unsqueeze(-2) * self.driven).flatten(-2)
        h = w[0] if self.cell.weight_hr is None else w[0] @ self.cell.weight_hr
        c = torch.addcmul(w[1], h, self.at_c)
        at_u = torch.cat([(c.unsqueeze(-2) * self.into).flatten(-2), h * self.at_o], -1)
        return (at_u @ weight, c * self.keep), at_u

    def steps(self) -> list[Slopes]:
        """Return those of each step, where the first axis is that of steps."""
        parts = [getattr(self, name) for name in _PARTS]
        rows = [[None] * len(self.into) if part is None else part.unbind(0) for part in parts]
        return [
            Slopes(cell=self.cell, **dict(zip(_PARTS, row, strict=True))) for row in zip(*rows, strict=True)
        ]

    @property
    def jacobian(self) -> Tensor:
        """A itself, (..., state size, state size); rows are of the next state."""
        size = sum(self.cell.sizes)
        eye = torch.eye(size, dtype=self.into.dtype, device=self.into.device)
        eye = eye.reshape(size, *[1] * (self.into.dim() - 2), size).expand(size, *self.into.shape[:-2], size)
        return torch.cat(self.push(tuple(eye.split(self.cell.sizes, -1))), -1).movedim(0, -1)


_PARTS = ("into", "keep", "driven", "at_c", "at_o")


def slopes_of(cell: Cell, gates: Mapping[str, Tensor], before: State, after: State) -> Slopes:
    """Return the derivative of steps that have been made.

    Args:
        cell: the cell.
        gates: its gates in these steps, by name, each (..., hidden).
        before: the state that entered them, each (..., size).
        after: the state that left them.
    """
    return _SLOPES[cell.kind](cell, gates, before, after)


def slopes_at(cell: Cell, drive: Tensor, state: State) -> tuple[State, Slopes]:
    """Return the next state, and the derivative of the step.

    Args:
        cell: the cell.
        drive: W_ih x + b_ih, (..., gates · hidden).
        state: (h,) or (h, c), each (..., size).
    """
    new, gates = cell(drive, state)
    return new, slopes_of(cell, gates, state, new)


def _plain(slope: Callable[[Tensor], Tensor]) -> Callable[..., Slopes]:
    def slopes(cell: Cell, gates: Mapping[str, Tensor], before: State, after: State) -> Slopes:
        return Slopes(cell=cell, into=slope(after[0]).unsqueeze(-2))

    return slopes


def _lstm(cell: Cell, gates: Mapping[str, Tensor], before: State, after: State) -> Slopes:
    i, f, g, o = (gates[name] for name in ("input", "forget", "candidate", "output"))
    tanh_c = torch.tanh(after[1])
    into = torch.stack([g * i * (1 - i), before[1] * f * (1 - f), i * (1 - g * g)], -2)
    return Slopes(cell=cell, into=into, keep=f, at_c=o * (1 - tanh_c * tanh_c), at_o=tanh_c * o * (1 - o))


def _gru(cell: Cell, gates: Mapping[str, Tensor], before: State, after: State) -> Slopes:
    r, z, n = (gates[name] for name in ("reset", "update", "candidate"))
    (h,), size = before, r.shape[-1]
    bias = None if cell.bias_hh is None else cell.bias_hh[2 * size :]
    u_n = nn.functional.linear(h, cell.weight_hh[2 * size :], bias)
    at_n = (1 - z) * (1 - n * n)
    first = [at_n * u_n * r * (1 - r), (h - n) * z * (1 - z)]
    return Slopes(
        cell=cell, into=torch.stack([*first, at_n * r], -2), keep=z, driven=torch.stack([*first, at_n], -2)
    )


_SLOPES: Mapping[str, Any] = {
    "tanh": _plain(lambda h: 1 - h * h),
    "relu": _plain(lambda h: (h > 0).to(h.dtype)),
    "identity": _plain(torch.ones_like),
    "lstm": _lstm,
    "gru": _gru,
}
