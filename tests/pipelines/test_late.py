"""What is found late in training with no pipeline named, and models that look like it and have learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

import gradflow as gf
from tests.pipelines.models import Read

MEDIUM, LOW = gf.IssueSeverity.MEDIUM, gf.IssueSeverity.LOW


def severities(report: gf.Report, layer: str) -> list[gf.IssueSeverity]:
    return [issue.severity for issue in report.issues if issue.layer == layer]


def trained(model: nn.Module, draw: Any, loss: Any, steps: int, rate: float = 3e-3) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        x, y = draw()
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return optimizer


# ------------------------------------------------------------------------------------ attention


class Reader(nn.Module):
    """Attention by positions: enough to say a sequence backwards, and sharp once it does."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(10, 32), nn.Parameter(torch.randn(8, 32))
        self.attn, self.out = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place
        return self.out(h + self.attn(h, h, h)[0])


def backwards() -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 10, (32, 8))
    return x, x.flip(1)


def by_token(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), y.flatten())


def test_sharp_attention_that_knows_is_no_illness_and_one_that_guesses_is() -> None:
    torch.manual_seed(0)
    model, batches = Reader(), [backwards() for _ in range(4)]
    assert gf.diagnose(model, batches, by_token).ok
    trained(model, backwards, by_token, 300, 1e-2)
    with torch.no_grad():
        model.attn.in_proj_weight[:64] *= 3.0  # sharper still, and right
    learned = gf.diagnose(model, batches, by_token)
    record = learned.record.transformer
    assert record.loss_share < 0.2
    assert record.attention[0].entropy_share.max() < 0.15
    assert learned.ok
    assert LOW in severities(learned, "attn")
    with torch.no_grad():
        model.out.weight.copy_(model.out.weight[torch.randperm(10)])  # what it is sure of helps no more
    lost = gf.diagnose(model, batches, by_token)
    assert lost.record.transformer.loss_share > 1
    assert max(severities(lost, "attn")) >= MEDIUM


# -------------------------------------------------------------------------------------- through time


def test_a_forgetful_net_is_found_late_and_a_fresh_one_may_yet_learn() -> None:
    torch.manual_seed(0)
    model, y = Read(nn.LSTM), torch.arange(16) % 2
    batches = [(torch.randn(16, 150, 3), y)] * 2
    fresh = gf.diagnose(model, batches, nn.CrossEntropyLoss())
    assert fresh.ok
    assert severities(fresh, "rnn") == [LOW]
    with torch.no_grad():
        model.rnn.get_parameter("weight_hh_l0").mul_(1.3)  # has been trained, to no avail
    late = gf.diagnose(model, batches, nn.CrossEntropyLoss())
    assert severities(late, "rnn") == [MEDIUM]
    (cause,) = late.causes
    assert (cause.layer, cause.issue_type) == ("rnn", gf.IssueType.VANISHING)


def test_a_short_memory_that_suffices_and_gates_that_are_shut_are_no_illness() -> None:
    torch.manual_seed(0)
    model = Read(nn.LSTM)

    def at_the_end() -> tuple[Tensor, Tensor]:
        y, x = torch.randint(0, 2, (16,)), torch.randn(16, 100, 3)
        x[:, -1, 0] += 6.0 * y - 3.0
        return x, y

    trained(model, at_the_end, nn.CrossEntropyLoss(), 60, 2e-2)
    with torch.no_grad():
        # The tanh of the candidate is driven to its ends.
        model.rnn.get_parameter("weight_ih_l0")[16:24].mul_(20.0)
    report = gf.diagnose(model, [at_the_end() for _ in range(3)], nn.CrossEntropyLoss())
    assert report.record.recurrences[0].loss_share < 0.5
    assert report.ok, report
    assert {"VANISHING", "SATURATION"} <= {issue.issue_type.value for issue in report.issues}


# ------------------------------------------------------------------------------------------ a policy


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_policy_that_takes_one_action_everywhere_and_one_that_has_learned(collapsed: bool) -> None:
    torch.manual_seed(0)
    policy, x = nn.Linear(4, 3), torch.randn(64, 4)
    with torch.no_grad():
        policy.weight.mul_(0.1 if collapsed else 60.0)
        policy.bias.copy_(torch.tensor([0.0, 12.0, 0.0]) if collapsed else torch.zeros(3))
        actions = Categorical(logits=policy(x)).sample()
    gains = torch.randn(64)

    def loss(logits: Tensor) -> Tensor:
        return -(Categorical(logits=logits).log_prob(actions) * gains).mean()

    report = gf.diagnose(policy, [x] * 3, loss)
    assert report.record.policy is not None
    assert report.record.policy.distributions[0].entropy_share.max() < 0.05
    (found,) = [i.severity for i in report.issues if i.issue_type is gf.IssueType.SATURATION]
    assert found == (gf.IssueSeverity.HIGH if collapsed else LOW)
