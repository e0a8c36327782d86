"""What to change in a recurrent layer that loses, or blows up, the gradient over time."""

from __future__ import annotations

import math

from gradflow.records import RecurrenceRecord, RecurrentLevelRecord

Actions = tuple[str, ...]


def fading_actions(r: RecurrenceRecord, level: RecurrentLevelRecord, steps: int) -> Actions:
    """For a layer most of whose steps are out of the loss's reach."""
    layer = r.name or "model"
    if r.kind == "lstm":
        first = (
            f"Start it with open forget gates: {_keep_bias(r, level, steps)}.",
            "If it does not learn so, start its input gates (the first hidden_size of that bias) nearly "
            "shut, at -2 or at minus the same: what many steps write drowns what is to be kept.",
        )
    elif r.kind == "gru":
        first = (f"Start it with update gates that hold on to the state: {_keep_bias(r, level, steps)}.",)
    else:
        other = "nn.GRUCell or nn.LSTMCell" if r.loop else "nn.GRU or nn.LSTM"
        first = (
            f"Use {other} for {layer}: their gates can carry a state over many steps.",
            "Or start its recurrent weights orthogonal, or the identity, which keep the norm of the state.",
        )
    return (
        *first,
        "Or give each step a short way to the loss: read every step (a mean or a maximum over time, "
        "attention), or read in both directions.",
        f"Or shorten the {steps} steps: a stride, patches, or the part that matters alone.",
    )


def closed_actions(r: RecurrenceRecord, level: RecurrentLevelRecord, steps: int) -> Actions:
    """For a keeping gate that is closed."""
    return (
        f"Start its bias higher: {_keep_bias(r, level, steps)}.",
        "If training has closed it: lower the learning rate, or clip the gradient.",
    )


def amplifying_actions(r: RecurrenceRecord, level: RecurrentLevelRecord) -> Actions:
    """For a layer in which the gradient grows over time."""
    weight = f"{r.name or 'model'}.weight_hh{_suffix(r, level)}"
    blocks = " (each gate's block by itself)" if r.kind in ("lstm", "gru") else ""
    gates = () if blocks else ("Or use a gated layer (GRU, LSTM): what its gates keep cannot grow.",)
    return (
        f"Start its recurrent weights smaller or orthogonal: nn.init.orthogonal_({weight}){blocks}.",
        *gates,
        "Clip the gradient: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).",
        "Or truncate the back-propagation: detach the state every so many steps.",
    )


def stuck_actions(r: RecurrenceRecord, level: RecurrentLevelRecord, gate: str, entering: float) -> Actions:
    """For a gate that is stuck."""
    layer, suffix = r.name or "model", _suffix(r, level)
    scale = (
        f"Standardise what enters {layer} (rms {entering:.3g}): subtract the mean, divide by the standard "
        "deviation, feature by feature; or put a norm layer before it."
    )
    weights = (
        f"Start the {gate} part of its weights and biases (weight_ih{suffix}, weight_hh{suffix}, "
        f"bias_ih{suffix}, bias_hh{suffix}) smaller: PyTorch draws them within ±1/sqrt(hidden size)."
    )
    return (scale, weights) if math.isfinite(entering) and entering > 10 else (weights, scale)


def _suffix(r: RecurrenceRecord, level: RecurrentLevelRecord) -> str:
    return "" if r.loop else f"_{level.level}"


def _keep_bias(r: RecurrenceRecord, level: RecurrentLevelRecord, steps: int) -> str:
    """Return the code after which a gated layer keeps its state for about so many steps."""
    layer = r.module or "model"
    bias = round(math.log(max(steps, 3) - 1), 1)  # its sigmoid is 1 - 1 / steps
    part = f"{layer}.bias_ih{_suffix(r, level)}.data[{layer}.hidden_size:2 * {layer}.hidden_size]"
    return f"{part}.fill_({bias}), at which a gate keeps a third over {steps} steps"
