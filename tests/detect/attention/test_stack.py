"""Stacks whose blocks of attention all lack a skip connection or a norm, and those that only look so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradflow as gf
from gradflow.records import Issue, IssueType

WIDTH, WORDS, TIME = 32, 24, 12


class Block(nn.Module):
    """Attention and an MLP; `skip` multiplies what goes past, `gate` what they add."""

    def __init__(self, skip: float, normed: bool, gate: float) -> None:
        super().__init__()
        norms = [nn.LayerNorm(WIDTH) if normed else nn.Identity() for _ in range(2)]
        self.norm1, self.norm2 = norms
        self.attn = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.skip = skip
        self.gates = nn.Parameter(torch.full((2,), gate)) if gate != 1 else torch.ones(2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.15)
        nn.init.normal_(self.attn.in_proj_weight, std=0.15)

    def joined(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the stream with what a branch adds."""
        return branch if self.skip == 0 else self.skip * x + branch

    def forward(self, x: Tensor) -> Tensor:
        """Return what follows x of shape (batch, time, width)."""
        h = self.norm1(x)
        x = self.joined(x, self.gates[0] * self.attn(h, h, h, need_weights=False)[0])
        return self.joined(x, self.gates[1] * self.mlp(self.norm2(x)))


class Net(nn.Module):
    """Words, blocks, and a class for every sequence."""

    def __init__(self, skip: float = 1.0, normed: bool = True, gate: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList([Block(skip, normed, gate) for _ in range(4)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Return scores for every word of words, of shape (batch, time)."""
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Outside(nn.Module):
    """The same with a list of attention layers, past which the model leads its stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.attns = nn.ModuleList([nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(4)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(4)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        """Return scores for every word of words, of shape (batch, time)."""
        x = self.embed(words)
        for attn, norm in zip(self.attns, self.norms, strict=True):
            h = norm(x)
            x = x + attn(h, h, h, need_weights=False)[0]
        return self.head(x)


def issues_of(model: nn.Module, rate: float = 1e-3) -> list[Issue]:
    """Return what a stack is told of that is to repeat the word of three places before."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(WORDS, (20, 16, TIME), generator=g)
    batches = [(w, w.roll(3, 1)) for w in words]
    cross_entropy = nn.CrossEntropyLoss()
    report = gf.diagnose(
        model,
        batches,
        lambda scores, target: cross_entropy(scores.flatten(0, 1), target.flatten()),
        optimizer=torch.optim.Adam(model.parameters(), rate),
    )
    return [issue for issue in report.issues if issue.severity.value not in ("LOW", "INFO")]


@pytest.mark.parametrize(
    ("skip", "normed", "kind"),
    [
        (0.0, True, IssueType.BOTTLENECK),
        (0.1, True, IssueType.BOTTLENECK),
        (1.0, False, IssueType.EXPLODING),
    ],
)
def test_what_all_blocks_lack_is_told_at_the_first(skip: float, normed: bool, kind: IssueType) -> None:
    torch.manual_seed(0)
    found = issues_of(Net(skip, normed), 3e-3)
    assert (kind, "blocks") in {(issue.issue_type, issue.layer.partition(".")[0]) for issue in found}


@pytest.mark.parametrize("rate", [1e-4, 3e-3])
def test_whole_blocks_are_not_told_of(rate: float) -> None:
    torch.manual_seed(0)
    assert not issues_of(Net(), rate)


def test_branches_that_start_as_nothing_need_no_norm() -> None:
    torch.manual_seed(0)
    assert not issues_of(Net(normed=False, gate=0.0))


def test_a_way_past_attention_may_lie_outside_of_the_blocks() -> None:
    torch.manual_seed(0)
    assert not issues_of(Outside())
