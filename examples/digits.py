"""The data of the examples: 1 797 handwritten digits of 8 × 8 pixels, standardised, in batches of 64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, TensorDataset

import gradflow as gf

NUM_PIXELS, NUM_CLASSES = 64, 10


def batches() -> DataLoader:
    """Return a loader of (pixels, digit) batches in an order that is the same every time."""
    pixels, digits = load_digits(return_X_y=True)
    pixels = torch.tensor(StandardScaler().fit_transform(pixels), dtype=torch.float32)
    data = TensorDataset(pixels, torch.tensor(digits))
    return DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))


def compare(build: Callable[[], tuple[Any, ...]], repaired: Callable[[], tuple[Any, ...]]) -> None:
    """Print what gradflow says of a sick model and of its repair."""
    for name, builder in (("sick", build), ("repaired", repaired)):
        model, data, loss_fn, *optimizer = builder()
        report = gf.diagnose(model, data, loss_fn, optimizer=optimizer[0] if optimizer else None, seed=0)
        print(f"{name}: {'no illness found' if report.ok else 'sick'}")
        for cause in report.causes:
            print(f"  cause: {cause.issue_type.value} in {cause.layer}: {cause.mechanism}")
        for issue in report.issues:
            print(f"  issue: {issue.severity.value} {issue.issue_type.value} in {issue.layer}")
