"""Looks from inside and from beside, and what must be the same in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from gradflow.functional.analyze import analyzed
from gradflow.functional.inside.look import InsideLook
from gradflow.functional.inside.passes import Passes
from gradflow.functional.run.run import Plan
from gradflow.records import FlowRecord
from tests.functional.inside.loops import MODELS


def pictures() -> nn.Module:
    """Return a model that gives the same at every call: its dropout hands its input on."""
    model = MODELS["pictures"]()
    model.net[5].p = 0.0
    return model


def beside(model: nn.Module, *batches: Any, **options: Any) -> FlowRecord:
    plan = Plan(steps=len(batches), mode="keep", **options)
    return analyzed(model, list(batches), F.cross_entropy, plan)


def looked(
    model: nn.Module, *losses: Callable[[Passes], Tensor], scale: float = 1.0
) -> tuple[FlowRecord, Passes]:
    look = InsideLook.of(model)
    with look.listening(lambda: scale) as passes:
        for loss in losses:
            loss(passes).backward()
    assert passes.failed == ""
    return look.record(), passes


def check_layers(one: FlowRecord, other: FlowRecord, without: set[str], rtol: float) -> None:
    assert [layer.name for layer in one] == [layer.name for layer in other]
    for a, b in zip(one, other, strict=True):
        same = ("module", "type", "order", "parameters", "shape", "inputs_differentiable", "composite")
        assert [getattr(a, name) for name in same] == [getattr(b, name) for name in same], a.name
        for name in ("output_rms", "output_zero_share", "output_variation", "input_rms", "num_elements"):
            bound = 10 * rtol if name == "output_variation" else rtol  # a difference of two numbers
            np.testing.assert_allclose(
                getattr(a, name), getattr(b, name), rtol=bound, err_msg=f"{a.name} {name}"
            )
        if a.name not in without:
            np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=rtol, err_msg=a.name)
            assert (a.reached == b.reached).all()


def check_parameters(one: FlowRecord, other: FlowRecord, rtol: float) -> None:
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert (a.name, a.layer, a.shape, a.reached.tolist()) == (
            b.name,
            b.layer,
            b.shape,
            b.reached.tolist(),
        )
        for name in ("grad_norm", "grad_zero_share", "norm"):
            np.testing.assert_allclose(
                getattr(a, name), getattr(b, name), rtol=rtol, err_msg=f"{a.name} {name}"
            )
