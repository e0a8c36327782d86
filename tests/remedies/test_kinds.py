"""Each remedy that gradflow knows, against the same change made by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradflow.remedies as r
from gradflow.errors import RemedyError
from gradflow.functional.model.optimizers import copy_optimizer
from gradflow.remedies.kinds.initialisation import Init, inits_in
from gradflow.remedies.surgery import adopted, listed


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def applied(remedy: r.Remedy, model: nn.Module, seed: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(list(model.parameters()) or [torch.zeros(1)], 0.1)
    torch.manual_seed(seed)
    return remedy.apply(model, optimizer)[0]


def x(number: int = 5) -> Tensor:
    return torch.randn(number, 4, generator=torch.Generator().manual_seed(2))


def equal(a: nn.Module, b: nn.Module) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)


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


# ----------------------------------------------------------------------------------------- functions


class Cut(nn.Module):
    """Loses its gradient in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "detach":
            h = h.detach()
        elif self.how == "data":
            h = h.data
        elif self.how == "no_grad":
            with torch.no_grad():
                h = self.first(x)
        elif self.how == "sign":
            h = torch.sign(h)
        elif self.how == "round":
            h = h.round()
        elif self.how == "sample":
            h = torch.distributions.Normal(h, h.exp()).sample()
        elif self.how == "checkpoint":
            h = checkpoint(self.first, x, use_reentrant=True)  # type: ignore[assignment]
        return self.last(h)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ("detach", r.attached()),
        ("data", r.attached()),
        ("no_grad", r.attached()),
        ("sign", r.straight_through()),
        ("round", r.straight_through()),
        ("sample", r.reparametrised()),
        ("checkpoint", r.inputs_with_gradient()),
    ],
)
def test_the_gradient_comes_through(how: str, remedy: r.Remedy) -> None:
    cut = Cut(how)
    cut(x()).sum().backward()
    assert cut.first.weight.grad is None or not cut.first.weight.grad.any()
    mended = applied(remedy, Cut(how))
    out = mended(x())
    out.sum().backward()
    gradient = mended.first.weight.grad  # type: ignore[union-attr]
    assert gradient is not None
    assert gradient.any()
    if how != "sample":
        torch.testing.assert_close(out, Cut(how)(x()))
        straight = Cut("nothing")  # what the gradient is where nothing cuts it
        straight(x()).sum().backward()
        torch.testing.assert_close(gradient, straight.first.weight.grad)


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@pytest.mark.parametrize(
    ("op", "function", "at"),
    [
        ("sqrt", lambda t: t.sqrt(), 0.0),
        ("log", lambda t: torch.log(t), 0.0),
        ("exp", lambda t: t.exp(), 1e3),
        ("div", lambda t: t / (0 * t), 0.0),
        ("div", lambda t: 1.0 / t, 0.0),
        ("pow", lambda t: t**0.5, 0.0),
        ("std", lambda t: t[None].std(), 1.0),
        ("acos", lambda t: t.acos(), 1.0),
        ("softmax", lambda t: torch.softmax(torch.stack([t - math.inf, t - math.inf]), 0).square(), 0.0),
    ],
)
def test_inside_its_domain(op: str, function: Any, at: float) -> None:
    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.Parameter(torch.tensor(at))

        def forward(self) -> Tensor:
            return function(self.t).sum()

    def broken(model: Any) -> bool:
        out = model()
        out.backward()
        return not (torch.isfinite(out) and torch.isfinite(model.t.grad))

    assert broken(Edge())
    assert not broken(applied(r.guarded(op), Edge()))


def test_a_loss_is_guarded_too() -> None:
    loss = r.guarded("log").on_loss(lambda output: -torch.log(output).mean())
    assert loss(torch.zeros(3)).item() == pytest.approx(-math.log(1e-8), rel=1e-3)
    assert r.guarded("log").on_loss(None) is None


def test_scores_are_cooled_in_that_module_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Softmax(-1), nn.Softmax(-1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    found = applied(r.cooled("a", 10.0), Two())(x())
    torch.testing.assert_close(found[0], torch.softmax(x() / 10, -1))
    torch.testing.assert_close(found[1], torch.softmax(x(), -1))


def test_functions_are_smoothed_and_float_is_float() -> None:
    class Squashed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x)

    model = nn.Sequential(Squashed(), nn.Linear(4, 2))
    torch.testing.assert_close(applied(r.smooth(("sigmoid",)), model)(x()), model[1](F.gelu(x())))
    half = applied(r.wider_precision(), nn.Sequential(nn.Linear(4, 2)).half())
    assert half(x().half()).dtype == torch.float32


# --------------------------------------------------------------------------------------- optimizers


def _stepped(optimizer: Any, parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    for gradient in gradients:
        for p in parameters:
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


GRADIENTS = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.tensor([-30.0, 40.0])]


def test_clipping_warming_and_scaling_are_what_they_say() -> None:
    for remedy, hand in (
        (r.clipped(1.0), lambda i, g: g * min(1.0, 1.0 / (g.norm() + 1e-6))),
        (r.warmed_up(2), lambda i, g: g * min(1.0, (i + 1) / 2)),
        (r.loss_times(0.1), lambda i, g: 0.1 * g),
        (r.rate_times(0.5), lambda i, g: 0.5 * g),
    ):
        p = nn.Parameter(torch.zeros(2))
        _, optimizer = remedy.apply(nn.Identity(), torch.optim.SGD([p], lr=1.0))
        (found,) = _stepped(optimizer, [p], GRADIENTS)
        torch.testing.assert_close(found, -sum(hand(i, g) for i, g in enumerate(GRADIENTS)))  # type: ignore[arg-type]
        assert optimizer.param_groups[0]["lr"] == (0.5 if "learning" in remedy.name else 1.0)


def test_a_wrapped_optimizer_can_be_copied_as_a_run_does() -> None:
    model = nn.Linear(2, 1, bias=False)
    _, wrapped = (r.clipped(1.0) + r.warmed_up(3)).apply(model, torch.optim.Adam(model.parameters(), 0.1))
    twin = {name: p.detach().clone() for name, p in model.named_parameters()}
    copied = copy_optimizer(wrapped, model, twin)
    before = model.weight.detach().clone()
    found = _stepped(copied, list(twin.values()), [g[None] for g in GRADIENTS])
    assert torch.equal(model.weight, before)
    expected = _stepped(wrapped, list(model.parameters()), [g[None] for g in GRADIENTS])
    torch.testing.assert_close(found, expected)


def test_epsilon_and_weight_decay() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    _, changed = (r.epsilon(1e-3) + r.no_decay()).apply(model, optimizer)
    decayed = {id(p): group["weight_decay"] for group in changed.param_groups for p in group["params"]}
    assert {decayed[id(p)] for p in model.parameters() if p.dim() >= 2} == {0.1}
    assert {decayed[id(p)] for p in model.parameters() if p.dim() < 2} == {0.0}
    assert {group["eps"] for group in changed.param_groups} == {1e-3}


def test_a_rate_of_its_own() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _, changed = r.own_rate("2.weight", 0.01).apply(model, optimizer)
    rates = {id(p): group["lr"] for group in changed.param_groups for p in group["params"]}
    assert rates.pop(id(model[2].weight)) == pytest.approx(1e-3)
    assert list(rates.values()) == [0.1] * 5


def test_new_parameters_join_the_first_group() -> None:
    model = net()
    before = list(model.parameters())
    frozen = before[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in before if p is not frozen], 0.1)
    model[3] = nn.PReLU()
    adopted(model, optimizer, before)
    held = optimizer.param_groups[0]["params"]
    assert any(p is model[3].weight for p in held)
    assert not any(p is frozen for p in held)


# ----------------------------------------------------------------------------------- data and refusals


def test_batches_are_joined() -> None:
    batches = [(torch.full((2, 3), float(i)), {"y": torch.full((2,), i)}) for i in range(5)]
    joined = r.larger_batches(2).on_batches(batches)
    assert len(joined) == 2  # the fifth has no partner
    assert joined[1][0].tolist() == [[2.0] * 3] * 2 + [[3.0] * 3] * 2
    assert joined[1][1]["y"].tolist() == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("remedy", "match"),
    [
        (r.kaiming(["9"]), "has no module '9'"),
        (r.biased(["1"], 0.1), "1 has no bias"),
        (r.rescaled(["1"], 0.1), "1 has no parameters"),
        (r.initialised([Init("zeros_", "1.weight")]), "no parameter '1.weight'"),
        (r.keeping("0", 1.0), "0 has no gates"),
        (r.orthogonal_recurrence("0"), "0 has no recurrent weights"),
        (r.like_siblings(["9.weight"]), "no other block has a parameter like 9.weight"),
        (r.queries_divided("0", 2.0), "cannot be told by its name"),
        (r.norm_behind(["1"]), "how wide the output of 1 is"),
        (r.norm_epsilon(["0"]), "0 has no epsilon"),
        (r.group_norm(["0"]), "0 is no batch norm"),
        (r.gated("0"), "0 is a Linear, no plain recurrence"),
        (r.less_dropout("0", 0.1), "0 is no dropout layer"),
        (r.epsilon(1e-3), "SGD has no epsilon"),
        (r.no_decay(), "no parameter has a weight decay"),
    ],
    ids=lambda value: value.name if isinstance(value, r.Remedy) else "",
)
def test_what_does_not_fit_says_so(remedy: r.Remedy, match: str) -> None:
    with pytest.raises(RemedyError, match=match):
        applied(remedy, net())


def test_more_refusals() -> None:
    model = net().requires_grad_(False)
    model[4].requires_grad_(True)
    with pytest.raises(RemedyError, match=r"0.weight is not trained"):
        applied(r.kaiming(["0"]), model)
    optimizer: Any = type("Rateless", (), {"param_groups": [{"params": []}]})()
    with pytest.raises(RemedyError, match="Rateless has no learning rate"):
        r.rate_times(0.1).apply(model, optimizer)
    with pytest.raises(RemedyError, match="holds no parameter 'x' with a learning rate"):
        applied(r.own_rate("x", 0.1), net())
    with pytest.raises(RemedyError, match="differ in shape, so they cannot be joined"):
        r.larger_batches(2).on_batches([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(RemedyError, match="hold a str cannot be joined"):
        r.larger_batches(2).on_batches(["a", "b"])
    with pytest.raises(KeyError):
        r.guarded("matmul")
    assert listed([""]) == "(model)"
