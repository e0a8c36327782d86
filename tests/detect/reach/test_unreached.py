"""DEAD by the account of reach: parts of parameters, constant terms, unregistered tensors; healthy ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Issue, IssueSeverity

HIGH, MEDIUM, LOW = IssueSeverity.HIGH, IssueSeverity.MEDIUM, IssueSeverity.LOW


def square(y: Tensor) -> Tensor:
    return (y - 1).square().mean()


def found(model: nn.Module, batch: Any, loss: Callable[..., Any] = square, **options: Any) -> list[Issue]:
    options = {"steps": 5, "optimizer": torch.optim.Adam(model.parameters(), 1e-3)} | options
    record = gf.analyze(model, lambda: batch, loss, **options)
    return list(gf.detect(record, gf.dead()))


def serious(issues: list[Issue]) -> dict[str, IssueSeverity]:
    return {issue.layer: issue.severity for issue in issues if issue.severity >= MEDIUM}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))


class Codes(nn.Module):
    """An encoder whose outputs are replaced by the nearest row of a table; some rows are out of reach."""

    def __init__(self, lost: int) -> None:
        super().__init__()
        self.enc, self.book, self.dec = nn.Linear(4, 4), nn.Embedding(20, 4), nn.Linear(4, 4)
        with torch.no_grad():
            self.book.weight.copy_(self.enc(X[:20]))  # each is the nearest of one sample at least
            self.book.weight[:lost] += 1e4

    def forward(self, x: Tensor) -> Tensor:
        z = self.enc(x)
        q = self.book(torch.cdist(z.detach(), self.book.weight.detach()).argmin(-1))
        return self.dec(z + (q - z).detach()) + (q - z.detach()).square().mean()


@pytest.mark.parametrize(("lost", "severity"), [(19, HIGH), (16, MEDIUM), (8, None)])
def test_codes_that_the_model_never_picks(lost: int, severity: IssueSeverity | None) -> None:
    issues = found(Codes(lost), X)
    assert serious(issues).get("book") is severity
    if severity is not None:
        (issue,) = [i for i in issues if i.layer == "book"]
        assert "argmin" in issue.description
        assert f"picks {20 - lost} of 20" in issue.description


def test_codes_are_not_judged_by_a_batch_too_small_to_pick_them() -> None:
    assert serious(found(Codes(19), torch.randn(4, 4), steps=5)) == {}


def test_tokens_that_are_not_in_the_batch_are_nothing() -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Flatten(), nn.Linear(32, 2))
    assert found(model, torch.randint(0, 9, (64, 4))) == []


class Grid(nn.Module):
    """Weights on bins of the inputs, beside a linear path."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.bins = nn.Parameter(0.1 * torch.randn(3, 2)), nn.Parameter(torch.randn(3, 8, 2))
        self.edges = nn.Buffer(torch.linspace(-1, 1, 9))

    def forward(self, x: Tensor) -> Tensor:
        inside = ((x[..., None] >= self.edges[:-1]) & (x[..., None] < self.edges[1:])).to(x.dtype)
        return x @ self.base + torch.einsum("nib,ibo->no", inside, self.bins)


def test_inputs_outside_of_a_grid() -> None:
    issues = found(Grid(), 30 + torch.rand(32, 3))
    assert serious(issues) == {"": HIGH}
    assert "zeros of every batch" in issues[0].description
    assert issues[0].metrics["parameter"] == "bins"
    assert serious(found(Grid(), 2 * torch.rand(32, 3) - 1)) == {}


class Clamped(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.log_scale = nn.Parameter(torch.full((4,), start))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self.log_scale.clamp(-5, 2).exp())


def test_a_parameter_outside_of_its_clamp() -> None:
    issues = found(Clamped(-9.0), torch.randn(32, 4))
    assert serious(issues) == {"": HIGH}
    assert "clamp" in issues[0].description
    assert serious(found(Clamped(0.0), torch.randn(32, 4))) == {}


class Fused(nn.Module):
    """A fused projection of which one third is not used."""

    def __init__(self, take: tuple[int, ...]) -> None:
        super().__init__()
        self.qkv, self.out, self.take = nn.Linear(6, 18), nn.Linear(6, 6), take

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        return self.out(sum(torch.tanh(parts[i]) for i in self.take))


def test_a_block_of_a_fused_layer_that_nobody_uses_is_told_by_its_name() -> None:
    issues = found(Fused((0, 2)), torch.randn(32, 6))
    assert serious(issues) == {"qkv": HIGH}
    assert "rows 6..11 of 18 (the k block)" in issues[0].description
    assert serious(found(Fused((0, 1, 2)), torch.randn(32, 6))) == {}


class Reader(nn.Module):
    """A layer that reads in both directions, of whose outputs the last is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def test_positions_that_are_not_taken_are_no_features() -> None:
    record = gf.analyze(Reader(), lambda: torch.randn(8, 5, 3), square, steps=3)
    assert record.reach is not None
    assert record.reach.of("rnn.weight_hh_l0_reverse")
    assert [i for i in gf.detect(record, gf.dead()) if i.severity >= MEDIUM] == []


class Penalised(nn.Module):
    def __init__(self, graph: bool) -> None:
        super().__init__()
        self.net, self.graph = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), graph

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        between = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.net(between).sum(), between, create_graph=self.graph)
        return self.net(x), slope.norm(dim=-1)


def test_a_penalty_without_a_graph() -> None:
    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        return square(output[0]) + 10 * (output[1] - 1).square().mean()

    issues = found(Penalised(False), torch.randn(32, 4), loss)
    assert serious(issues) == {"net.2": HIGH}
    assert "create_graph=True" in issues[0].recommended_actions[0]
    assert found(Penalised(True), torch.randn(32, 4), loss) == []


class Listed(nn.Module):
    """Layers in a plain list, which no register knows."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.a, self.rest = nn.Linear(4, 4), [nn.Linear(4, 4)]
        self.rest[0].requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest[0](torch.tanh(self.a(x)))


def test_layers_in_a_plain_list() -> None:
    model = Listed(frozen=False)
    issues = found(model, torch.randn(32, 4))
    assert set(issues[0].metrics["names"]) == {"rest[0].weight", "rest[0].bias"}
    assert serious(issues) == {"": MEDIUM}
    every = torch.optim.Adam([*model.parameters(), *model.rest[0].parameters()])
    assert found(model, torch.randn(32, 4), optimizer=every) == []
    assert found(Listed(frozen=True), torch.randn(32, 4)) == []


class PrivatelyListed(nn.Module):
    """Layers in a plain list of a private name; registered as well, or not."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        self.a, self._rest = nn.Linear(4, 4), [nn.Linear(4, 4)]
        self.also = nn.ModuleList(self._rest if registered else [])

    def forward(self, x: Tensor) -> Tensor:
        return self._rest[0](torch.tanh(self.a(x)))


def test_layers_in_a_plain_list_of_a_private_name() -> None:
    issues = found(PrivatelyListed(registered=False), torch.randn(32, 4))
    assert serious(issues) == {"": MEDIUM}
    assert set(issues[0].metrics["names"]) == {"_rest[0].weight", "_rest[0].bias"}
    assert found(PrivatelyListed(registered=True), torch.randn(32, 4)) == []


class Balanced(nn.Module):
    """A bias that a rule moves, and that only takes part in a choice."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.gate, self.bias, self.moves = nn.Linear(4, 4), nn.Parameter(torch.zeros(4)), moves

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        pick = (p + self.bias).argmax(-1, keepdim=True)
        if self.moves:
            with torch.no_grad():
                self.bias.add_(0.01 * torch.sign(0.25 - F.one_hot(pick[:, 0], 4).float().mean(0)))
        return p.gather(-1, pick)


def test_a_parameter_that_a_rule_moves_is_no_fault() -> None:
    moved = found(Balanced(True), torch.randn(32, 4))
    assert serious(moved) == {}
    assert serious(found(Balanced(False), torch.randn(32, 4))) == {"": HIGH}


class Rounds(nn.Module):
    """Two kinds of nodes that update one another; the last round of one kind ends nowhere."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.rounds = nn.ModuleList(
            [nn.ModuleDict({k: nn.Linear(8, 4) for k in ("user", "item")}) for _ in range(2)]
        )
        self.head = nn.Linear(4, 2)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        for layers in self.rounds:
            both = torch.cat([user, item], -1)
            user, item = torch.tanh(layers["user"](both)), torch.tanh(layers["item"](both))  # type: ignore
            item = item.detach() if self.cut else item
        return self.head(user)


def test_the_last_round_of_what_nobody_asks_for_is_no_fault() -> None:
    batch = (torch.randn(16, 4), torch.randn(16, 4))
    assert serious(found(Rounds(cut=False), batch)) == {}
    assert "rounds.0.item" in serious(found(Rounds(cut=True), batch))


def test_an_empty_loss_is_as_severe_without_an_optimizer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    issues = found(model, torch.randn(8, 4), lambda y: (y * (y > 1e9)).sum(), optimizer=None)
    assert set(serious(issues).values()) == {HIGH}


def test_a_zero_start_is_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    assert serious(found(model, torch.randn(8, 4), optimizer=None)) == {}


class Frames(nn.Module):
    """A recurrent cell that is called on every frame, and handed a state of which `kept` says what it is."""

    def __init__(self, cell: nn.Module, kept: str = "none") -> None:
        super().__init__()
        self.enter, self.cell, self.head, self.kept = nn.Linear(4, 8), cell, nn.Linear(8, 1), kept

    def forward(self, x: Tensor) -> Tensor:
        state, answers = None, []
        for frame in x.unbind(1):
            h = F.relu(self.enter(frame))
            if isinstance(self.cell, nn.RNNBase):
                out, new = self.cell(h[:, None], state)
                out = out[:, 0]
            else:
                new = self.cell(h, state)
                out = new[0] if isinstance(new, tuple) else new
            answers.append(self.head(out))
            if self.kept == "carried":
                state = new
        return torch.cat(answers, 1)


class Elman(nn.Module):
    """A cell of two matrices, each a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, state: Tensor | None) -> Tensor:
        return torch.tanh(self.ih(x) + self.hh(torch.zeros_like(x) if state is None else state))


CELLS: dict[str, Callable[[], nn.Module]] = {
    "GRUCell": lambda: nn.GRUCell(8, 8),
    "LSTMCell": lambda: nn.LSTMCell(8, 8),
    "RNNCell": lambda: nn.RNNCell(8, 8),
    "GRU": lambda: nn.GRU(8, 8, batch_first=True),
    "LSTM": lambda: nn.LSTM(8, 8, batch_first=True),
    "of two layers": Elman,
}


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_that_begins_anew_at_every_frame(cell: str) -> None:
    x = torch.randn(16, 5, 4)
    issues = [i for i in found(Frames(CELLS[cell]()), x) if i.severity >= MEDIUM]
    (issue,) = issues
    assert issue.layer == ("cell.hh" if cell == "of two layers" else "cell")
    assert issue.severity is HIGH
    assert "each of the 5 calls" in issue.description
    assert issue.recommended_actions[0].startswith("Hand each call the state")
    assert not serious(found(Frames(CELLS[cell](), "carried"), x))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("frames", [1, 2])
def test_a_cell_that_is_called_once_or_on_two_views(cell: str, frames: int) -> None:
    assert not serious(found(Frames(CELLS[cell]()), torch.randn(16, frames, 4)))


def test_a_cell_that_is_called_for_each_sample() -> None:
    class Samples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(4, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.head(self.cell(sample[None])) for sample in x])

    assert not serious(found(Samples(), torch.randn(8, 4)))
