"""Verdicts on outputs as a whole: too large, all zero, of the right level; and experts that nothing picks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import IssueSeverity, IssueType

SERIOUS = {"CRITICAL", "HIGH", "MEDIUM"}


def told(model: nn.Module, batches: object, loss: object, rate: float = 1e-3) -> list[tuple[IssueType, str]]:
    """Return the serious verdicts under Adam, or under no optimizer where the rate is zero."""
    optimizer = torch.optim.Adam(model.parameters(), rate) if rate else None
    report = gf.diagnose(model, batches, loss, optimizer=optimizer, seed=0)  # type: ignore[arg-type]
    return [(i.issue_type, i.layer) for i in report.issues if i.severity.value in SERIOUS]  # type: ignore[misc]


class Generated(nn.Module):
    """A net of two layers, whose weights another layer gives for each sample."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8 * 32), nn.Linear(4, 32 * 2)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.weight, std=std)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = torch.bmm(x[:, None], self.first(c).view(-1, 8, 32)).relu()
        return torch.bmm(h, self.last(c).view(-1, 32, 2))[:, 0]


@pytest.mark.parametrize(("std", "sick"), [(1.0, True), (0.08, False)])
def test_generated_weights_of_the_wrong_scale(std: float, sick: bool) -> None:
    torch.manual_seed(0)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, c = torch.randn(64, 8), torch.randn(64, 4)
        return (x, c), (x[:, :2] * c[:, :2]).tanh()

    found = told(Generated(std), batch, nn.MSELoss())
    assert ((IssueType.EXPLODING, "last") in found) is sick
    assert sick or not found


class Skips(nn.Module):
    """A generator that adds up the pictures of its stages."""

    def __init__(self, stages: int, width: int, picture: float, stage: float) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(width if i else 8, width) for i in range(stages))
        self.pictures = nn.ModuleList(nn.Linear(width, 32) for _ in range(stages))
        for layer in self.pictures:
            nn.init.normal_(layer.weight, std=picture)  # type: ignore[arg-type]
        for layer in self.stages:
            nn.init.normal_(layer.weight, std=stage * layer.in_features**-0.5)  # type: ignore[arg-type, operator]

    def forward(self, code: Tensor) -> Tensor:
        total = code.new_zeros(())
        for stage, picture in zip(self.stages, self.pictures, strict=True):
            code = F.leaky_relu(stage(code), 0.2)
            total = total + picture(code)
        return total


@pytest.mark.parametrize(
    ("stages", "width", "picture", "stage", "sick"),
    [(3, 32, 1.0, 1.0, False), (3, 64, 1.0, 1.0, False), (5, 32, 0.7, 1.2, False), (1, 32, 1.0, 1.4, False),
     (3, 32, 5.0, 1.0, True), (4, 32, 1.0, 6.0, True)],
)  # fmt: skip
def test_pictures_of_several_stages_that_are_added_up(
    stages: int, width: int, picture: float, stage: float, sick: bool
) -> None:
    torch.manual_seed(0)
    wanted = torch.randn(8, 32) / 8**0.5

    def batch() -> tuple[Tensor, Tensor]:
        code = torch.randn(32, 8)
        return code, torch.tanh(0.5 * code @ wanted)

    found = told(Skips(stages, width, picture, stage), batch, nn.MSELoss(), 1e-2)
    assert (IssueType.EXPLODING in {kind for kind, _ in found}) is sick
    assert sick or not found


@pytest.mark.parametrize(("bias", "sick"), [(-6.0, True), (0.5, False)])
@pytest.mark.parametrize("activation", [nn.ReLU(), F.relu], ids=["module", "function"])
def test_outputs_that_are_zero_for_all(bias: float, sick: bool, activation: object) -> None:
    torch.manual_seed(1)

    class Positive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out, self.act = nn.Linear(6, 32), nn.Linear(32, 3), activation

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.out(self.body(x).tanh()))  # type: ignore[operator]

    model = Positive()
    nn.init.constant_(model.out.bias, bias)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6)
        return x, x[:, :3].abs()

    found = told(model, batch, nn.MSELoss(), 1e-2)
    assert any(kind is IssueType.DEAD and layer in ("out", "act") for kind, layer in found) is sick
    assert sick or not found


def test_a_factor_that_starts_at_zero_is_a_start() -> None:
    torch.manual_seed(2)

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Embedding(20, 8), nn.Embedding(20, 8)
            nn.init.zeros_(self.right.weight)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (self.left(a) * self.right(b)).sum(-1)

    def batch() -> tuple[tuple[Tensor, Tensor], Tensor]:
        a, b = torch.randint(20, (128,)), torch.randint(20, (128,))
        return (a, b), ((a + b) % 2).float()

    for rate in (0.0, 1e-2):
        assert told(Factors(), batch, nn.BCEWithLogitsLoss(), rate) == []


@pytest.mark.parametrize(
    ("idle", "optimizer", "sick"), [(1, False, False), (1, True, True), (3, False, True)]
)
def test_experts_that_nothing_picks(idle: int, optimizer: bool, sick: bool) -> None:
    """One of four may be picked after some steps; three of four, or one that no step picks, are not."""
    torch.manual_seed(3)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([expert(x) for expert in self.experts[idle:]]).mean(0)  # type: ignore[misc]

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6)
        return x, (x[:, 0] > 0).long()

    found = told(Experts(), batch, nn.CrossEntropyLoss(), 1e-2 if optimizer else 0.0)
    assert any(kind is IssueType.DEAD for kind, _ in found) is sick


class Routed(nn.Module):
    """Each row goes to one of four experts, by a router of scores that are as large as it is told."""

    def __init__(self, size: float, lean: tuple[float, ...]) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        nn.init.normal_(self.router.weight, std=size)
        with torch.no_grad():
            self.router.bias.copy_(torch.tensor(lean))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(1).max(1)
        y = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        return y


@pytest.mark.parametrize(
    ("size", "lean", "kinds"),
    [
        (0.1, (0.0, 0.0, 0.0, -0.9), []),  # one is not picked yet
        (0.1, (0.0, 0.0, -0.9, -0.9), ["DEAD", "DEAD"]),  # half are not
        (9.0, (0.0, 0.0, -900.0, -900.0), ["DEAD", "DEAD", "SATURATION"]),
    ],
)
def test_experts_that_a_router_does_not_pick(size: float, lean: tuple[float, ...], kinds: list[str]) -> None:
    """A fresh router is uneven, and steps may change that; a saturated one explains whom it never picks."""
    torch.manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6)
        return x, (x[:, 0] > 0).long()

    model = Routed(size, lean)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    report = gf.diagnose(model, batch, nn.CrossEntropyLoss(), optimizer=optimizer, seed=0)
    assert sorted(i.issue_type.value for i in report.issues if i.severity >= IssueSeverity.MEDIUM) == kinds
    if "SATURATION" in kinds:
        (cause,) = report.causes
        assert (cause.layer, cause.issue_type) == ("router", IssueType.SATURATION)


class Masked(Routed):
    """The same, where all experts see all rows, and the choice takes one of their answers."""

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(1).max(1)
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return weight[:, None] * answers[torch.arange(len(x)), chosen]


@pytest.mark.parametrize(("lean", "idle"), [((0.0, 0.0, 0.0, -0.9), 0), ((0.0, 0.0, -0.9, -0.9), 2)])
def test_experts_of_which_the_answers_are_not_taken(lean: tuple[float, ...], idle: int) -> None:
    torch.manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 6)
        return x, (x[:, 0] > 0).long()

    model = Masked(0.1, lean)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    report = gf.diagnose(model, batch, nn.CrossEntropyLoss(), optimizer=optimizer, seed=0)
    dead = [i for i in report.issues if i.issue_type is IssueType.DEAD and i.severity >= IssueSeverity.MEDIUM]
    assert len({issue.layer.rpartition(".")[0] for issue in dead}) == idle


def test_an_infinite_loss_says_nothing_of_outputs_that_are_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    with torch.no_grad():
        model[2].weight.mul_(0.01)  # type: ignore[operator]
    found = told(model, lambda: torch.randn(64, 6), lambda y: y.square().sum() + 1e39)
    assert all(kind is not IssueType.BOTTLENECK for kind, _ in found)


def test_an_embedding_of_which_a_loss_compares_the_rows() -> None:
    """Triplets by the hardest alone, once the net has given in: all rows alike, the loss at its margin."""
    torch.manual_seed(4)
    kinds = torch.arange(32) % 4

    def loss(z: Tensor) -> Tensor:
        apart = torch.cdist(z, z)
        same = kinds[:, None] == kinds[None]
        positive = apart.masked_fill(~same, 0.0).amax(1)
        negative = apart.masked_fill(same, 1e9).amin(1)
        return F.relu(positive - negative + 0.3).mean()

    def batch() -> Tensor:
        return torch.randn(4, 10)[kinds] + 2.0 * torch.randn(32, 10)

    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))
    assert told(model, batch, loss) == []
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # type: ignore[operator]
        model[2].bias.add_(1.0)  # type: ignore[operator]
    assert (IssueType.BOTTLENECK, "2") in told(model, batch, loss, 1e-4)


def test_values_at_their_level_need_no_more() -> None:
    """A value head whose targets hardly vary: its tanh may be at its ends, and hardly any gradient comes."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    with torch.no_grad():
        model[0].weight.mul_(40.0)  # type: ignore[operator]
        model[2].bias.fill_(60.0)  # type: ignore[operator]

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(64, 4), 60.0 + torch.randn(64, 1)

    assert told(model, batch, nn.MSELoss(), 0.0) == []
    far = [(x, y - 60.0) for x, y in (batch() for _ in range(5))]
    assert (IssueType.SATURATION, "1") in told(model, far, nn.MSELoss(), 0.0)


class Twins(nn.Module):
    """Predicts what a slow copy of its encoder makes of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.teacher = (
            nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)
        )
        self.teacher.load_state_dict(self.encoder.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x), self.teacher(x)


@pytest.mark.parametrize(("growth", "sick"), [(1.2, False), (1.5, True)])
def test_a_rise_of_next_to_nothing_beside_what_outputs_are(growth: float, sick: bool) -> None:
    """Outputs that agree to a thousandth may come to agree to a percent, but not to differ by their size."""
    torch.manual_seed(0)
    model, noise = Twins(), [1e-3]

    def batch() -> Tensor:
        return torch.randn(64, 6)

    def loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
        noise[0] *= growth
        ours, theirs = outputs
        return F.mse_loss(ours * (1 + noise[0]), theirs)

    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    report = gf.diagnose(model, batch, loss, optimizer=optimizer, seed=0)
    assert report.record.losses[-1] > 3 * report.record.losses[0]
    serious = [i for i in report.issues if i.severity.value in SERIOUS]
    assert any(i.issue_type is IssueType.UNSTABLE for i in serious) is sick
