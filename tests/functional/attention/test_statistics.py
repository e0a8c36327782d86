"""Statistics of attention weights: closed forms, slow naive versions, SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from gradflow.functional import (
    attention_entropy,
    attention_statistics,
    head_distances,
    position_residual,
)
from gradflow.functional.attention.statistics import finish, row_sums, sampled_rows


def drawn(*shape: int, sharp: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = sharp * torch.randn(*shape, generator=g, dtype=torch.float64)
    return logits.softmax(-1), logits


@pytest.mark.parametrize("keys", [2, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_attention_over_t_keys_has_entropy_ln_t(keys: int, dtype: torch.dtype) -> None:
    found = attention_statistics(torch.full((2, 3, 4, keys), 1 / keys, dtype=dtype))
    for value, expected in (
        (found.entropy, math.log(keys)),
        (found.entropy_share, 1.0),
        (found.max_weight, 1 / keys),
        (found.first_weight, 1 / keys),
        (found.slope, 1.0),
        (found.saturated_share, 0.0),
        (found.num_keys, keys),
    ):
        assert value.tolist() == pytest.approx([expected] * 3, abs=1e-6)


def test_one_hot_attention_has_entropy_0_and_passes_no_gradient() -> None:
    weights = torch.eye(5)[None, None].expand(2, 3, 5, 5)
    found = attention_statistics(weights)
    assert found.entropy.tolist() == found.entropy_share.tolist() == found.slope.tolist() == [0.0] * 3
    assert found.saturated_share.tolist() == found.max_weight.tolist() == [1.0] * 3
    assert found.first_weight.tolist() == pytest.approx([0.2] * 3)


def test_row_t_of_causal_attention_has_t_plus_1_keys() -> None:
    time = 6
    causal = torch.ones(time, time, dtype=torch.bool).tril()
    uniform = causal / causal.sum(-1, keepdim=True)
    found = attention_statistics(uniform.expand(1, 2, time, time), allowed=causal)
    expected = np.mean([math.log(t + 1) for t in range(time)])
    assert found.entropy.tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert found.entropy_share.tolist() == pytest.approx([1.0] * 2, abs=1e-6)  # the first row has no choice
    assert found.num_keys.tolist() == pytest.approx([(time + 1) / 2] * 2)
    assert found.max_weight.tolist() == pytest.approx([np.mean([1 / (t + 1) for t in range(1, time)])] * 2)


def naive(weights: Tensor, allowed: Tensor, logits: Tensor) -> dict[str, list[float]]:
    """Row by row, in plain Python."""
    samples, heads, queries, _ = weights.shape
    names = ("num_keys", "entropy", "entropy_share", "max_weight", "first_weight", "slope",
             "saturated_share", "logit_std", "logit_peak")  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in names}
    for h in range(heads):
        rows: dict[str, list[float]] = {name: [] for name in names}
        for b in range(samples):
            for i in range(queries):
                open_keys = allowed[b, h, i].nonzero().flatten().tolist()
                p = [float(weights[b, h, i, j]) for j in open_keys]
                s = [float(logits[b, h, i, j]) for j in open_keys]
                if not p:
                    continue
                entropy = -sum(x * math.log(x) for x in p if x > 0)
                rows["num_keys"].append(len(p))
                rows["entropy"].append(entropy)
                if len(p) < 2:
                    continue
                slope = (1 - sum(x * x for x in p)) / (1 - 1 / len(p))
                mean = sum(s) / len(s)
                rows["entropy_share"].append(entropy / math.log(len(p)))
                rows["max_weight"].append(max(p))
                rows["first_weight"].append(float(weights[b, h, i, 0]) if 0 in open_keys else 0.0)
                rows["slope"].append(slope)
                rows["saturated_share"].append(slope < 0.01)
                rows["logit_std"].append(sum((x - mean) ** 2 for x in s) / len(s))
                rows["logit_peak"].append(max(abs(x - mean) for x in s))
        for name, values in rows.items():
            value = max(values) if name == "logit_peak" else sum(values) / len(values)
            found[name].append(math.sqrt(value) if name == "logit_std" else value)
    return found


@pytest.mark.parametrize("sharp", [0.5, 3.0, 40.0])
def test_against_a_row_by_row_version_with_masks_and_empty_rows(sharp: float) -> None:
    _, logits = drawn(3, 2, 5, 6, sharp=sharp)
    allowed = torch.rand(3, 2, 5, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 0, 0] = False
    allowed[1, 1, 2] = torch.arange(6) == 3
    hidden = logits.masked_fill(~allowed, -math.inf)
    weights = hidden.softmax(-1).nan_to_num(0.0)
    found = attention_statistics(weights, allowed=allowed, logits=logits)
    for name, expected in naive(weights, allowed, logits).items():
        assert getattr(found, name).tolist() == pytest.approx(expected, abs=1e-9), name


def test_logits_default_to_logarithms_and_a_shift_changes_nothing() -> None:
    weights, logits = drawn(2, 3, 4, 5)
    by_log = attention_statistics(weights)
    shifted = attention_statistics(weights, logits=logits + 100 * torch.arange(4.0)[:, None])
    torch.testing.assert_close(by_log.logit_std, shifted.logit_std)
    torch.testing.assert_close(by_log.logit_peak, shifted.logit_peak)


def test_rows_without_a_key_give_no_nan_and_no_rows_give_nan() -> None:
    weights = torch.zeros(1, 1, 2, 3)
    weights[0, 0, 1] = 1 / 3
    allowed = weights > 0
    assert attention_statistics(weights, allowed=allowed).entropy_share.tolist() == pytest.approx([1.0])
    nothing = attention_statistics(weights, allowed=torch.zeros_like(allowed))
    assert bool(nothing.entropy.isnan().all() and nothing.logit_peak.isnan().all())


def test_parts_of_a_batch_add_up() -> None:
    weights, logits = drawn(5, 2, 3, 4)
    allowed = torch.ones_like(weights, dtype=torch.bool)
    whole = attention_statistics(weights, logits=logits)
    parts = row_sums(weights[:2], allowed[:2], logits[:2]) + row_sums(weights[2:], allowed[2:], logits[2:])
    torch.testing.assert_close(finish(parts).entropy, whole.entropy)
    torch.testing.assert_close(finish(parts).logit_peak, whole.logit_peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_changes_little(dtype: torch.dtype) -> None:
    weights, _ = drawn(2, 3, 4, 5)
    exact, rough = attention_statistics(weights), attention_statistics(weights.to(dtype))
    torch.testing.assert_close(rough.entropy, exact.entropy, atol=0.02, rtol=0)
    torch.testing.assert_close(rough.slope, exact.slope, atol=0.02, rtol=0)


def test_scores_of_growing_spread_use_ever_fewer_keys() -> None:
    """The figures in the docstrings of `collapsed_attention` and `growing_logits`."""
    g = torch.Generator().manual_seed(0)
    for keys, bounds in ((16, (0.84, 0.40, 0.13, 0.1, 0.01)), (1000, (0.92, 0.47, 0.11, 0.09, 0.005))):
        scores = torch.randn(2000, keys, generator=g)
        shares = [
            float(attention_statistics((s * scores).softmax(-1)[None, None]).entropy_share)
            for s in (1, 3, 8, 10, 50)
        ]
        assert all(low < share < low + 0.04 for low, share in zip(bounds, shares, strict=True)), shares
    peaked = torch.full((1, 1, 1, 16), 0.01 / 15)
    peaked[..., 3] = 0.99
    assert float(attention_statistics(peaked).entropy_share) == pytest.approx(0.03, abs=0.001)


def test_entropy_of_rows() -> None:
    weights, _ = drawn(2, 3, 4, 5)
    expected = torch.distributions.Categorical(probs=weights).entropy()
    torch.testing.assert_close(attention_entropy(weights), expected)


def test_distances_of_heads_against_scipy() -> None:
    weights, _ = drawn(2, 4, 3, 5)
    found = head_distances(weights)
    for i in range(4):
        for j in range(4):
            rows = [
                jensenshannon(weights[b, i, q].numpy(), weights[b, j, q].numpy())
                for b in range(2)
                for q in range(3)
            ]
            assert float(found[i, j]) == pytest.approx(np.nan_to_num(np.mean(rows)), abs=1e-7)


def test_equal_heads_have_distance_0_and_rows_of_zeros_do_not_count() -> None:
    weights, _ = drawn(2, 1, 3, 5)
    two = weights.expand(2, 2, 3, 5).clone()
    assert head_distances(two).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    two[:, 1] = two[:, 1].flip(-1)
    full = head_distances(two)
    padded = torch.cat([two, torch.zeros(2, 2, 4, 5, dtype=two.dtype)], 2)
    torch.testing.assert_close(head_distances(padded), full)


@pytest.mark.parametrize("spread", [0.05, 0.2, 0.5])
def test_independent_heads_differ_by_half_the_spread_of_their_scores(spread: float) -> None:
    """What `redundant_heads` weighs distances against."""
    weights, _ = drawn(4, 2, 200, 64, sharp=spread)
    assert float(head_distances(weights)[0, 1]) == pytest.approx(spread / 2, rel=0.06)


def test_residual_of_positions() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=g, dtype=torch.float64)
    whole = rest = 0.0
    for sample in x.numpy():
        rest += np.square(sample - sample.mean(0)).sum()
        whole += np.square(sample).sum()
    assert float(position_residual(x)) == pytest.approx(math.sqrt(rest / whole), rel=1e-6)
    centred = x - x.mean(1, keepdim=True)
    assert float(position_residual(centred)) == pytest.approx(1.0)
    assert float(position_residual(1e-20 * x.float())) == pytest.approx(float(position_residual(x)), rel=1e-4)
    assert math.isnan(float(position_residual(x[:, :1])))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 3, 4), (64, 512, 512)])
def test_rows_are_sampled_evenly(batch: int, queries: int, keys: int) -> None:
    rows = sampled_rows(batch, 8, queries, keys)
    assert len(rows) == min(batch * queries, 2**21 // (8 * keys))
    assert (int(rows[0]), int(rows[-1])) == (0, batch * queries - 1)
    steps = rows.diff()
    assert int(steps.max() - steps.min()) <= 1
