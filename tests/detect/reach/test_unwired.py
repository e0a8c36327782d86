"""DEAD where no graph leads from the loss to the model, or copies of its layers run; and healthy ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """A convolutional encoder and a head; `between` and `behind` are what somebody put there."""

    def __init__(self, between: Any = torch.clone, behind: Any = torch.clone) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 8, 3), nn.GELU(), nn.Flatten())
        self.head = nn.Linear(32, 4)
        self.between, self.behind = [between], [behind]

    def forward(self, x: Tensor) -> Tensor:
        return self.behind[0](self.head(self.between[0](self.encoder(x.unsqueeze(1)))))


def report(model: nn.Module, loss: Callable[..., Any], **options: Any) -> gf.Report:
    options = {"steps": 4, "optimizer": torch.optim.Adam(model.parameters(), 1e-3)} | options
    return gf.diagnose(model, lambda: X, loss, **options)


def classes(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, Y)


def hits(scores: Tensor) -> Tensor:
    return (scores.argmax(1) != Y).float().mean()


# ---------------------------------------------------------------------- a loss without a graph

CUTS: dict[str, tuple[nn.Module, Callable[..., Any], str, str]] = {
    "argmax": (Net(), hits, "argmax before loss", "argmax has no derivative"),
    "argmax, told to require a gradient": (
        Net(), lambda y: hits(y).requires_grad_(), "argmax before loss", "argmax has no derivative",
    ),
    "the choice, told to require a gradient": (
        Net(), lambda y: F.mse_loss(y.argmax(1).float().requires_grad_(), Y.float()),
        "argmax before mse_loss", "argmax has no derivative",
    ),
    "threshold": (
        Net(), lambda y: ((y.sigmoid() > 0.5).float() - F.one_hot(Y, 4)).square().mean(),
        "gt before loss", "A comparison gives zeros and ones",
    ),
    "detach": (Net(behind=torch.detach), classes, "detach before loss", "Remove detach()"),
    "data": (Net(), lambda y: classes(y.data), "data before loss", ".data cuts the gradient"),
    "item": (Net(), lambda y: torch.tensor(classes(y).item()), "read out with item", ".item() gives values"),
    "numpy": (
        Net(behind=lambda y: torch.from_numpy(y.detach().numpy().copy())), classes,
        "read out with numpy", ".numpy() gives values",
    ),
    "a new tensor": (
        Net(), lambda y: classes(y.new_tensor(y.tolist()).requires_grad_()),
        "read out with tolist", ".tolist() gives values",
    ),
    "no_grad": (Net(), torch.no_grad()(classes), "no_grad before loss", "torch.no_grad()"),
    "targets": (
        Net(), lambda y: F.one_hot(Y, 4).float().mean(),
        "does not lead to the loss", "another tensor",
    ),
}  # fmt: skip


# A transform of torch.func gives no values to Python, and makes no leaves.
UNDER_VJP = ("argmax", "threshold", "detach", "data", "no_grad", "targets")


@pytest.mark.parametrize(
    ("name", "transform"), [*((name, "fused") for name in CUTS), *((name, "vjp") for name in UNDER_VJP)]
)
def test_a_loss_without_a_graph_is_told_with_what_cut_it(name: str, transform: Any) -> None:
    model, loss, why, cure = CUTS[name]
    told = report(model, loss, transform=transform)
    first = told.issues[0]
    assert {issue.issue_type for issue in told.issues} == {IssueType.DEAD}
    assert (first.layer, first.severity) == ("head", IssueSeverity.CRITICAL)
    assert why in first.description
    assert "nothing trains" in first.description
    assert cure in " ".join(first.recommended_actions)
    assert [cause.layer for cause in told.causes] == ["head"]  # what is before it loses its gradient with it


def test_a_cut_in_the_middle_of_a_model_with_a_frozen_head() -> None:
    model = Net(between=torch.detach)
    model.head.requires_grad_(False)
    told = report(model, classes)
    assert [(i.layer, i.severity) for i in told.issues] == [("encoder.0", IssueSeverity.CRITICAL)]
    assert "detach before head" in told.issues[0].description


def test_the_record_of_such_a_run() -> None:
    record = report(Net(), hits).record
    assert not any(parameter.reached.any() for parameter in record.parameters)
    assert record.reach is not None
    assert record.reach.num_reached == 0
    severed = {(e.source, e.target): e.reason for e in record.graph_record.edges if e.severed}  # type: ignore[union-attr]
    assert severed == {("head", "loss"): "argmax"}
    assert gf.FlowRecord.from_json(record.to_json()) == record


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.SGD])
def test_nothing_moves_and_nothing_is_left(make: Any) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    told = report(model, hits, optimizer=make(model.parameters(), lr=0.1))
    assert told.issues[0].severity is IssueSeverity.CRITICAL
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_attention_that_uses_the_parts_of_a_module_is_one_layer_without_gradient_too() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.out = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1)
            return self.out(self.attend(x, x, x)[0]).squeeze(1)

    told = report(Reader(), hits)
    assert [cause.layer for cause in told.causes] == ["out"]
    assert {issue.layer for issue in told.issues} == {"attend", "out"}
    assert told.record.never_called == ()


def test_a_part_that_is_cut_off_of_a_model_that_trains_is_no_worse_than_before() -> None:
    model = Net(between=torch.detach)
    told = report(model, classes)
    assert [(i.layer, i.severity) for i in told.issues] == [("encoder.0", IssueSeverity.HIGH)]
    assert "nothing trains" not in told.issues[0].description


def test_values_that_are_read_for_the_log_are_no_cut() -> None:
    log: list[float] = []

    def loss(y: Tensor) -> Tensor:
        log.append(hits(y).item())
        return classes(y)

    assert report(Net(), loss).ok
    assert len(log) >= 4


# ---------------------------------------------------------------------------------- copies run


class Learner(nn.Module):
    """Takes one step on half of the batch, and predicts the other half."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)), kind

    def forward(self, x: Tensor) -> Tensor:
        names, weights = zip(*self.net.named_parameters(), strict=True)
        if self.kind == "copy":
            net = copy.deepcopy(self.net)
            grads = torch.autograd.grad(F.cross_entropy(net(x[:12]), Y[:12]), list(net.parameters()))
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter.data -= 0.1 * grad
            return net(x)
        out = torch.func.functional_call(self.net, dict(zip(names, weights, strict=True)), (x[:12],))
        grads = torch.autograd.grad(F.cross_entropy(out, Y[:12]), weights, create_graph=True)
        moved = {n: w - 0.1 * g for n, w, g in zip(names, weights, grads, strict=True)}
        return torch.func.functional_call(self.net, moved, (x,))


def test_layers_of_which_only_copies_run() -> None:
    for optimized in (True, False):
        model = Learner("copy")
        told = report(model, classes, **({} if optimized else {"optimizer": None}))
        (issue,) = told.issues
        assert (issue.layer, issue.severity) == ("net", IssueSeverity.CRITICAL)
        assert "ran instead" in issue.description
        assert issue.metrics["copied"]
        assert "functional_call(net, weights, inputs)" in issue.recommended_actions[1]
    reasons = {(part.reason.value, part.op) for part in told.record.reach.unreached}  # type: ignore[union-attr]
    assert reasons == {("not called", "copy")}


def test_layers_that_run_with_weights_made_of_their_own() -> None:
    assert report(Learner("function"), classes).ok


def test_a_part_that_is_not_called_beside_another_of_its_kind() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.forgotten = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    (issue,) = report(Twins(), classes).issues
    assert issue.layer == "forgotten"
    assert not issue.metrics["copied"]  # `used` is a part of the model


def test_a_teacher_outside_of_the_model_is_no_copy_of_what_runs() -> None:
    teacher, model = Net().requires_grad_(False), Net()
    assert report(model, lambda y: F.mse_loss(y, teacher(X))).ok
