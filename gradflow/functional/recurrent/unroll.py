"""A recurrent layer unrolled step by step as a pure function, and ∂L/∂h_t at every step of it.

A fused kernel returns its output and its last states, and keeps the rest to itself. Unrolled with pure cells,
every state is a tensor of its own; given the gradients of what the kernel returned, one reverse pass gives
the gradient at every state, exactly: through all later steps, and through the levels above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from gradflow.errors import ModelInputError
from gradflow.functional.model.batches import checked_loss, detached_loss
from gradflow.functional.model.setting import Setting
from gradflow.functional.model.supported import check_plain
from gradflow.functional.model.threads import measuring
from gradflow.functional.model.trees import iter_tensors, wide_dtype
from gradflow.functional.recurrent.cells import Level, State, first_state, levels_of, work_dtype


@attrs.frozen(eq=False, kw_only=True)
class Layout:
    """How a layer's sequences and states lie in its tensors.

    Inside, a sequence is (steps, samples, features) and states are (levels, samples, size); samples are in
    the order of a packed sequence where there is one, longest first.

    Args:
        batched: whether there is an axis of samples.
        batch_first: whether it comes before that of steps.
        batch_sizes: of a packed sequence, or None.
        order: of a packed sequence: the sample that stands at each place; None for the given order.
    """

    batched: bool = True
    batch_first: bool = False
    batch_sizes: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, module: nn.RNNBase, x: Any) -> Layout:
        """Return the layout of a layer's input."""
        if isinstance(x, PackedSequence):
            return cls(batch_sizes=x.batch_sizes, order=x.sorted_indices)
        return cls(batched=x.dim() == 3, batch_first=module.batch_first)

    def steps(self, data: Tensor) -> Tensor:
        """Return a sequence (a packed one's data) as (steps, samples, features)."""
        if self.batch_sizes is not None:
            return pad_packed_sequence(PackedSequence(data, self.batch_sizes))[0]
        if not self.batched:
            return data.unsqueeze(1)
        return data.transpose(0, 1) if self.batch_first else data

    def states(self, h: Tensor) -> Tensor:
        """Return states as (levels, samples, size)."""
        if not self.batched:
            return h.unsqueeze(1)
        return h if self.order is None else h.index_select(1, self.order)

    @property
    def alive(self) -> Tensor | None:
        """Which steps belong to each sample, (steps, samples); None where all do."""
        if self.batch_sizes is None or bool((self.batch_sizes == self.batch_sizes[0]).all()):
            return None
        return torch.arange(int(self.batch_sizes[0])) < self.batch_sizes[:, None]


@attrs.frozen(eq=False, kw_only=True)
class Track:
    """One level in one direction, unrolled. Lists are in the order in which it reads the steps.

    Args:
        level: the level.
        drive: W_ih x + b_ih, (steps, samples, gates · hidden), in the order of the sequence.
        before: the state that enters each step.
        after: the state that leaves it; the gradient at these is ∂L/∂h_t (and ∂L/∂c_t).
        last: the state at the end of each sample.
        gates: the gates at each step, by name.
        alive: which steps count, (steps, samples); None where all do.
    """

    level: Level
    drive: Tensor
    before: list[State]
    after: list[State]
    last: State
    gates: list[dict[str, Tensor]]
    alive: Tensor | None


@attrs.frozen(eq=False, kw_only=True)
class Unrolled:
    """A recurrent layer, unrolled.

    Args:
        output: of the highest level, (steps, samples, directions · size).
        tracks: one per level and direction, in PyTorch's order.
    """

    output: Tensor
    tracks: tuple[Track, ...]

    @property
    def last(self) -> State:
        """The states at the end, each (levels, samples, size): h_n, and c_n for an LSTM."""
        parts = zip(*(track.last for track in self.tracks), strict=True)
        return tuple(torch.stack(part) for part in parts)


def unroll(
    levels: Sequence[Level],
    x: Tensor,
    state: State | None = None,
    *,
    alive: Tensor | None = None,
    between: Callable[[int, Tensor], Tensor] | None = None,
) -> Unrolled:
    """Return a recurrent layer's states at every step.

    Args:
        levels: of the layer, see `levels_of`.
        x: the input, (steps, samples, features).
        state: the first h (and c), each (levels, samples, size); zeros by default.
        alive: which steps belong to each sample, (steps, samples); None where all do.
        between: what becomes of the output of level `index` before it enters the next one (dropout).

    >>> lstm, x = nn.LSTM(3, 4, num_layers=2), torch.ones(5, 1, 3)
    >>> torch.allclose(unroll(levels_of(lstm), x).output, lstm(x)[0], atol=1e-6)
    True
    """
    tracks: list[Track] = []
    directions = 2 if any(level.reverse for level in levels) else 1
    entering = x
    for index in range(len(levels) // directions):
        outputs = []
        for level in levels[index * directions : (index + 1) * directions]:
            first = first_state(level.cell, x, state, len(tracks))
            tracks.append(_track(level, entering, first, alive))
            steps = [h for h, *_ in tracks[-1].after]
            outputs.append(torch.stack(steps[::-1] if level.reverse else steps))
        entering = torch.cat(outputs, -1)
        if between is not None and (index + 1) * directions < len(levels):
            entering = between(index, entering)
    return Unrolled(output=entering, tracks=tuple(tracks))


def _track(level: Level, x: Tensor, state: State, alive: Tensor | None) -> Track:
    """Run one level over the sequence. Where a sample has ended (or, in reverse, not begun) its state stays.

    An LSTM's c leaves a step as a view, so that the gradient at it, as at an output of the step, comes from
    later steps alone, and not through the h of the same step.
    """
    drive = level.drive(x)
    if alive is not None and level.reverse:
        alive = alive.flip(0)
    before, after, gates = [], [], []
    for t, step in enumerate(drive.flip(0) if level.reverse else drive):
        before.append(state)
        (h, *c), found = level.cell(step, state)
        new = (h, *(part.view_as(part) for part in c))
        after.append(new)
        gates.append({name: gate.detach() for name, gate in found.items()})
        if alive is None:
            state = new
        else:
            here = alive[t][:, None]
            state = tuple(torch.where(here, n, old) for n, old in zip(new, state, strict=True))
    return Track(level=level, drive=drive, before=before, after=after, last=state, gates=gates, alive=alive)


@attrs.frozen(eq=False, kw_only=True)
class TrackGradients:
    """Gradients at one track. `h` and `c` are in the order in which it reads, `drive` in the sequence's.

    Args:
        h: ∂L/∂h_t, (steps, samples, size).
        c: ∂L/∂c_t, the same; None where there is no c.
        drive: ∂L/∂d_t of its drive, (steps, samples, gates · hidden).
    """

    h: Tensor
    c: Tensor | None
    drive: Tensor

    @property
    def norms(self) -> Tensor:
        """‖∂L/∂h_t‖ of every sample, (steps, samples), float64."""
        return _norm(self.h)

    @property
    def state_norms(self) -> Tensor:
        """‖∂L/∂s_t‖, s = h or (h, c), of every sample, (steps, samples), float64."""
        return self.norms if self.c is None else torch.hypot(self.norms, _norm(self.c))


def _norm(tensor: Tensor) -> Tensor:
    wide = wide_dtype(tensor.device)
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=wide).cpu().double()


def track_gradients(
    unrolled: Unrolled, output: Tensor | None, last: Sequence[Tensor | None] = ()
) -> tuple[TrackGradients, ...]:
    """Return the gradient at every state of an unrolled layer; its graph is kept.

    Args:
        unrolled: what `unroll` gave for an input that requires a gradient.
        output: ∂L/∂output, shaped as `unrolled.output`; None for zero.
        last: ∂L/∂h_n, and ∂L/∂c_n, shaped as `unrolled.last`; None for zero.
    """
    values = [unrolled.output, *unrolled.last]
    given = [output, *last, *[None] * (len(values) - 1 - len(last))]
    pairs = [(v, g) for v, g in zip(values, given, strict=True) if g is not None]
    taps = [[t.drive, *(part for state in t.after for part in state)] for t in unrolled.tracks]
    flat = [tensor for tap in taps for tensor in tap]
    found: list[Tensor | None] = [None] * len(flat)
    if pairs:
        found = list(
            torch.autograd.grad(
                [v for v, _ in pairs], flat, [g for _, g in pairs], retain_graph=True, allow_unused=True
            )
        )
    filled = iter(torch.zeros_like(t) if g is None else g for t, g in zip(flat, found, strict=True))
    gradients = []
    for track in unrolled.tracks:
        drive = next(filled)
        states = [[next(filled) for _ in state] for state in track.after]
        parts = [torch.stack(part) for part in zip(*states, strict=True)]
        gradients.append(TrackGradients(h=parts[0], c=parts[1] if len(parts) > 1 else None, drive=drive))
    return tuple(gradients)


@measuring()
def hidden_gradients(
    module: nn.RNNBase, x: Tensor, loss_fn: Callable[..., Tensor], hx: Any = None
) -> dict[str, Tensor]:
    """Return ∂L/∂h_t at every step, level and direction of a recurrent layer: the total derivative.

    Pure: everything of the layer's, of the modules that the loss holds, and every random state is put back.
    What `torch.autograd.grad` would give with respect to h_t, were the layer written as a loop: along every
    path from h_t to the loss, through all later steps and the levels above. Dropout between levels is off.

    Args:
        module: an `nn.RNN`, `nn.LSTM` or `nn.GRU`; it is left as it is.
        x: its input, as the layer takes it; no packed sequence.
        loss_fn: from what the layer returns, (output, h_n) or (output, (h_n, c_n)), to a scalar.
        hx: its first state, as the layer takes it; zeros by default.

    Returns:
        By level (`l0`, `l0_reverse`, ...), ∂L/∂h_t in the order of the sequence, (steps, samples, size).

    Raises:
        ModelInputError: if `module` is no recurrent layer, or `x` no tensor.
        LossError: if the loss is no scalar or carries no gradient.

    >>> rnn = nn.RNN(2, 3)
    >>> gradients = hidden_gradients(rnn, torch.ones(4, 1, 2), lambda result: result[0].sum())
    >>> gradients["l0"].shape, gradients["l0"][-1].tolist()
    (torch.Size([4, 1, 3]), [[1.0, 1.0, 1.0]])
    """
    if not isinstance(module, nn.RNNBase) or not isinstance(x, Tensor):
        raise ModelInputError(
            f"hidden_gradients: expected an nn.RNN, nn.LSTM or nn.GRU and its input tensor, got "
            f"{type(module).__name__} and {type(x).__name__}. For a whole model, or packed sequences, use "
            "`gradflow.analyze(..., measurements=[gradflow.functional.recurrence()])`."
        )
    check_plain([x, *iter_tensors(hx)])
    layout, levels = Layout.of(module, x), levels_of(module)
    dtype = work_dtype(x, levels[0].weight_ih)
    setting = Setting.of(nn.Module(), loss_fn)
    with torch.inference_mode(False), torch.enable_grad():
        state = given_state(layout, hx, dtype)
        entering = layout.steps(x.detach().clone()).to(dtype).requires_grad_()
        unrolled = unroll(levels_of(module, dtype), entering, state)
        output, *last = (t.detach().requires_grad_() for t in (unrolled.output, *unrolled.last))
        h_n = [h if layout.batched else h.squeeze(1) for h in last]
        shown = layout.steps(output) if layout.batched else output.squeeze(1)  # its own inverse
        with setting.evaluating():
            loss = checked_loss(loss_fn((shown, tuple(h_n) if len(h_n) > 1 else h_n[0])))
            if not loss.requires_grad:
                raise detached_loss()
            cotangents = torch.autograd.grad(loss, [output, *last], allow_unused=True)
        found = track_gradients(unrolled, cotangents[0], cotangents[1:])
    return {
        track.level.name: gradient.h.flip(0) if track.level.reverse else gradient.h
        for track, gradient in zip(unrolled.tracks, found, strict=True)
    }


def given_state(layout: Layout, hx: Any, dtype: torch.dtype) -> State | None:
    """Return a first state as the levels take it, detached; None where none was given."""
    if hx is None:
        return None
    parts = hx if isinstance(hx, (tuple, list)) else (hx,)
    return tuple(layout.states(part.detach().clone()).to(dtype) for part in parts)
