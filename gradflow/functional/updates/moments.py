"""What an optimizer's state tells of its steps: second moments, ε and age, read by what the state holds.

NOTE [Read by its keys]
The class of an optimizer tells little: others derive from it, wrap it, or write it anew. What an adaptive
optimizer keeps has names that nearly all agree on, those of PyTorch, so the state is read by them:

| key | of | v̂ |
| --- | --- | --- |
| `exp_avg_sq` | Adam, AdamW, NAdam, RAdam, SparseAdam | `exp_avg_sq` / (1 − β₂ᵗ) |
| `max_exp_avg_sq` | the same with `amsgrad` | `max_exp_avg_sq` / (1 − β₂ᵗ) |
| `exp_inf` | Adamax | `exp_inf`² |
| `square_avg` | RMSprop | `square_avg`, with `grad_avg` less its square |
| `square_avg`, `acc_delta` | Adadelta | `square_avg`, whose ε stands under the root |
| `sum` | Adagrad | `sum` |
| `row_var`, `col_var` | Adafactor | row · column / mean of rows |
| `exp_avg_sq_row`, `exp_avg_sq_col` | Adafactor of `transformers` | the same |
| `variance` | Adafactor, of vectors | `variance` |

Sources: Kingma & Ba 2015 (Adam, Adamax), Loshchilov & Hutter 2019 (AdamW), Reddi et al. 2018 (AMSGrad), Dozat
2016 (NAdam), Liu et al. 2020 (RAdam), Shazeer & Stern 2018 (Adafactor), Zeiler 2012 (Adadelta).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Moments:
    """What an optimizer knows of one parameter.

    Args:
        kept: the running mean of squared gradients that it keeps, of the parameter's shape; None without.
        correction: what its step divides that by, for the mean having started at zero.
        epsilon: what √v̂ is compared with; NaN where there is none.
        age: how many steps the state has seen; NaN where it does not count.
    """

    kept: Tensor | None
    correction: float
    epsilon: float
    age: float

    @property
    def second(self) -> Tensor | None:
        """v̂, as the last step divided by it."""
        return None if self.kept is None else self.kept / self.correction


def moments(state: Mapping[str, Any], group: Mapping[str, Any], dtype: torch.dtype) -> Moments:
    """Return what an optimizer's state tells of one parameter; see NOTE [Read by its keys].

    Args:
        state: `optimizer.state[p]`, after the step.
        group: the parameter group that holds p.
        dtype: of p.

    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> adam = torch.optim.Adam([p])
    >>> adam.step()
    >>> moments(adam.state[p], adam.param_groups[0], p.dtype).second    # after one step: g²
    tensor([ 9.0000, 16.0000])
    """
    age = age_of(state)
    corrected = isinstance(state.get("exp_avg_sq"), Tensor)
    correction = _correction(group, age) if corrected else 1.0
    return Moments(_kept(state), correction, _epsilon(state, group, dtype), age)


def age_of(state: Mapping[str, Any]) -> float:
    """Return how many steps an optimizer's state of a parameter has seen; NaN where it does not count."""
    return _number(state.get("step"))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _kept(state: Mapping[str, Any]) -> Tensor | None:
    known = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    for rows, columns in (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col")):
        if rows in known and columns in known:
            return _factored(known[rows], known[columns])
    if "exp_inf" in known:
        return known["exp_inf"].square()
    keys = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum", "variance")
    found = next((known[key] for key in keys if key in known), None)
    return found - known["grad_avg"].square() if found is not None and "grad_avg" in known else found


def _correction(group: Mapping[str, Any], age: float) -> float:
    """Return 1 − β₂ᵗ; 1 where the optimizer does not correct for its start."""
    betas = group.get("betas")
    corrects = group.get("correct_bias", group.get("bias_correction", True))
    if not corrects or not isinstance(betas, (tuple, list)) or not age >= 1:
        return 1.0
    return 1.0 - float(betas[1]) ** age


def _factored(rows: Tensor, columns: Tensor) -> Tensor:
    if rows.dim() == columns.dim() and rows.shape[-1:] == (1,):  # kept as matrices of one column and one row
        rows, columns = rows[..., 0], columns[..., 0, :]
    mean = rows.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return (rows / mean).unsqueeze(-1) * columns.unsqueeze(-2)


def _epsilon(state: Mapping[str, Any], group: Mapping[str, Any], dtype: torch.dtype) -> float:
    value = group.get("eps")
    if isinstance(value, (tuple, list)):  # Adafactor's pair, of which the first belongs to the gradient
        value = torch.finfo(dtype).eps if value[0] is None and dtype.is_floating_point else value[0]
        return math.sqrt(_number(value)) if "exp_avg_sq_row" in state else _number(value)
    return math.sqrt(_number(value)) if "acc_delta" in state else _number(value)
