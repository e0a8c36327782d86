"""Which remedies a cause calls for: every kind of sentence, and the layers they are applied at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.records import Cause, FlowRecord, Issue, IssueSeverity, IssueType
from gradflow.remedies import first_action, remedies_for
from gradflow.remedies.choosing.targets import Target, module_of


def stack(depth: int, activation: type[nn.Module], std: float | None) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential()
    for i in range(depth):
        net.add_module(f"fc{i}", nn.Linear(16, 16))
        net.add_module(f"act{i}", activation())
        if std is not None:
            nn.init.normal_(net[-2].weight, std=std)
    net.add_module("head", nn.Linear(16, 1))
    return net


def told(net: nn.Module, inputs: Any = None) -> tuple[Cause, FlowRecord, list[str]]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) if inputs is None else inputs
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    batches = [(x, x[:, :1])] * 6
    report = gf.diagnose(net, batches, nn.MSELoss(), optimizer=optimizer, steps=6)
    cause = report.causes[0]
    return cause, report.record, [remedy.name for remedy in remedies_for(cause, report.record)]


def test_weights_that_are_too_small_are_drawn_anew_wherever_they_are() -> None:
    cause, record, names = told(stack(8, nn.Tanh, 0.02))
    assert cause.issue_type is IssueType.VANISHING
    assert names[0].startswith("xavier_uniform_ on fc")
    assert "8 layers" in names[0]
    assert [remedy.name for remedy in first_action(cause, record)] == names[:1]


def test_sigmoids_make_room_for_gelu() -> None:
    _, _, names = told(stack(12, nn.Sigmoid, None))
    assert names[0] == "GELU for act0 to act11 (12 layers)"
    assert names[1].startswith(names[0] + " + kaiming_normal_")


@pytest.mark.parametrize("rate", [1e-8, 0.0])
def test_a_rate_that_is_too_low_is_raised(rate: float) -> None:
    torch.manual_seed(0)
    net = stack(2, nn.ReLU, None)
    x = torch.randn(64, 16)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    report = gf.diagnose(net, [(x, x[:, :1])] * 20, nn.MSELoss(), optimizer=optimizer)
    (cause,) = report.causes
    assert (cause.issue_type, cause.layer) == (IssueType.UNSTABLE, "")
    names = [remedy.name for remedy in remedies_for(cause, report.record)]
    assert len(names) == (1 if rate else 0)
    assert all(name.startswith("learning rate") for name in names), names


def test_dead_units_get_weights_or_a_leak() -> None:
    net = stack(2, nn.ReLU, None)
    nn.init.constant_(net.fc0.bias, -9.0)
    _, _, names = told(net)
    assert any(name.startswith("kaiming_normal_ on fc0") for name in names)
    assert "LeakyReLU for act0" in names


def test_saturation_by_the_input_has_it_standardised() -> None:
    net = stack(1, nn.Tanh, None)
    _, _, names = told(net, 1e3 * torch.randn(64, 16))
    assert names[0] == "standardised inputs of fc0"


def of(action: str, kind: IssueType = IssueType.UNSTABLE) -> list[str]:
    """Return the first remedies for one sentence in an empty record."""
    issue = Issue(
        layer="fc", layer_type="Linear", issue_type=kind, severity=IssueSeverity.HIGH, description="",
        magnitude=1.0, recommended_actions=(action,),
    )  # fmt: skip
    cause = Cause(layer="fc", issue_type=kind, mechanism="", issues=(issue,), confidence=0.9)
    record = FlowRecord(steps=2, losses=[9.0, 9.0], layers=(), parameters=())
    return [remedy.name for remedy in first_action(cause, record)]


@pytest.mark.parametrize(
    ("action", "names"),
    [
        ("Lower the learning rate of Adam: 0.5 to about 0.02, with a warm-up.",
         ["learning rate / 25 + warm-up over 10 steps", "learning rate / 300"]),
        ("Clip the gradient: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).",
         ["clip_grad_norm_ to 1"]),
        ("Or use nn.GRU or nn.LSTM for fc: their gates keep.", ["nn.GRU for fc"]),
        ("Start its bias higher: fc.bias_ih_l0.data[fc.hidden_size:2 * fc.hidden_size].fill_(3.7), at which",
         ["keeping gate of fc at bias 3.7"]),
        ("Remove detach() from the path, or compute the loss on the tensor before it.",
         ["without detach in model"]),
        ("sign has a derivative of zero: use a straight-through estimate, x + (x.sign() - x).detach().",
         ["straight-through estimates", "rsample for sample"]),
        ("Use checkpoint(..., use_reentrant=False), or let its input require a gradient.",
         ["inputs that require a gradient"]),
        ("Use GroupNorm or LayerNorm, free of the batch, or more than 2 samples a batch.",
         ["GroupNorm for fc", "batches 8 times as large"]),
        ("Initialise blocks.1.fc.weight like the same weights of the other blocks.",
         ["blocks.1.fc.weight like its siblings"]),
        ("Drop less in drop: 0.1 is usual in transformers, half at most.", ["dropout 0.1 in drop"]),
        ("Give drop the share of the others, 0.2.", ["dropout 0.2 in drop"]),
        ("Start the gains of norm at 1 (nn.init.ones_), or at 0 where it ends a residual branch.",
         ["ones_ on norm"]),
        ("Start the bias of norm at zero (nn.init.zeros_).", ["zeros_ on norm"]),
        ("Or divide its scores by a constant, 13, before the loss.", ["output of fc × 0.0769"]),
        ("Bring the targets of fc to the scale of its outputs: standardise them.",
         ["output of fc × 3 + loss × 0.111"]),
        ("Give norm an epsilon of 1e-5: 1000 is more than what it guards.", ["eps=1e-05 in norm"]),
        ("Start near uniform: nn.init.orthogonal_(policy_head.weight, gain=0.01), and a bias of zero.",
         ["orthogonal_ on fc"]),
        ("Scale the scores down (their standard deviation is 18.7, about 1 is usual): divide by sqrt(d).",
         ["scores of model / 18.7", "scores of fc / 18.7", "queries of fc / 18.7"]),
        ("Scale the gradient of fc.step down by the root of how many numbers it serves, or give it a "
         "smaller learning rate, in a parameter group of its own.", ["learning rate of fc.step × 0.01"]),
        ("Bound the divisor from below at the scale of the data, and not at 1e-8.",
         ["divisors of at least 0.1 of their mean"]),
        ("Infinity times a mask of zero is NaN: select with where().", ["mul inside its domain"]),
        ("Bound the log of the standard deviation from below: torch.clamp(log_std, min=-5).",
         ["output of fc within [-2, 1]"]),
        ("Start what fc multiplies its state by nearer to one: small step sizes.",
         ["step sizes of fc between 0.001 and 0.1", "keeping gate of fc at bias 2"]),
        ("Call fc in forward(), or delete it; check for a name that is overwritten.", []),
        ("Widen fc: 1 numbers for a gradient of effective rank 2; try 4.", []),
    ],
)  # fmt: skip
def test_what_sentences_mean(action: str, names: list[str]) -> None:
    assert of(action) == names


def test_without_actions_there_is_nothing_but_what_is_usual() -> None:
    assert of("") == []


def test_no_remedy_is_named_twice_and_there_are_eight_at_most() -> None:
    cause, record, names = told(stack(8, nn.Tanh, 0.02))
    assert len(names) == len(set(names)) <= 8
    target = Target.of(cause, record)
    assert target.hidden == [f"fc{i}" for i in range(8)]
    assert target.matrices == [*target.hidden, "head"]
    assert module_of("a.b@2") == "a.b"


def names_of(remedies: Iterable[gf.Remedy]) -> list[str]:
    return [remedy.name for remedy in remedies]


def test_every_remedy_has_words_and_code() -> None:
    for net in (stack(8, nn.Tanh, 0.02), stack(12, nn.Sigmoid, None)):
        cause, record, names = told(net)
        for remedy in remedies_for(cause, record):
            assert remedy.words.endswith(".")
            compile(remedy.code.replace("...", "0"), remedy.name, "exec")
        assert names_of(remedies_for(cause, record)) == names


def test_factors_that_are_both_zero_are_drawn_at_random() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 4, bias=False), nn.Linear(16, 4, bias=False)
            nn.init.zeros_(self.a.weight)
            nn.init.zeros_(self.b.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.a(x) * self.b(x)).sum(-1, keepdim=True)

    cause, _, names = told(Product())  # type: ignore[arg-type]
    assert cause.issue_type is IssueType.DEAD
    assert "xavier_uniform_ on a and b" in names


def test_an_operation_is_kept_inside_its_domain() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 4))
    loss = lambda output, target: -torch.log(output.clamp(min=0)).mean()  # noqa: E731
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    x = torch.randn(32, 16)
    report = gf.diagnose(net, [(x, x)] * 3, loss, optimizer=optimizer, steps=3)
    assert report.causes[0].issue_type is IssueType.NUMERICAL
    assert names_of(first_action(report.causes[0], report.record)) == ["log inside its domain"]


def test_what_bends_takes_the_place_of_rectifiers_whose_slope_is_the_output() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    torch.manual_seed(0)
    net, x, target = Slope(), torch.randn(32, 2), torch.randn(32, 2)
    loss = lambda y: (y - target).square().mean()  # noqa: E731
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    report = gf.diagnose(net, [x] * 6, loss, optimizer=optimizer, steps=6)
    assert names_of(first_action(report.causes[0], report.record)) == ["SiLU for net.1 and net.3"]
