"""Remedies of the optimizer and of the batches; and what remedies say where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradflow.remedies as r
from gradflow.errors import RemedyError
from gradflow.functional.model.optimizers import copy_optimizer
from gradflow.remedies.kinds.initialisation import Init
from gradflow.remedies.surgery import adopted, listed
from tests.remedies.models import applied, net

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
    _, changed = r.own_rate(["2.weight"], 0.01).apply(model, optimizer)
    rates = {id(p): group["lr"] for group in changed.param_groups for p in group["params"]}
    assert rates.pop(id(model[2].weight)) == pytest.approx(1e-3)
    assert list(rates.values()) == [0.1] * 5


def test_the_adam_of_pytorch_steps_instead_of_another() -> None:
    model = net()
    groups = [{"params": [model[0].weight], "lr": 0.5}, {"params": [model[2].weight], "lr": 0.1}]
    _, changed = r.plain_adam(0.1).apply(model, torch.optim.SGD(groups))
    assert type(changed) is torch.optim.Adam
    assert [group["lr"] for group in changed.param_groups] == pytest.approx([0.05, 0.01])


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
        (r.parameters_times(["9.weight"], 2.0), "no parameter '9.weight'"),
        (r.scale_kept({"1": 2.0}), "1 has no weights"),
        (r.small_steps("0"), "cannot be told by its name"),
        (r.rows_revived("0.weight", [999]), "no such rows of '0.weight'"),
        (
            r.rows_revived("0.weight", list(range(len(net()[0].weight)))),
            "no row of '0.weight' gets a gradient",
        ),
        (r.wider("1", ["2"], 9), "1 is a ReLU, no linear layer"),
        (r.wider("0", ["1"], 9), "how a ReLU reads more inputs"),
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
        applied(r.own_rate(["x"], 0.1), net())
    with pytest.raises(RemedyError, match="differ in shape, so they cannot be joined"):
        r.larger_batches(2).on_batches([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(RemedyError, match="hold a str cannot be joined"):
        r.larger_batches(2).on_batches(["a", "b"])
    with pytest.raises(KeyError):
        r.guarded("matmul")
    assert listed([""]) == "(model)"


def test_what_the_optimizer_has_left_out_joins_it() -> None:
    model = net()
    first = next(model.parameters())
    optimizer = torch.optim.SGD([first], lr=0.3, momentum=0.9)
    _, changed = r.all_held().apply(model, optimizer)
    held = [p for group in changed.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len({id(p) for p in held})
    assert [group["lr"] for group in changed.param_groups] == [0.3, 0.3]
    assert changed.param_groups[1]["momentum"] == 0.9
    with pytest.raises(RemedyError, match="holds all parameters"):
        r.all_held().apply(model, changed)


def test_rates_stay_without_the_hook_that_changes_them() -> None:
    def tenth(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            group["lr"] /= 10

    def trained(optimizer: torch.optim.Optimizer) -> float:
        for _ in range(3):
            optimizer.step()
        return optimizer.param_groups[0]["lr"]

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(RemedyError, match="no hooks"):
        r.steady_rates().apply(model, optimizer)
    optimizer.register_step_post_hook(tenth)
    assert trained(optimizer) == pytest.approx(1e-3)
    _, changed = r.steady_rates().apply(model, optimizer)
    assert trained(changed) == pytest.approx(1e-3)
