"""Blocks that differ from their siblings, and norm layers whose epsilon swallows what enters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.detect import copied_units, held_at_zero, misscaled_norms, swallowed_norms, uneven_siblings
from gradflow.detect.parts.peers import standing_apart
from gradflow.records import Issue, IssueSeverity, IssueType

Break = Callable[[nn.ModuleList], None]


class Block(nn.Module):
    """Two residual branches: a fused projection and its output, and an MLP."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)
        self.share, self.skip = 1.0, True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        branch = self.share * self.out(torch.sigmoid(q * k) * v)
        x = x + branch if self.skip else branch
        return x + self.share * self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def issues(
    broken: Break | None,
    detector: Callable[..., object],
    *,
    depth: int = 5,
    train: int = 0,
    rate: float = 3e-3,
) -> list[Issue]:
    """Return what a detector says of a net that is broken, trained, and diagnosed with its optimizer."""
    torch.manual_seed(0)
    net, target = Net(depth), torch.randn(8, 3)
    if broken is not None:
        broken(net.blocks)
    optimizer = torch.optim.Adam(net.parameters(), rate)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 8)
        return x, torch.sin(x @ target)

    for _ in range(train):
        x, y = batch()
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    record = gf.analyze(net, batch, F.mse_loss, steps=4, optimizer=optimizer)
    return list(gf.detect(record, detector))


def scaled(name: str, factor: float) -> Break:
    def apply(blocks: nn.ModuleList) -> None:
        with torch.no_grad():
            blocks[2].get_parameter(name).mul_(factor)

    return apply


@pytest.mark.parametrize(
    ("name", "factor", "layer", "kind"),
    [
        ("out.weight", 10.0, "blocks.2.out", IssueType.EXPLODING),
        ("down.weight", 0.1, "blocks.2.down", IssueType.VANISHING),
        ("norm1.weight", 5.0, "blocks.2.norm1", IssueType.EXPLODING),
        ("norm2.weight", 0.1, "blocks.2.norm2", IssueType.VANISHING),
    ],
)
def test_a_parameter_off_scale_is_told(name: str, factor: float, layer: str, kind: IssueType) -> None:
    (issue,) = issues(scaled(name, factor), uneven_siblings())
    assert (issue.layer, issue.issue_type) == (layer, kind)
    assert issue.metrics["ratio"] == pytest.approx(factor, rel=0.3)
    assert issue.layer_type in ("Linear", "LayerNorm")
    assert "4 other blocks" in issue.description


def test_a_part_of_a_fused_matrix_is_told() -> None:
    def apply(blocks: nn.ModuleList) -> None:
        with torch.no_grad():
            blocks[3].get_parameter("qkv.weight")[16:32] *= 20

    (issue,) = issues(apply, uneven_siblings())
    assert (issue.layer, issue.issue_type) == ("blocks.3.qkv", IssueType.EXPLODING)
    assert "second third of its rows" in issue.description
    assert issue.severity is IssueSeverity.HIGH


def test_zeros_that_are_not_trained_are_told_and_those_of_a_start_are_not() -> None:
    def held(blocks: nn.ModuleList) -> None:
        nn.init.zeros_(blocks[1].get_parameter("down.weight")).requires_grad_(False)

    found = {(i.layer, i.issue_type) for i in issues(held, uneven_siblings())}
    assert ("blocks.1.down", IssueType.DEAD) in found
    start = scaled("down.weight", 0.0)
    assert not [i for i in issues(start, uneven_siblings()) if i.issue_type is IssueType.DEAD]


@pytest.mark.parametrize(("share", "sick"), [(0.0, False), (30.0, True)])
def test_a_block_that_alone_learns_from_nothing(share: float, sick: bool) -> None:
    """One that is put between frozen ones, and adds zero at first, or far too much."""

    def put_in(blocks: nn.ModuleList) -> None:
        for name, parameter in blocks.named_parameters():
            parameter.requires_grad_(name.startswith("2."))
            if name in ("2.out.weight", "2.out.bias", "2.down.weight", "2.down.bias"):
                parameter.data.mul_(share)

    found = issues(put_in, uneven_siblings(), rate=1.0)
    assert any(i.layer == "blocks.2" and i.severity.is_serious for i in found) is sick


@pytest.mark.parametrize(("frozen", "severity"), [(False, IssueSeverity.HIGH), (True, IssueSeverity.LOW)])
def test_zeros_in_a_part_that_is_frozen_whole_keep_nothing_from_learning(
    frozen: bool, severity: IssueSeverity
) -> None:
    """With the norm, the map before it and its bias trained, these get nothing; frozen, they need nothing."""

    def held(blocks: nn.ModuleList) -> None:
        nn.init.zeros_(blocks[1].get_parameter("down.weight")).requires_grad_(False)
        for name in ("up", "norm2") if frozen else ():
            blocks[1].get_submodule(name).requires_grad_(False)

    (issue,) = issues(held, held_at_zero())
    assert (issue.layer, issue.severity) == ("blocks.1.down", severity)


class Rows(nn.Module):
    """A block that adds to two rows of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.share = nn.Linear(16, 16), nn.Linear(16, 16), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([self.first(x[:, 0]), self.share * self.second(x[:, 1])], 1)


@pytest.mark.parametrize("is_read", [True, False])
def test_rows_that_nothing_reads_may_be_large(is_read: bool) -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Rows() for _ in range(4)))
    with torch.no_grad():
        blocks[3].get_parameter("second.weight").mul_(300)
        blocks[3].get_parameter("second.weight").requires_grad_(False)

    def read(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out.mean(1) if is_read else out[:, 0], y)

    record = gf.analyze(blocks, [(torch.randn(8, 2, 16), torch.randn(8, 16))] * 4, read)
    found = [i for i in gf.detect(record, uneven_siblings()) if i.layer == "3"]
    assert bool(found) == is_read


class Round(nn.Module):
    """Hands on what it has not explained, by a share, and gives a forecast."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.fc, self.back, self.forecast = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.share = share
        if not share:
            del self.back

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc(x))
        return x - self.share * self.back(h) if self.share else x, self.forecast(h)


class Rounds(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.rounds = nn.ModuleList(Round(share if i == 3 else 1.0) for i in range(4))
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), 4)
        for one in self.rounds:
            x, forecast = one(x)
            total = total + forecast
        return total + self.last(x)


@pytest.mark.parametrize("share", [0.0, 1e-3])
def test_a_round_that_hands_its_input_on_as_it_is(share: float) -> None:
    """The last of some rounds has nothing to take from its input; one that takes next to nothing is odd."""
    torch.manual_seed(0)
    record = gf.analyze(
        Rounds(share), lambda: torch.randn(32, 16), lambda y: (y - 1).square().mean(), steps=4
    )
    found = [i.layer for i in gf.detect(record, uneven_siblings())]
    assert found == (["rounds.3"] if share else [])


def test_a_missing_skip_connection_is_told() -> None:
    def apply(blocks: nn.ModuleList) -> None:
        blocks[2].skip = False  # type: ignore[assignment]

    (issue,) = issues(apply, uneven_siblings())
    assert (issue.layer, issue.issue_type) == ("blocks.2", IssueType.BOTTLENECK)
    assert "skip connection" in issue.description


@pytest.mark.parametrize(("share", "kind"), [(0.01, IssueType.VANISHING), (50.0, IssueType.EXPLODING)])
def test_branches_off_scale_are_told(share: float, kind: IssueType) -> None:
    def apply(blocks: nn.ModuleList) -> None:
        blocks[2].share = share  # type: ignore[assignment]

    (issue,) = issues(apply, uneven_siblings())
    assert (issue.layer, issue.issue_type) == ("blocks.2", kind)


@pytest.mark.parametrize("train", [0, 30, 200])
@pytest.mark.parametrize("depth", [3, 5])
def test_blocks_as_they_are_made_and_trained_are_left_alone(train: int, depth: int) -> None:
    for detector in (uneven_siblings(), swallowed_norms(), misscaled_norms(), copied_units()):
        assert issues(None, detector, depth=depth, train=train) == []


def test_weights_that_shrink_with_depth_are_left_alone() -> None:
    def apply(blocks: nn.ModuleList) -> None:
        with torch.no_grad():
            for i, block in enumerate(blocks):
                for name in ("out.weight", "down.weight"):
                    block.get_parameter(name).mul_((i + 1) ** -0.5)

    assert issues(apply, uneven_siblings(), depth=12) == []


def test_two_blocks_have_no_siblings_to_be_held_against() -> None:
    def apply(blocks: nn.ModuleList) -> None:
        with torch.no_grad():
            blocks[1].get_parameter("out.weight").mul_(50)

    assert issues(apply, uneven_siblings(), depth=2) == []


@pytest.mark.parametrize(("epsilon", "severity"), [(50.0, IssueSeverity.MEDIUM), (1e5, IssueSeverity.HIGH)])
def test_an_epsilon_that_swallows_is_told(epsilon: float, severity: IssueSeverity) -> None:
    def apply(blocks: nn.ModuleList) -> None:
        blocks[0].norm1.eps = epsilon  # type: ignore[union-attr, assignment]

    (issue,) = issues(apply, swallowed_norms())
    assert (issue.layer, issue.issue_type, issue.severity) == (
        "blocks.0.norm1",
        IssueType.VANISHING,
        severity,
    )
    assert f"{epsilon:.3g}" in issue.description


def test_a_small_input_beside_a_usual_epsilon_is_left_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1))
    record = gf.analyze(net, lambda: 1e-5 * torch.randn(16, 8), lambda y: y.square().mean(), steps=2)
    assert record.parts.norms[0].variance[0] < 1e-3 * record.parts.norms[0].epsilon
    assert gf.detect(record, swallowed_norms()) == ()


def test_units_that_start_alike_and_stay_so_are_told() -> None:
    def apply(blocks: nn.ModuleList) -> None:
        for name in ("up.weight", "down.weight"):
            nn.init.constant_(blocks[2].get_parameter(name), 0.1)
        nn.init.zeros_(blocks[2].get_parameter("up.bias"))

    found = issues(apply, copied_units())
    assert {(i.layer, i.issue_type) for i in found} == {
        ("blocks.2.up", IssueType.BOTTLENECK),
        ("blocks.2.down", IssueType.BOTTLENECK),
    }
    assert all(i.severity is IssueSeverity.HIGH for i in found)


def test_copies_that_a_norm_layer_behind_them_turns_to_zeros() -> None:
    for copied in (True, False):
        torch.manual_seed(0)
        first = nn.Linear(8, 16)
        if copied:
            nn.init.constant_(first.weight, 0.1)
            nn.init.zeros_(first.bias)
        model = nn.Sequential(first, nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        record = gf.analyze(model, lambda: torch.randn(16, 8), lambda y: (y - 1).square().mean(), steps=6,
                            optimizer=optimizer, seed=0)  # fmt: skip
        assert [i.layer for i in gf.detect(record, copied_units())] == (["0"] if copied else [])


def test_units_that_the_first_step_tells_apart_are_left_alone() -> None:
    def apply(blocks: nn.ModuleList) -> None:
        weight = blocks[2].get_parameter("up.weight")
        with torch.no_grad():
            weight.copy_(weight[:8].repeat(4, 1))

    assert issues(apply, copied_units()) == []


def test_what_stands_apart_stands_apart_from_all_others() -> None:
    values = {"a": 1.0, "b": 1.2, "c": 0.9, "d": 1.1, "e": 0.0}
    assert list(standing_apart(values, 4.0)) == ["e"]
    assert standing_apart(values, 4.0)["e"].ratio == 0.0
    assert standing_apart({"a": 1.0, "b": 8.0}, 4.0) == {}
    assert standing_apart({"a": 0.0, "b": 0.0, "c": 1.0}, 4.0) == {}
    assert standing_apart({"a": 1.0, "b": 1.0, "c": float("nan")}, 4.0) == {}


@pytest.mark.parametrize(
    ("gain", "kind"),
    [(0.05, IssueType.VANISHING), (5.0, IssueType.EXPLODING), (1.0, None), (0.0, None), (2.0, None)],
)
def test_gains_that_all_start_off_scale_are_told(gain: float, kind: IssueType | None) -> None:
    def apply(blocks: nn.ModuleList) -> None:
        for block in blocks:
            nn.init.constant_(block.get_parameter("norm1.weight"), gain)

    found = {(i.layer, i.issue_type) for i in issues(apply, misscaled_norms())}
    assert found == ({(f"blocks.{i}.norm1", kind) for i in range(5)} if kind else set())


def test_a_bias_that_drowns_the_gain_is_told() -> None:
    def apply(blocks: nn.ModuleList) -> None:
        nn.init.constant_(blocks[1].get_parameter("norm2.bias"), 12.0)

    (issue,) = issues(apply, misscaled_norms())
    assert (issue.layer, issue.issue_type) == ("blocks.1.norm2", IssueType.BOTTLENECK)
    assert issue.magnitude == pytest.approx(12.0, rel=0.1)


@pytest.mark.parametrize("trained", [False, True])
def test_a_matrix_that_is_held_at_zero_is_told(trained: bool) -> None:
    def apply(blocks: nn.ModuleList) -> None:
        for block in blocks:
            nn.init.zeros_(block.get_parameter("out.weight")).requires_grad_(trained)
            nn.init.zeros_(block.get_parameter("out.bias")).requires_grad_(False)

    found = [(i.layer, i.issue_type) for i in issues(apply, held_at_zero())]
    assert found == ([] if trained else [(f"blocks.{i}.out", IssueType.DEAD) for i in range(5)])


class Behind(nn.Module):
    """A block whose norm stands behind the sum, with small weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


def test_a_first_norm_that_makes_a_small_input_large_is_no_odd_block() -> None:
    torch.manual_seed(0)
    net = Net()
    net.blocks = nn.ModuleList(Behind() for _ in range(4))
    nn.init.normal_(net.embed.weight, std=0.01)
    nn.init.zeros_(net.embed.bias)
    x, y = torch.randn(32, 8), torch.randint(0, 3, (32,))
    record = gf.analyze(net, [(x, y)] * 5, nn.CrossEntropyLoss(), steps=5)
    first, *others = (float(block.added[0]) for block in record.parts.blocks)
    assert first > 8 * max(others)
    assert not list(uneven_siblings()(record))
