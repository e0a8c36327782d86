"""Subnormal numbers taken for zeros for a while, and the setting put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gradflow.functional.reverse.flushing import flushes, flushing


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("before", [False, True])
def test_the_setting_is_put_back(before: bool) -> None:
    torch.set_flush_denormal(before)
    with flushing():
        assert float(torch.tensor(1e-38) * 0.01) == 0.0
    assert flushes() is before
    with pytest.raises(ValueError, match="stop"), flushing():
        raise ValueError("stop")
    assert flushes() is before
    assert bool(float(torch.tensor(1e-38) * 0.01)) is not before
