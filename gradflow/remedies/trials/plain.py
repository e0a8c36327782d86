"""A run of a trial that is not measured: what the loss comes to, at the cost of the training itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradflow.functional.model.batches import invoke, make_objective, prepared
from gradflow.functional.model.optimizers import clip_gradients
from gradflow.functional.model.purity import preserved, seed_all
from gradflow.functional.model.threads import exclusive, uncompiled
from gradflow.functional.model.trees import same_device
from gradflow.functional.run.measure import set_mode
from gradflow.functional.run.run import Plan
from gradflow.functional.tap.sums import magnitudes
from gradflow.records import Floats


def plain_losses(
    model: nn.Module, draw: Callable[[], Any], loss_fn: Any, optimizer: Optimizer, plan: Plan
) -> Floats:
    """Return the loss of every step of a training, as a measured run of the same plan has them.

    As there, a step whose loss or gradient is not finite is left out, and those behind it are made.

    Args:
        model: a copy of one's own, which is trained.
        draw: returns the next batch.
        loss_fn: as for `gradflow.diagnose`.
        optimizer: of the copy; one that steps without a closure.
        plan: its steps, seed, mode, clipping and progress count.

    Returns:
        Shape (steps,).
    """
    objective, device = make_objective(loss_fn), same_device(model)
    losses = np.empty(plan.steps)
    with exclusive(), preserved(), uncompiled(), torch.inference_mode(False), torch.enable_grad():
        set_mode(model, plan.mode)
        seed_all(plan.seed or 0)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(plan.steps):
            batch = prepared(draw(), device)
            optimizer.zero_grad()
            loss = objective.loss(invoke(model, objective.inputs(batch)), batch)
            loss.backward()
            losses[step] = float(loss.detach())
            gradients = [p.grad for p in held if p.grad is not None]
            if np.isfinite(losses[step]) and _are_finite(gradients):
                if plan.loop.clip is not None:
                    clip_gradients(gradients, plan.loop.clip)
                optimizer.step()
            if plan.progress is not None:
                plan.progress(step + 1, plan.steps)
    return losses


def _are_finite(gradients: list[Tensor]) -> bool:
    """Whether all numbers of some tensors are; sums of squares tell it fast, unless they overflow."""
    fast = all(math.isfinite(size.item()) for size in magnitudes(gradients))
    return fast or bool(torch.nn.utils.get_total_norm(gradients).isfinite())
