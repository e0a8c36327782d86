"""Codes without gradient that a model never picks: how picks are counted, and the verdicts."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from gradflow.detect import idle_codes
from gradflow.records import ChoiceRecord, Issue, IssueSeverity, IssueType

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(2))
READ = ("embedding", "getitem", "index_select", "one_hot", "scatter")


class Quantiser(nn.Module):
    """Nearest codes, in a buffer that moving averages update, straight through."""

    def __init__(self, codes: Tensor, read: str) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.read, self.seen = read, []

    def looked_up(self, index: Tensor) -> Tensor:
        codes: Tensor = self.codes  # type: ignore[assignment]
        if self.read == "embedding":
            return F.embedding(index, codes)
        if self.read == "getitem":
            return codes[index]
        if self.read == "index_select":
            return codes.index_select(0, index)
        if self.read == "one_hot":
            return F.one_hot(index, len(codes)).float() @ codes
        rows = torch.zeros(len(index), len(codes)).scatter_(1, index[:, None], 1)
        return torch.matmul(rows, codes)

    def forward(self, z: Tensor) -> Tensor:
        index = torch.cdist(z.detach(), self.codes).argmin(1)  # type: ignore[arg-type]
        self.seen.append(index.clone())
        return z + (self.looked_up(index) - z).detach()


class Speech(nn.Module):
    """Encoder, quantiser and decoder of frames."""

    def __init__(self, codes: Tensor, read: str = "embedding") -> None:
        super().__init__()
        self.enc, self.quantise, self.dec = nn.Linear(6, 4), Quantiser(codes, read), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.quantise(self.enc(x)))


def near(number: int) -> Tensor:
    return 0.5 * torch.randn(number, 4)


def far(number: int) -> Tensor:
    """All but two of the codes are where nothing comes."""
    codes = near(number)
    codes[2:] += 9
    return codes


def record_of(model: nn.Module, **options: Any) -> gf.FlowRecord:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return gf.analyze(model, lambda: X, lambda y: F.mse_loss(y, X), steps=6, optimizer=optimizer, **options)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("read", READ)
def test_picks_are_counted_however_they_are_read(read: str) -> None:
    model = Speech(near(40), read)
    (found,) = record_of(model).parts.choices
    assert (found.layer, found.num_codes, found.num_choices) == ("quantise", 40, 2 * 96)


def test_picks_are_those_of_the_first_step_and_the_last() -> None:
    model = Speech(near(40))
    record = gf.analyze(model, lambda: X, lambda y: F.mse_loss(y, X), steps=3)  # the weights stay
    with torch.no_grad():
        slowly = {int(torch.stack([(z - c).norm() for c in near_of(model)]).argmin()) for z in model.enc(X)}
    assert record.parts.choices[0].num_picked == len(slowly)


def near_of(model: Speech) -> Tensor:
    return model.quantise.get_buffer("codes")


@pytest.mark.parametrize("read", READ)
def test_codes_that_nothing_comes_near(read: str) -> None:
    record = record_of(Speech(far(40), read))
    (issue,) = idle_codes()(record)
    assert (issue.layer, issue.issue_type) == ("quantise", IssueType.BOTTLENECK)
    assert issue.severity is IssueSeverity.HIGH
    assert issue.metrics["num_picked"] <= 2


@pytest.mark.parametrize("read", READ)
def test_codes_that_are_picked(read: str) -> None:
    assert not list(idle_codes()(record_of(Speech(near(40), read))))


class Tokens(nn.Module):
    """Frozen word vectors that the batch picks from, a head of classes, and a count of what it gets right."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding.from_pretrained(torch.randn(16, 4))
        self.head, self.right = nn.Linear(4, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        picked = (x[:, 0] > 0).long()
        scores = self.head(self.words(picked))
        self.right = int((scores.argmax(1) == picked).sum())
        chosen = F.one_hot(scores.argmax(1), 16)
        return scores + 0 * chosen.sum()


def test_tables_that_the_batch_picks_from_and_choices_that_are_counted() -> None:
    model = Tokens()
    record = gf.analyze(model, lambda: X, lambda y: y.square().mean(), steps=3)
    assert record.parts.choices == ()


@pytest.mark.parametrize(
    ("last", "codes", "choices", "told"),
    [(1, 32, 200, True), (2, 32, 64, True), (2, 32, 60, False), (4, 64, 200, False), (2, 8, 200, False)],
)
def test_what_is_told(last: int, codes: int, choices: int, told: bool) -> None:
    record = record_of(Speech(near(8)))
    found = ChoiceRecord(
        layer="quantise", num_codes=codes, num_picked=last + 2, num_choices=choices, by_step=(last + 2, last)
    )
    record = attrs.evolve(record, parts=attrs.evolve(record.parts, choices=(found,)))
    assert bool(list(idle_codes()(record))) is told


class Codec(nn.Module):
    """Encode, take the nearest of some codes that moving averages update, straight through, decode."""

    def __init__(self, codes: Tensor, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 6))
        self.quantise = Quantiser(codes, "getitem")
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 6))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x) + 4
        if not self.detached:
            return self.decoder(self.quantise(z))
        return self.decoder(z + (self.quantise(z.detach()) - z).detach())


def alike(layer: str) -> Issue:
    return Issue(
        layer=layer,
        layer_type="Linear",
        issue_type=IssueType.BOTTLENECK,
        severity=IssueSeverity.HIGH,
        description="All rows of its output are alike.",
        magnitude=1.0,
    )


@pytest.mark.parametrize("detached", [True, False])
def test_what_is_alike_behind_codes_that_are_not_picked_is_explained_by_them(detached: bool) -> None:
    model = Codec(torch.cat([torch.zeros(1, 6), -torch.rand(39, 6)]), detached)
    record = record_of(model)
    (issue,) = idle_codes()(record)
    (cause,) = gf.find_causes(record, [alike("decoder.0"), issue])
    assert [i.layer for i in cause.issues] == ["quantise", "decoder.0"]
