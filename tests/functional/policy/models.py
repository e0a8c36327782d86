"""The record of a policy, the norm by hand that it is held against, and distributions of several parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributions, nn

import gradflow as gf
from gradflow.functional import policy_heads
from gradflow.records import PolicyRecord
from tests.policies import batch

Categorical, Normal = distributions.Categorical, distributions.Normal


def measured(model: nn.Module, loss: Any, **names: Any) -> PolicyRecord:
    record = gf.analyze(model, lambda: batch().states, loss, steps=2, measurements=[policy_heads(**names)])
    assert record.policy is not None
    assert gf.FlowRecord.from_json(record.to_json()) == record
    return record.policy


def norm_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """Return the norm of a gradient by one plain backward pass, and the gradient in one row."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    row = torch.cat([g.flatten() for g in found if g is not None])
    return float(row.norm()), row


def mean_of(x: Tensor) -> float:
    return float(x.detach().mean())


def tanh_normal(mean: Tensor, log_std: Tensor) -> distributions.Distribution:
    base = distributions.Independent(Normal(mean, log_std.exp()), 1)
    return distributions.TransformedDistribution(base, [distributions.TanhTransform(cache_size=1)])


def mixture(mean: Tensor, log_std: Tensor) -> distributions.Distribution:
    parts = Normal(torch.stack([mean, -mean], -1), log_std.exp()[:, None].expand(*mean.shape, 2))
    return distributions.MixtureSameFamily(Categorical(logits=torch.zeros(*mean.shape, 2)), parts)
