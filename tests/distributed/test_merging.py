"""Fields of several processes' records, as one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradflow.functional import effective_rank
from gradflow.functional.reverse.ranks import gram_matrix, packed, rank_of, rank_of_packed
from gradflow.functional.run.together.facts import fingerprint
from gradflow.functional.run.together.merging import merged
from gradflow.records import AttentionGradients, ExponentHistogram, KnowledgeRecord, SubnormalRecord


def gradients(query: float, norm: float) -> AttentionGradients:
    one = np.array([1.0])
    return AttentionGradients(
        at="tensors", query_norm=np.array([norm]), key_norm=one, value_norm=one,
        query_grad=np.array([query]), key_grad=one, value_grad=one, output_grad=one,
    )  # fmt: skip


def test_norms_are_roots_of_sums_of_squares_and_those_of_gradients_a_mean() -> None:
    found = merged([gradients(3.0, 6.0), gradients(4.0, 8.0)])
    assert found.query_grad.tolist() == [2.5]  # of (L1 + L2) / 2
    assert found.query_norm.tolist() == [10.0]


def test_records_of_one_name_belong_together() -> None:
    a = [SubnormalRecord(layer=name, dtype="float32", num_elements=2, num_subnormal=1) for name in "ab"]
    b = [SubnormalRecord(layer=name, dtype="float32", num_elements=4, num_subnormal=0) for name in "bc"]
    found = merged([tuple(a), tuple(b)])
    assert [(r.layer, r.num_elements, r.num_subnormal) for r in found] == [
        ("a", 2, 1), ("b", 6, 1), ("c", 4, 0)
    ]  # fmt: skip


def test_means_extremes_counts_and_what_is_unknown() -> None:
    a = KnowledgeRecord(step=3, loss=1.0, silent=float("nan"), num_samples=2, scales=[3.0])
    b = KnowledgeRecord(step=3, loss=2.0, silent=5.0, num_samples=4, scales=[4.0])
    found = merged([a, b])
    assert (found.step, found.loss, found.silent, found.num_samples) == (3, 1.5, 5.0, 6)
    assert found.scales == pytest.approx([12.5**0.5])
    assert merged([None, None]) is None
    assert merged([None, a]) == a


def test_histograms_add_up_bin_by_bin() -> None:
    def histogram(bins: list[int], counts: list[list[int]]) -> ExponentHistogram:
        return ExponentHistogram(
            dtype="float32", num_elements=np.array([sum(counts[0])]), num_zero=np.array([0]),
            num_infinite=np.array([0]), bins=bins, counts=np.array(counts),
        )  # fmt: skip

    found = merged([histogram([1, 5], [[2, 3]]), histogram([5, 7], [[10, 1]])])
    assert found.bins == (1, 5, 7)
    assert found.counts.tolist() == [[2, 13, 1]]
    assert found.num_elements.tolist() == [16]


def test_the_rank_of_a_joined_batch_is_that_of_its_gram_matrices() -> None:
    gradient = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = torch.stack([gram_matrix(part, "Linear") for part in gradient.chunk(3)]).sum(0)
    assert rank_of(parts) == pytest.approx(effective_rank(gradient), rel=1e-9)
    singular = torch.linalg.svdvals(gradient).square()
    shares = singular / singular.sum()
    assert rank_of(parts) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-9)
    assert np.isnan(rank_of(torch.zeros(3, 3)))
    assert packed(parts).numel() == 15
    assert rank_of_packed(packed(parts)) == rank_of(parts)


def test_of_many_features_random_combinations_tell_the_rank() -> None:
    random = torch.Generator().manual_seed(0)
    thin = torch.randn(40, 3, generator=random) @ torch.randn(3, 600, generator=random)
    assert gram_matrix(thin, "Linear", most=64).shape == (64, 64)
    assert rank_of(gram_matrix(thin, "Linear", most=64)) == pytest.approx(effective_rank(thin), rel=0.1)


def test_a_fingerprint_tells_one_bit_and_the_order() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[500] = torch.nextafter(other[500], torch.tensor(10.0))
    assert fingerprint(x) == fingerprint(x.clone())
    assert fingerprint(x) != fingerprint(other)
    assert fingerprint(x) != fingerprint(x.flip(0))
