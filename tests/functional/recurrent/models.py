"""Recurrent layers of every kind, and the same layers as slow loops over PyTorch's own cells.

The loops are the reference that the unrolled layers are held against: they share no code with them. `Loop` is
the model that has such a loop in its forward pass, and `measured` the record of a run of any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.functional import recurrence
from gradflow.records import FlowRecord, RecurrenceRecord

CELLS: dict[str, type[nn.RNNCellBase]] = {
    "RNN_TANH": nn.RNNCell, "RNN_RELU": nn.RNNCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell,
}  # fmt: skip

LAYERS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "lstm, no bias": (nn.LSTM, {"bias": False}),
    "gru, no bias": (nn.GRU, {"bias": False}),
}


def layer(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
    """Return a seeded layer of 3 inputs and 4 units."""
    torch.manual_seed(seed)
    kind, own = LAYERS[name]
    return kind(3, 4, **own, **options).to(dtype)


def cells_of(module: nn.RNNBase) -> list[nn.RNNCellBase]:
    """Return PyTorch's cells with a layer's weights, in its order."""
    found = []
    for index in range(module.num_layers):
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            weight = getattr(module, f"weight_ih_l{index}{suffix}")
            options = {"nonlinearity": "relu"} if module.mode == "RNN_RELU" else {}
            cell = CELLS[module.mode](weight.shape[1], module.hidden_size, bias=module.bias, **options)
            cell = cell.to(weight.dtype)
            with torch.no_grad():
                for name, parameter in cell.named_parameters():
                    parameter.copy_(getattr(module, f"{name}_l{index}{suffix}"))
            found.append(cell)
    return found


def looped(module: nn.RNNBase, x: Tensor, hx: Any = None) -> tuple[Tensor, Any, list[list[Tensor]]]:
    """Run a layer without dropout, time first, as loops over cells.

    Returns:
        What the layer returns, and by level and direction the h of every step, in the order of the sequence.
    """
    cells, directions = cells_of(module), 2 if module.bidirectional else 1
    lstm = isinstance(module, nn.LSTM)
    entering, every, last = x, [], []
    for index in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            place = index * directions + direction
            cell = cells[place]
            if hx is None:
                zeros = x.new_zeros(x.shape[1], module.hidden_size)
                state: Any = (zeros, zeros) if lstm else zeros
            else:
                state = (hx[0][place], hx[1][place]) if lstm else hx[place]
            steps: list[Any] = [None] * len(x)
            for t in reversed(range(len(x))) if direction else range(len(x)):
                state = cell(entering[t], state)
                steps[t] = state[0] if lstm else state
            every.append(steps)
            last.append(state)
            outputs.append(torch.stack(steps))
        entering = torch.cat(outputs, -1)
    h_n: Any = torch.stack([s[0] if lstm else s for s in last])
    if lstm:
        h_n = (h_n, torch.stack([s[1] for s in last]))
    return entering, h_n, every


def weighed(result: Any) -> Tensor:
    """Return a scalar of what a layer returns, in which every number has a weight of its own."""
    output, last = result
    parts = [output, *(last if isinstance(last, tuple) else (last,))]
    total = output.new_zeros(())
    for k, part in enumerate(parts):
        weights = torch.linspace(-1.0, 2.0, part.numel(), dtype=part.dtype).reshape(part.shape)
        total = total + (k + 1) * (weights * part).sin().sum()
    return total


KINDS = ["tanh", "relu", "lstm", "gru"]


def inputs(steps: int = 6, samples: int = 4, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, samples, 3, generator=generator, dtype=torch.float64).to(dtype)


def measured(model: nn.Module, batches: Any, loss: Callable[..., Tensor], **given: Any) -> FlowRecord:
    listens = given.pop("measurement", recurrence())
    given = {"steps": 1, "seed": 0, **given}
    return gf.analyze(model, batches, loss, measurements=[listens], **given)


def only(record: FlowRecord) -> RecurrenceRecord:
    (found,) = record.recurrences
    return found


def last_step(result: Any) -> Tensor:
    return result[0][-1].square().sum()


class Loop(nn.Module):
    """A loop over a cell with the weights of a one-level layer; returns every h, and the last state."""

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        kinds = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}
        options = {"nonlinearity": "relu"} if module.mode == "RNN_RELU" else {}
        self.cell = kinds.get(module.mode, nn.RNNCell)(module.input_size, module.hidden_size, **options)
        self.cell.to(module.weight_ih_l0.dtype)
        with torch.no_grad():
            for name, parameter in self.cell.named_parameters():
                parameter.copy_(getattr(module, f"{name}_l0"))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, steps = None, []
        for step in x:
            state = self.cell(step, state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(steps), state
