"""A batch, and an analysis of a model on it that is not run yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import gradflow as gf
from tests.models import squares

BATCH = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def run_of(model: nn.Module, **options: Any) -> Callable[[], gf.FlowRecord]:
    return lambda: gf.analyze(model, [BATCH] * 6, squares, steps=6, **options)
