"""What all tests of hostile models share: one thread, a seed before each, and a group of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed import HashStore

from tests.functional.conftest import one_thread, seeded

__all__ = ["group", "one_thread", "seeded"]


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
