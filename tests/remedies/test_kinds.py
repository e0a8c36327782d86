"""Remedies of initialisation and structure, against the same change made by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow.remedies as r
from gradflow.errors import RemedyError
from gradflow.remedies.kinds.initialisation import Init, inits_in
from tests.remedies.models import applied, equal, net, x

# ------------------------------------------------------------------------------------ initialisation


def test_initialised() -> None:
    hand = net()
    torch.manual_seed(3)
    nn.init.xavier_uniform_(hand[2].weight, gain=nn.init.calculate_gain("tanh"))
    nn.init.zeros_(hand[2].bias)
    remedy = r.initialised([Init("xavier_uniform_", "2.weight", {"gain": 5 / 3})], zero_bias=True)
    equal(applied(remedy, net()), hand)
    assert remedy.code == (
        "nn.init.xavier_uniform_(model[2].weight, gain=1.6666666666666667)\nnn.init.zeros_(model[2].bias)"
    )


def test_the_code_that_is_told_does_what_is_tried() -> None:
    """Executed as it stands, the code makes the change."""
    remedies = [
        r.kaiming(["0", "2", "4"]), r.initialised([Init("ones_", "2.weight")]), r.rescaled(["0", "2"], 0.5),
        r.biased(["0", "2"], 0.1),
    ]  # fmt: skip
    for remedy in remedies:
        model, place = net(), {"nn": nn, "torch": torch}
        torch.manual_seed(3)
        exec(remedy.code, {**place, "model": model})
        equal(applied(remedy, net()), model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anew: nn.init.kaiming_normal_(a.b.0.weight, nonlinearity='relu'), bias zero.",
         [Init("kaiming_normal_", "a.b.0.weight", {"nonlinearity": "relu"})]),
        ("nn.init.orthogonal_(rnn.weight_hh_l0): they keep", [Init("orthogonal_", "rnn.weight_hh_l0")]),
        ("use nn.init.xavier_uniform_(x.weight).", [Init("xavier_uniform_", "x.weight")]),
        ("(nn.init.zeros_, or a factor)", []),
    ],
)  # fmt: skip
def test_calls_are_read_off_the_words(text: str, expected: list[Init]) -> None:
    assert list(inits_in(text)) == expected


def test_rescaled_biased_and_like_siblings() -> None:
    hand = net()
    with torch.no_grad():
        hand[2].weight.mul_(0.25)
        hand[2].bias.mul_(0.25).fill_(0.1)
    equal(applied(r.rescaled(["2"], 0.25) + r.biased(["2"], 0.1), net()), hand)
    odd = net()
    with torch.no_grad():
        odd[2].weight.mul_(1e3)
    found = applied(r.like_siblings(["2.weight"]), odd)
    usual = torch.stack([net()[0].weight.std(unbiased=False), net()[4].weight.std(unbiased=False)]).median()
    assert found[2].weight.std().item() == pytest.approx(usual.item(), rel=0.5)  # type: ignore[index]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_gates_and_recurrent_weights(cell: Any) -> None:
    model = nn.Sequential(cell(3, 4))
    applied(r.keeping("0", 2.5) + r.orthogonal_recurrence("0"), model)
    assert torch.equal(model[0].bias_ih_l0[4:8], torch.full((4,), 2.5))
    assert not torch.equal(model[0].bias_ih_l0[:4], torch.full((4,), 2.5))
    for block in model[0].weight_hh_l0.split(4):
        torch.testing.assert_close(block @ block.T, torch.eye(4), rtol=0, atol=1e-5)


def test_queries_are_divided_whatever_they_are_called() -> None:
    joint, seen = nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)
    divided = applied(r.queries_divided("0", 4.0), nn.Sequential(copy.deepcopy(joint)))[0]  # type: ignore[index]
    weights = []
    for module in (joint, divided):
        q = F.linear(seen, module.in_proj_weight[:8], module.in_proj_bias[:8])
        k = F.linear(seen, module.in_proj_weight[8:16], module.in_proj_bias[8:16])
        weights.append(q.squeeze(1) @ k.squeeze(1).T)
    torch.testing.assert_close(weights[1], weights[0] / 4)
    apart = nn.Sequential(nn.ModuleDict({"q_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2)}))
    before = apart[0]["q_proj"].weight.clone(), apart[0]["k_proj"].weight.clone()
    applied(r.queries_divided("0", 2.0), apart)
    assert torch.equal(apart[0]["q_proj"].weight, before[0] / 2)
    assert torch.equal(apart[0]["k_proj"].weight, before[1])


# ----------------------------------------------------------------------------------------- structure


def _by_hand(change: Callable[[nn.Sequential], Any]) -> nn.Sequential:
    model = net()
    change(model)
    return model


@pytest.mark.parametrize(
    ("remedy", "hand"),
    [
        (r.activation(["1", "3"]), lambda m: (m.__setitem__(1, nn.GELU()), m.__setitem__(3, nn.GELU()))),
        (r.without(["3"]), lambda m: m.__setitem__(3, nn.Identity())),
        (r.norm_behind(["0"]), lambda m: m.__setitem__(0, nn.Sequential(m[0], nn.LayerNorm(6)))),
        (r.norm_before(["2"]), lambda m: m.__setitem__(
            2, nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), m[2]))),
        (r.output_times(["4"], 3.0, 1.0), lambda m: m.__setitem__(4, _Affine(m[4]))),
    ],
    ids=["activation", "without", "norm_behind", "norm_before", "output_times"],
)  # fmt: skip
def test_structure(remedy: r.Remedy, hand: Any) -> None:
    torch.testing.assert_close(applied(remedy, net())(x()), _by_hand(hand)(x()))


class _Affine(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, y: Tensor) -> Tensor:
        return 3.0 * self.inner(y) + 1.0


def test_skip_and_what_it_needs() -> None:
    model = net()
    y = model[1](model[0](x()))
    expected = model[4](model[3](y + model[2](y)))
    torch.testing.assert_close(applied(r.skip_round(["2"]), net())(x()), expected)
    with pytest.raises(RemedyError, match="differ in shape, so no skip connection fits"):
        applied(r.skip_round(["0"]), net())(x())


@pytest.mark.parametrize("shape", [(64, 4), (16, 9, 4)])
def test_standardised(shape: tuple[int, ...]) -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    applied(r.standardised(["0"]), model)(1e6 + 300 * torch.randn(shape) * torch.tensor([1.0, 1e-3, 5, 0]))
    flat = seen[0].reshape(-1, 4)
    torch.testing.assert_close(flat.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
    assert flat.std(0)[[0, 2]].tolist() == pytest.approx([1.0, 1.0], rel=0.05)
    assert flat[:, 3].abs().max() == 0  # a constant stays one


def test_convolutions_get_their_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    pictures = 7 + 3 * torch.randn(8, 3, 6, 6)
    applied(r.norm_behind(["0"]) + r.group_norm(["1"]), model)
    assert isinstance(model[0][1], nn.BatchNorm2d)  # type: ignore[index]
    assert isinstance(model[1], nn.GroupNorm)
    out = nn.Sequential(applied(r.standardised(["0"]), nn.Sequential(nn.Conv2d(3, 3, 1))))(pictures)
    assert out.shape == (8, 3, 6, 6)


def test_recurrent_layers_get_a_norm_behind_their_outputs() -> None:
    model = nn.Sequential(nn.LSTM(4, 3, bidirectional=True, batch_first=True))
    sequence = torch.randn(2, 5, 4)
    plain, state = model[0](sequence)
    outputs, same = applied(r.norm_behind(["0"]), model)(sequence)
    torch.testing.assert_close(outputs, F.layer_norm(plain, [6]))
    torch.testing.assert_close(same, state)


def test_words_are_not_standardised() -> None:
    model = applied(r.standardised(["0"]), nn.Sequential(nn.Embedding(3, 2)))
    with pytest.raises(RemedyError, match="what enters is int64, no measured quantity"):
        model(torch.arange(3))


def test_norm_epsilon_dropout_and_gated() -> None:
    model = nn.Sequential(nn.LayerNorm(4, 1e3), nn.Dropout(0.9), nn.RNN(4, 3, batch_first=True))
    applied(r.norm_epsilon(["0"]) + r.less_dropout("1", 0.1) + r.gated("2"), model)
    assert model[0].eps == 1e-5
    assert model[1].p == 0.1
    assert isinstance(model[2], nn.GRU)
    assert model[2].batch_first
    assert torch.equal(model[2].bias_ih_l0[3:6], torch.full((3,), 2.0))


def test_a_shared_module_is_replaced_wherever_it_stands() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    model.also = [shared]  # type: ignore[assignment]
    applied(r.activation(["1"]), model)
    assert [type(part) for part in (model[1], model[3], model.also[0])] == [nn.GELU] * 3  # type: ignore[index]
