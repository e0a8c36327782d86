"""The textbook cases, sick and healthy, end to end through the class interface and `diagnose`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf

V, E, D = gf.IssueType.VANISHING, gf.IssueType.EXPLODING, gf.IssueType.DEAD


class MLP(nn.Module):
    """Linear layers in a ModuleList, an activation applied as a function between them."""

    def __init__(self, widths: list[int], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Stack(nn.Module):
    """`fc1` ... `fcN`, with an optional batch norm and activation behind all but the last."""

    def __init__(self, widths: list[int], activation: nn.Module | None, *, norm: bool = False) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for i in range(self.depth):
            setattr(self, f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))
            if norm and i < self.depth - 1:
                setattr(self, f"bn{i + 1}", nn.BatchNorm1d(widths[i + 1]))
        self.activation, self.norm = activation, norm

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = getattr(self, f"fc{i}")(x)
            if i < self.depth:
                x = getattr(self, f"bn{i}")(x) if self.norm else x
                x = F.relu(x) if self.activation is not None else x
        return x


def linears(model: nn.Module) -> Iterator[nn.Linear]:
    return (m for m in model.modules() if isinstance(m, nn.Linear))


def sigmoid_mlp() -> nn.Module:
    model = MLP([784, 256, 256, 256, 256, 10], torch.sigmoid)
    for layer in linears(model):
        nn.init.normal_(layer.weight, 0, 0.001)
    return model


def he_mlp() -> nn.Module:
    model = MLP([784, 256, 256, 256, 10], F.relu)
    for layer in linears(model):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model


def huge_stack() -> nn.Module:
    model = Stack([784, 512, 512, 512, 10], None)
    for layer in list(linears(model))[:3]:
        nn.init.normal_(layer.weight, 0, 5.0)
    return model


def dead_stack() -> nn.Module:
    model = Stack([784, 256, 256, 10], nn.ReLU())
    nn.init.zeros_(model.fc2.weight)
    nn.init.zeros_(model.fc2.bias)
    return model


def digits() -> Callable[[], tuple[Tensor, Tensor]]:
    """Ten noisy prototypes: data that a classifier can learn."""
    g = torch.Generator().manual_seed(3)
    centres = torch.randn(10, 784, generator=g)

    def batch() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 10, (64,), generator=g)
        return centres[y] + torch.randn(64, 784, generator=g), y

    return batch


def analysed(model: nn.Module, **options: object) -> list[gf.Issue]:
    """Run the class interface, whose loss finds its target itself."""
    draw, box = digits(), {}

    def input_fn() -> Tensor:
        x, box["y"] = draw()
        return x

    return gf.GradientFlowAnalyzer(model).analyze(
        input_fn, lambda output: F.cross_entropy(output, box["y"]), **options
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_tiny_sigmoid_mlp_vanishes_at_the_first_layer() -> None:
    issues = analysed(sigmoid_mlp())
    first = [i for i in issues if i.layer == "layers.0" and i.issue_type is V]
    assert [i.severity for i in first] == [gf.IssueSeverity.CRITICAL]
    assert str(first[0]).startswith("[CRITICAL] VANISHING in layers.0 (Linear)\n  Description: ")


@pytest.mark.parametrize("seed", range(5))
def test_he_initialised_mlp_has_no_issue_at_all(seed: int) -> None:
    torch.manual_seed(seed)
    assert analysed(he_mlp()) == []


def test_huge_linear_stack_explodes_in_fc2() -> None:
    issues = analysed(huge_stack())
    assert "fc2" in [i.layer for i in issues if i.issue_type is E]
    assert issues[0].issue_type is E


@pytest.mark.parametrize("seed", range(5))
def test_normalised_stack_after_ten_adam_steps_has_no_issue(seed: int) -> None:
    torch.manual_seed(seed)
    model = Stack([784, 512, 512, 512, 10], nn.ReLU(), norm=True)
    for layer in linears(model):
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    optimizer, draw = torch.optim.Adam(model.parameters(), lr=1e-3), digits()
    for _ in range(10):
        x, y = draw()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    assert analysed(model) == []


def test_zeroed_layer_before_a_relu_is_dead_and_is_the_cause() -> None:
    model = dead_stack()
    report = gf.diagnose(model, digits(), F.cross_entropy)
    assert ("fc2", D) in [(i.layer, i.issue_type) for i in report.issues]
    assert (report.causes[0].layer, report.causes[0].issue_type) == ("fc2", D)
    assert "fc2" in [i.layer for i in analysed(dead_stack()) if i.issue_type is D]


@pytest.mark.parametrize("seed", range(5))
def test_kaiming_stack_has_no_issue(seed: int) -> None:
    torch.manual_seed(seed)
    model = Stack([784, 256, 256, 10], nn.ReLU())
    for layer in linears(model):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert analysed(model) == []


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scale_of_the_loss_changes_no_verdict(scale: float) -> None:
    def scaled(output: Tensor, target: Tensor) -> Tensor:
        return scale * F.cross_entropy(output, target)

    assert gf.diagnose(he_mlp(), digits(), scaled).issues == ()
    for build, layer, kind in ((sigmoid_mlp, "layers.0", V), (huge_stack, "fc2", E), (dead_stack, "fc2", D)):
        torch.manual_seed(0)
        report = gf.diagnose(build(), digits(), scaled)
        assert (layer, kind) in [(i.layer, i.issue_type) for i in report.issues], (scale, layer)
        torch.manual_seed(0)
        plain = gf.diagnose(build(), digits(), F.cross_entropy)
        assert (report.causes[0].layer, report.causes[0].issue_type) == (
            plain.causes[0].layer, plain.causes[0].issue_type,
        )  # fmt: skip
