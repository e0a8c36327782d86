"""Questions to masks and labels: every form gives what the plain one does."""

from __future__ import annotations

import collections

import pytest
import torch

from gradflow.functional.reach import masks

SHAPES = [(0,), (1,), (), (7, 5), (3, 1, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [1, 3, 40])
def test_numbers_of_labels(shape: tuple[int, ...], most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, most, shape, generator=generator).to(torch.int16)
    where = torch.rand(shape, generator=generator) > 0.5
    plain = collections.Counter(labels.flatten().tolist())
    assert masks.number_of_each(labels) == dict(sorted(plain.items()))
    chosen = collections.Counter(labels[where].flatten().tolist())
    assert masks.number_of_each(labels, where) == dict(sorted(chosen.items()))
    for label in plain:
        assert torch.equal(masks.is_label(labels, label), labels == label)


@pytest.mark.parametrize("shape", SHAPES)
def test_questions_to_masks(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    for given in (mask, mask.mT if mask.dim() > 1 else mask):
        assert masks.some(given) == bool(given.any())
        assert masks.number(given) == int(given.sum())
        assert torch.equal(masks.places(given), given.reshape(-1).nonzero().reshape(-1))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
)
def test_zeros(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, 1.0, float("nan"), float("inf")]).to(dtype)
    assert torch.equal(masks.is_zero(x), x == 0)
    assert torch.equal(masks.is_zero(x[0]), x[0] == 0)
