"""The processes of a command that a launcher has started several times, as `torchrun` does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradflow.errors import ModelInputError
from gradflow.functional.processes.group import processes_of


@contextlib.contextmanager
def launched(options: Any, model: Any) -> Iterator[Any]:
    """Yield what the command passes as `processes`, for the length of its run.

    Where a launcher has started several processes (its environment variables say so), those that the model
    averages over, or all, whose parts of the batch the user's file draws. A process group is made where the
    file has made none, and ended with the command. The first process alone prints and writes.

    Args:
        options: of the command; those of what is printed and written are changed on all but the first.
        model: what the file has built.

    Raises:
        ModelInputError: if fixes are to be tried, which is done in one process.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1 or "RANK" not in os.environ:
        yield "auto"
        return
    if getattr(options, "tried", False):
        raise ModelInputError(
            f"fixes are tried on copies in one process, and {size} were started. Leave out --try, or run the "
            "command without the launcher."
        )
    if rank:
        vars(options).update(quiet=True, json=None, html=None, progress=False)
    own = not dist.is_initialized()
    if own:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        known = not isinstance(model, nn.Module) or processes_of(model).axes  # a stage knows its own
        yield "auto" if known else dist.group.WORLD
    finally:
        if own:
            dist.destroy_process_group()
