"""What all tests of the engine share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread: on models this small, threads that wait for one another are most of the time."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch, so that no test depends on which ran before it."""
    torch.manual_seed(0)
