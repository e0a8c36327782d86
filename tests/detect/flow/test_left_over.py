"""BOTTLENECK: what operations behind a layer leave of what it gives, of which no more than that passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradflow as gf
from gradflow.records import Issue, IssueType

FRAMES, FEATURES, KINDS, NUMBER = 16, 20, 12, 16


class Told(nn.Module):
    """Says of every frame what it was, from what is left of the sequence."""

    def __init__(self, width: int, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before = nn.Conv1d(FEATURES, 32, 3, padding=1)
        self.code = nn.Conv1d(32, width, 3, padding=1)
        self.keep = keep
        self.spread = nn.Linear(width, 32 * FRAMES)
        self.head = nn.Linear(32, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.code(F.relu(self.before(x.transpose(1, 2)))))
        return self.head(F.relu(self.spread(self.keep(code)).view(len(x), FRAMES, 32)))


class Sequel(nn.Module):
    """A recurrent encoder whose last state is all that its decoder gets."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.GRU(FEATURES, width, batch_first=True)
        self.decoder = nn.GRU(width, 32, batch_first=True)
        self.head = nn.Linear(32, KINDS)

    def forward(self, x: Tensor) -> Tensor:
        last = self.encoder(x)[0][:, -1]
        return self.head(self.decoder(last[:, None].expand(-1, FRAMES, -1))[0])


class Masked(nn.Module):
    """A head over many words, at the few places that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.head = nn.Linear(FEATURES, 32), nn.Linear(32, 300)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.before(x))[:, ::8])


def narrow(model: nn.Module) -> dict[str, Issue]:
    """Return the issues of waists, by layer."""
    draw = torch.Generator().manual_seed(3)
    shapes = torch.randn(KINDS, FEATURES, generator=draw)
    now: list[Tensor] = []

    def batch() -> Tensor:
        kind = torch.randint(0, KINDS, (NUMBER, FRAMES // 4), generator=draw).repeat_interleave(4, 1)
        now[:] = [kind]
        return shapes[kind] + 0.1 * torch.randn(NUMBER, FRAMES, FEATURES, generator=draw)

    def loss(output: Tensor) -> Tensor:
        kind = now[0][:, :: FRAMES // output.shape[1]]
        return F.cross_entropy(output.flatten(0, 1), kind.flatten())

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    report = gf.diagnose(model, batch, loss, steps=8, optimizer=optimizer)
    return {i.layer: i for i in report.issues if i.issue_type is IssueType.BOTTLENECK}


@pytest.mark.parametrize("keep", [lambda c: c.mean(2), lambda c: c[:, :, -1], lambda c: c.amax(2)])
def test_two_numbers_left_of_a_sequence_are_a_waist(keep: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    issue = narrow(Told(2, keep))["code"]
    assert issue.severity.is_serious
    assert issue.metrics["width"] == 2
    assert "2 numbers per sample (what `" in issue.description
    assert "Widen code" in issue.recommended_actions[0]


def test_the_last_state_of_a_narrow_encoder_is_a_waist() -> None:
    torch.manual_seed(0)
    issue = narrow(Sequel(2))["encoder"]
    assert issue.severity.is_serious
    assert issue.metrics["width"] == 2


@pytest.mark.parametrize("width", [16, 32])
def test_no_gradient_behind_can_need_more_than_the_state_has(width: int) -> None:
    torch.manual_seed(0)
    assert not narrow(Sequel(width))


@pytest.mark.parametrize(
    "make", [Masked, lambda: Told(8, lambda c: c.mean(2)), lambda: Told(32, lambda c: c[:, :, -1])]
)
def test_what_is_left_is_enough_for_the_rank_behind(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert not narrow(make())


@pytest.mark.parametrize(("width", "sick"), [(2, True), (16, False)])
def test_a_sequence_whose_first_axis_is_time(width: int, sick: bool) -> None:
    class Turned(Sequel):
        def forward(self, x: Tensor) -> Tensor:
            last = self.encoder(x.transpose(0, 1))[0][-1]
            return self.head(self.decoder(last[None].expand(FRAMES, -1, -1))[0]).transpose(0, 1)

    torch.manual_seed(0)
    model = Turned(width)
    model.encoder.batch_first = model.decoder.batch_first = False
    assert any(issue.severity.is_serious for issue in narrow(model).values()) is sick
