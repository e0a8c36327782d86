"""Programs as people write them with the class interface: a sick model, its repair, the numbers they print.

The sizes are small; what is printed is checked against what the model does, found by hand.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradflow import (
    AttentionStats,
    GradientFlowAnalyzer,
    IssueType,
    PolicyDistributionStats,
    RecurrentAnalyzer,
    ReservoirDynamics,
    RLPolicyAnalyzer,
    TransformerAnalyzer,
)

PIXELS, CLASSES, SAMPLES = 196, 10, 32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pixels() -> Tensor:
    return torch.randn(SAMPLES, PIXELS)


def classes(output: Tensor) -> Tensor:
    return F.cross_entropy(output, torch.randint(0, CLASSES, (SAMPLES,)))


def found(model: nn.Module) -> dict[str, str]:
    """Return the type of the issue of every layer that has one."""
    issues = GradientFlowAnalyzer(model).analyze(input_fn=pixels, loss_fn=classes, steps=20)
    for issue in issues:
        assert math.isfinite(issue.magnitude)
        assert issue.recommended_actions
        assert issue.layer in str(issue)
    return {issue.layer: issue.issue_type.value for issue in issues}


def finite(stats: Any) -> bool:
    return all(
        np.isfinite(v).all() for v in attrs.asdict(stats).values() if isinstance(v, (float, np.ndarray))
    )


# --------------------------------------------------------------------------------------- plain networks


class Chain(nn.Module):
    """Linear layers with a function behind each but the last."""

    def __init__(self, sizes: list[int], function: Any, start: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.function = function
        for layer in self.layers:
            start(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.function(layer(x))
        return self.layers[-1](x)


def test_sigmoids_with_tiny_weights_vanish_and_rectifiers_with_fitting_ones_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tiny(weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, std=1e-3)

    sick = Chain([PIXELS, 64, 64, 64, CLASSES], torch.sigmoid, tiny)
    analyzer = GradientFlowAnalyzer(sick)
    issues = analyzer.analyze(input_fn=pixels, loss_fn=classes, steps=20)
    assert {(i.issue_type, i.layer) for i in issues if i.severity.value == "CRITICAL"} == {
        (IssueType.VANISHING, "layers.0")
    }
    analyzer.print_summary(issues)
    assert "[CRITICAL] VANISHING in layers.0 (Linear)" in capsys.readouterr().out
    repaired = Chain([PIXELS, 64, 64, CLASSES], torch.relu, nn.init.kaiming_normal_)
    assert len(GradientFlowAnalyzer(repaired).analyze(input_fn=pixels, loss_fn=classes, steps=20)) == 0


def test_huge_weights_explode_and_norms_with_fitting_ones_do_not_after_some_training() -> None:
    def huge(weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, std=5.0) if weight.shape[0] > CLASSES else weight

    assert found(Chain([PIXELS, 128, 128, 128, CLASSES], nn.Identity(), huge)) == {
        f"layers.{i}": "EXPLODING" for i in range(3)
    }
    blocks: list[nn.Module] = []
    for width in (PIXELS, 128, 128):
        blocks += [nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.Linear(128, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        classes(model(pixels())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
    assert "EXPLODING" not in found(model).values()


def test_a_layer_of_zeros_is_dead_and_what_is_before_it_too() -> None:
    model = Chain([PIXELS, 64, 64, CLASSES], torch.relu, nn.init.kaiming_normal_)
    for layer in model.layers:
        nn.init.zeros_(layer.bias)
    assert "DEAD" not in found(model).values()
    nn.init.zeros_(model.layers[1].weight)
    assert found(model) == {"layers.1": "DEAD", "layers.0": "DEAD"}
    model.zero_grad()
    classes(model(pixels())).backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached == ["layers.2.bias"]


# ------------------------------------------------------------------------------------------ transformers


class Tagger(nn.Module):
    """An encoder that is handed (samples, positions), where it reads (positions, samples)."""

    def __init__(self, words: int = 100, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.transformer(self.embedding(x)))


def test_the_attention_of_an_encoder_is_what_its_own_weights_say() -> None:
    model, words = Tagger(), torch.randint(0, 100, (8, 12))
    results = TransformerAnalyzer(model).analyze(
        input_fn=lambda: words, loss_fn=lambda y: F.cross_entropy(y.flatten(0, 1), words.flatten()), steps=3
    )
    assert list(results.attention_stats) == [f"transformer.layers.{i}.self_attn" for i in range(2)]
    assert not [issue for issue in results.gradient_issues if "attn" in issue.layer]
    x = model.embedding(words).detach()
    for stats, layer in zip(results.attention_stats.values(), model.transformer.layers, strict=True):
        _, weights = layer.self_attn(x, x, x, need_weights=True, average_attn_weights=False)
        assert weights.shape[-1] == 8  # it attends over the samples
        assert isinstance(stats, AttentionStats)
        assert finite(stats)
        weights = weights.detach()
        entropy = -(weights * weights.log()).sum(-1).mean()
        assert stats.mean_entropy == pytest.approx(float(entropy), rel=1e-4)
        assert stats.max_attention == pytest.approx(float(weights.amax(-1).mean()), rel=1e-4)
        x = layer(x).detach()


# ------------------------------------------------------------------------------------------ recurrences


class Stacked(nn.Module):
    """LSTMs over words, with or without a norm behind each; the last step is read."""

    def __init__(self, normed: bool, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.lstms = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if normed else nn.Identity() for _ in range(3))
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for lstm, norm in zip(self.lstms, self.norms, strict=True):
            x = norm(lstm(x)[0])
        return self.out(x[:, -1])


@pytest.mark.parametrize("normed", [False, True])
def test_norms_between_the_layers_do_not_make_an_lstm_remember(normed: bool) -> None:
    model, words, label = Stacked(normed), torch.randint(0, 50, (8, 80)), torch.randint(0, 2, (8,))
    analyzer = RecurrentAnalyzer(model, enable_rnn_analyzer=True, track_hidden_states=True)
    results = analyzer.analyze(input_fn=lambda: words, loss_fn=lambda y: F.cross_entropy(y, label), steps=2)
    dynamics = results.reservoir_dynamics
    assert isinstance(dynamics, ReservoirDynamics)
    assert finite(dynamics)
    x = model.embedding(words).double().detach().requires_grad_()
    embedding, model.embedding = model.embedding, nn.Identity()
    F.cross_entropy(model.double()(x), label).backward()
    model.embedding = embedding
    assert x.grad is not None
    arriving = x.grad.norm(dim=(0, 2))
    assert arriving[0] < 1e-6 * arriving[-1]  # the first words do not count
    assert dynamics.gradient_decay_rate > 1 - 1e-6
    assert 1 < dynamics.memory_depth <= int((arriving > 0.01 * arriving.max()).sum()) < 30
    assert 0.4 < dynamics.spectral_radius < 0.95
    assert {issue.issue_type for issue in results.gradient_issues} == {IssueType.VANISHING}


# ---------------------------------------------------------------------------------------------- policies


class ActorCritic(nn.Module):
    """Probabilities of four actions, and a value, on a common trunk."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.policy_head, self.value_head = nn.Linear(width, 4), nn.Linear(width, 1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        features = self.shared(states)
        return self.policy_head(features).softmax(-1), self.value_head(features)


def policy_and_value(output: tuple[Tensor, Tensor], gains: Tensor) -> tuple[Tensor, Tensor]:
    probabilities, values = output
    taken = gains.abs().mul(1e3).long() % 4
    policy = -(probabilities.gather(1, taken).log() * gains).mean()
    return policy, 0.5 * F.mse_loss(values, gains)


@pytest.mark.parametrize("greed", [1.0, 200.0])
def test_the_entropy_and_the_gradients_of_a_policy_are_what_it_gives(greed: float) -> None:
    model, states, gains = ActorCritic(), torch.randn(64, 16), torch.randn(64, 1)
    with torch.no_grad():
        model.policy_head.weight *= greed
    names = {"policy_head_name": "policy_head", "value_head_name": "value_head"}
    results = RLPolicyAnalyzer(model, **names, shared_backbone_name="shared").analyze(
        input_fn=lambda: states, loss_fn=lambda output: sum(policy_and_value(output, gains)), steps=4
    )
    stats = results.policy_distribution_stats
    assert isinstance(stats, PolicyDistributionStats)
    p = model(states)[0].detach()
    assert stats.mean_entropy == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-4)
    assert stats.max_action_prob == pytest.approx(float(p.amax(1).mean()), rel=1e-4)
    norms = []
    for part in policy_and_value(model(states), gains):
        gradients = torch.autograd.grad(part, list(model.shared.parameters()), retain_graph=True)
        norms.append(math.hypot(*(float(g.norm()) for g in gradients)))
    assert stats.policy_grad_norm == pytest.approx(norms[0], rel=1e-3)
    assert stats.value_grad_norm == pytest.approx(norms[1], rel=1e-3)
    assert stats.gradient_ratio == pytest.approx(norms[0] / norms[1], rel=1e-3)
    greedy = [i for i in results.gradient_issues if i.layer == "policy_head"]
    assert bool(greedy) == (greed > 1)
