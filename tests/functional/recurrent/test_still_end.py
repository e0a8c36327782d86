"""How long the input stays the same up to the last step that is read, against one loop over samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gradflow.functional.recurrent.cotangents import still_end


def naive(x: Tensor, read: np.ndarray) -> float:
    lengths, ends = [], []
    for n in range(x.shape[1]):
        places = [t for t in range(len(x)) if read[t, n]]
        if not places:
            continue
        at = places[-1]
        length = 0
        while length <= at and torch.equal(x[at - length, n], x[at, n]):
            length += 1
        lengths.append(length)
        ends.append(x[at, n])
    if len(lengths) < 2:
        return math.nan
    longest = ends[lengths.index(max(lengths))]
    shared = [length if torch.equal(end, longest) else 0 for length, end in zip(lengths, ends, strict=True)]
    return float(np.median(shared)) if sum(torch.equal(end, longest) for end in ends) >= 2 else 0.0


@pytest.mark.parametrize("seed", range(12))
def test_it_is_what_a_loop_counts(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(1 + seed % 3, (9, 5, 1 + seed % 2), generator=g).float()
    if seed % 4:
        x[4:] = 0.0
    read = (torch.rand(9, 5, generator=g) < 0.2).numpy()
    found, expected = still_end(x, read), naive(x, read)
    assert found == expected or (math.isnan(found) and math.isnan(expected))
