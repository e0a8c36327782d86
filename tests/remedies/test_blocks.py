"""Remedies of blocks, of starts and of inputs, against the same change made by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow.remedies as r
from tests.remedies.models import applied, net, x


class PostNorm(nn.Module):
    """Two blocks of x = norm(x + f(x)), and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.branches = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for branch, norm in zip(self.branches, self.norms, strict=True):
            h = norm(h + branch(h))
        return self.head(h)


def test_norms_move_from_the_path_into_the_branches() -> None:
    hand = PostNorm()
    h = hand.embed(x())
    for branch in hand.branches:
        h = h + branch(F.layer_norm(h, (6,)))
    remedy = r.pre_norm(["norms.0", "norms.1"], ["branches.0", "branches.1", "head"])
    found = applied(remedy, PostNorm())(x())
    torch.testing.assert_close(found, hand.head(F.layer_norm(h, (6,))))


def test_encoder_layers_are_told_to_have_their_norms_first() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    changed: Any = applied(r.pre_norm(["norm1"], ["linear1"]), nn.Sequential(layer))
    assert changed[0].norm_first


def test_attention_has_queries_keys_and_values_normalised() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    given = 7 * torch.randn(2, 5, 4)
    y = F.layer_norm(given, (4,))
    expected = attention(y, y, y)[0]
    changed = applied(r.norm_before(["0"]), nn.ModuleList([attention]))
    torch.testing.assert_close(changed[0](given, given, given)[0], expected)  # type: ignore[index]


def test_a_skip_with_a_norm_and_one_among_shapes_that_differ() -> None:
    model = net()
    y = model[1](model[0](x()))
    expected = model[4](model[3](y + model[2](F.layer_norm(y, (6,)))))
    torch.testing.assert_close(applied(r.skip_round(["2"], norm=True), net())(x()), expected)
    several = applied(r.skip_round(["0", "2"], norm=False), net())
    torch.testing.assert_close(several(x()), model[4](model[3](y + model[2](y))))


@pytest.mark.parametrize("reader", [nn.Linear(2, 3), nn.GRU(2, 3), nn.LSTM(2, 3), nn.LayerNorm(2)])
def test_a_passage_is_widened_with_what_reads_it(reader: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), reader)
    y = applied(r.wider("0", ["2"], 5), model)(x())
    assert (y[0] if isinstance(y, tuple) else y).shape[-1] == (5 if isinstance(reader, nn.LayerNorm) else 3)


def test_a_norm_behind_a_layer_that_does_not_tell_its_width() -> None:
    class Cell(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return 9 * y

    changed = applied(r.norm_behind(["0"]), nn.Sequential(Cell()))
    torch.testing.assert_close(changed(x()), F.layer_norm(9 * x(), (4,)))


def test_what_the_model_is_given_is_standardised_in_whatever_it_stands() -> None:
    class Given(nn.Module):
        def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
            return batch

    torch.manual_seed(0)
    wide, column, picture = 5 + 3 * torch.randn(8, 4), 90 * torch.rand(8), 255 * torch.rand(8, 3, 4, 4)
    batch = {"wide": wide, "rest": [column, picture], "index": torch.arange(8)}
    found = applied(r.inputs_standardised(), Given())(batch)
    torch.testing.assert_close(
        found["wide"], (wide - wide.mean(0)) / wide.std(0, unbiased=False), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        found["rest"][0], (column - column.mean()) / column.std(unbiased=False), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found["rest"][1].mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert torch.equal(found["index"], batch["index"])


def test_scales_are_kept_by_weights_or_outputs() -> None:
    hand = net()
    by_weights: Any = applied(r.scale_kept({"0": 0.5, "2": 3.0}), net())
    torch.testing.assert_close(by_weights[0].weight, 0.5 * hand[0].weight)
    torch.testing.assert_close(by_weights[2].bias, hand[2].bias)
    by_outputs: Any = applied(r.scale_kept({"0": 0.5}, outputs=True), net())
    torch.testing.assert_close(by_outputs[0](x()), 0.5 * hand[0](x()))
    scaled: Any = applied(r.parameters_times(["0.bias"], 4.0), net())
    torch.testing.assert_close(scaled[0].bias, 4 * hand[0].bias)


def test_idle_rows_start_near_rows_that_learn() -> None:
    table = nn.Embedding(6, 3)
    alive = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    with torch.no_grad():
        table.weight[:4], table.weight[4:] = 100.0, alive
    changed: Any = applied(r.rows_revived("0.weight", [0, 1, 2, 3]), nn.Sequential(table))
    weight = changed[0].weight.detach()
    assert torch.equal(weight[4:], alive)
    assert 0 < float(torch.cdist(weight[:4], alive).amin(1).max()) < 0.6  # noise of a tenth of their spread


@pytest.mark.parametrize("name", ["dt_bias", "log_dt"])
def test_step_sizes_lie_between_a_thousandth_and_a_tenth(name: str) -> None:
    mixer = nn.Module()
    mixer.register_parameter(name, nn.Parameter(torch.zeros(50)))
    changed = dict(applied(r.small_steps("0"), nn.Sequential(mixer)).named_parameters())[f"0.{name}"].detach()
    step = changed.exp() if "log" in name else F.softplus(changed)
    assert 1e-3 * 0.99 < float(step.min()) < float(step.max()) < 0.101


def test_bounds_are_soft() -> None:
    y = applied(r.bounded_output(["0"], -2.0, 1.0), nn.Sequential(nn.Identity()))(
        torch.tensor([-9.0, -0.5, 9.0])
    )
    torch.testing.assert_close(y, torch.tensor([-2.0, -0.5, 1.0]), rtol=0, atol=1e-3)
    exponents = applied(r.bounded_exponents(2.0), _Calls(torch.exp))
    torch.testing.assert_close(
        exponents(torch.tensor([0.01, 90.0])), torch.tensor([0.01, 2.0]).exp(), rtol=1e-4, atol=0
    )


class _Calls(nn.Module):
    """Calls a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def test_functions_are_left_out_or_flattened_and_the_loss_takes_logits() -> None:
    given, y = x(), (x() > 0).float()
    torch.testing.assert_close(applied(r.left_out(("sigmoid",)), _Calls(torch.sigmoid))(given), given)
    flat = applied(r.flattened([], ["sigmoid"], 10.0), _Calls(torch.sigmoid))
    torch.testing.assert_close(flat(given), torch.sigmoid(given / 10))
    module = applied(r.flattened(["0"], [], 10.0), nn.Sequential(nn.Tanh()))
    torch.testing.assert_close(module(given), torch.tanh(given / 10))
    expected = F.binary_cross_entropy_with_logits(given, y)
    for loss in (nn.BCELoss(), F.binary_cross_entropy):
        torch.testing.assert_close(r.loss_of_logits().on_loss(loss)(given, y), expected)
    assert float(nn.BCELoss()(torch.sigmoid(given), y)) == pytest.approx(float(expected))
    assert r.loss_of_logits().on_loss(None) is None


def test_divisors_keep_their_sign_and_a_size() -> None:
    ratio = applied(r.divisors_bounded(0.1), _Calls(torch.div))
    found = ratio(torch.ones(4), torch.tensor([1.0, -1e-9, 3.0, 0.0]))
    least = 0.1 * 1.0
    torch.testing.assert_close(found, torch.tensor([1.0, -1 / least, 1 / 3, 1 / least]))


def test_products_and_means_keep_out_only_what_is_given() -> None:
    product = applied(r.guarded("mul"), _Calls(torch.mul))
    torch.testing.assert_close(
        product(torch.ones(2), torch.tensor([math.nan, 2.0])), torch.tensor([0.0, 2.0])
    )
    broken = torch.tensor([math.nan, 1.0], requires_grad=True)
    assert product(torch.ones(2), broken).isnan().any()
    mean = applied(r.guarded("mean"), _Calls(torch.mean))
    assert mean(torch.empty(0)) == 0
    assert mean(torch.tensor([math.nan, 1.0])).isnan()  # a NaN from elsewhere is not hidden


def test_double_precision_reaches_model_and_loss() -> None:
    model = applied(r.wider_precision(torch.float64), nn.Sequential(nn.Linear(4, 2)))
    assert model(x()).dtype == torch.float64
    seen = []
    loss = r.wider_precision(torch.float64).on_loss(lambda a, b: seen.append((a.dtype, b.float().dtype)))
    loss(x(), x())
    assert seen == [(torch.float64, torch.float64)]
