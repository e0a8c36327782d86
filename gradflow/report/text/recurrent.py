"""What recurrent layers do over time, as a table of plain text."""

from __future__ import annotations

from gradflow.records import ReservoirDynamics

_COLUMNS = ("radius", "lyapunov", "steps", "memory", "recall", "lost")


def dynamics_text(dynamics: ReservoirDynamics) -> str:
    """Return a table of recurrent layers, a line for each level and direction; `-` for an unknown number.

    `radius` and `lyapunov` are of the state transition. `steps` is how many the gradient goes back; `memory`
    and `recall` are the two depths, and `lost` is the gradient decay rate.

    >>> print(dynamics_text(ReservoirDynamics.of(())))
    No recurrent layer was measured.
    """
    rows = []
    for name, layer in dynamics.layers.items():
        for level, found in layer.layers.items():
            several = f"{name}.{level}".lstrip(".") if len(layer.layers) > 1 else name
            rows.append((several or "(model)", found))
    if not rows:
        return "No recurrent layer was measured."
    width = max(len("recurrent"), *(len(name) for name, _ in rows))
    lines = ["  ".join(["recurrent".ljust(width), *(title.rjust(8) for title in _COLUMNS)])]
    lines += [
        "  ".join([name.ljust(width), *(cell.rjust(8) for cell in _cells(found))]) for name, found in rows
    ]
    return "\n".join(lines)


def _cells(found: ReservoirDynamics) -> tuple[str, ...]:
    return (
        _number(found.spectral_radius),
        _number(found.lyapunov),
        str(len(found.gradient_profile)),
        str(found.memory_depth),
        str(found.recall_depth),
        _number(found.gradient_decay_rate),
    )


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}"
