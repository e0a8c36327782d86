"""Detectors of policies: synthetic records on both sides of every threshold, and small sick models."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from gradflow.detect import (
    collapsed_policy,
    conflicting_heads,
    dead,
    detect,
    deterministic_policy,
    dominant_value,
    misscaled_deviation,
    renormalised_policy,
    starved_policy,
)
from gradflow.detect.policy.evidence import sparing_policies
from gradflow.records import (
    ActionDeviation,
    ActionDistribution,
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    PolicyRecord,
    Role,
)
from tests.detect.builders import Layer, flow_record

S, T = IssueSeverity, IssueType
LOOKS = 4
EVERY = (
    collapsed_policy,
    deterministic_policy,
    misscaled_deviation,
    renormalised_policy,
    dominant_value,
    conflicting_heads,
    starved_policy,
)


def series(value: Any) -> np.ndarray:
    return np.broadcast_to(np.asarray(value, float), (LOOKS,)).copy()


def choice(**fields: Any) -> ActionDistribution:
    values: dict[str, Any] = {
        "heads": ("pi",),
        "family": "Categorical",
        "given": "logits",
        "evidence": "log_softmax was applied to it",
        "discrete": True,
        "num_actions": 2,
        "num_samples": np.full(LOOKS, 32),
        **dict.fromkeys(("std_min", "std_mean", "std_max", "mean_rms"), np.nan),
        "entropy": 0.6,
        "entropy_share": 0.9,
        "max_prob": 0.6,
        "largest_prob": 0.7,
        "deterministic_share": 0.0,
    } | fields
    arrays = {n: series(v) for n, v in values.items() if isinstance(v, (float, list))}
    values |= arrays
    widths = {f.name: values.pop(f.name) for f in attrs.fields(ActionDeviation)}
    return ActionDistribution(deviation=ActionDeviation(**widths), **values)


def gaussian(**fields: Any) -> ActionDistribution:
    discrete = dict.fromkeys(("entropy_share", "max_prob", "largest_prob", "deterministic_share"), np.nan)
    values = {"entropy": 1.4, "std_min": 1.0, "std_mean": 1.0, "std_max": 1.0, "mean_rms": 0.01}
    rest = {"family": "Normal", "given": "loc, scale", "discrete": False, "num_actions": 0}
    return choice(**{**discrete, **values, **rest, **fields})


def record(*made: ActionDistribution, losses: Any = 2.0, optimizer: str = "", **fields: Any) -> FlowRecord:
    """Return a record of a trunk with two heads, `pi` and `v`, at a healthy policy's numbers."""
    values: dict[str, Any] = {
        "steps": np.arange(LOOKS),
        "policy_heads": ("pi",),
        "value_heads": ("v",),
        "backbone": ("trunk",),
        "shared_parameters": ("trunk.weight",),
        "distributions": made or (choice(),),
        "policy_reached": np.ones(LOOKS, bool),
        "value_reached": np.ones(LOOKS, bool),
        "policy_grad_norm": 0.05,
        "value_grad_norm": 1.0,
        "gradient_cosine": 0.1,
        "policy_head_grad_norm": 0.1,
        "value_head_grad_norm": 1.0,
    } | fields
    arrays = {n: series(v) for n, v in values.items() if isinstance(v, (float, list))}
    layers = (Layer(name="trunk"), Layer(name="pi"), Layer(name="v"))
    edges = [("trunk", "pi"), ("trunk", "v"), ("pi", "loss"), ("v", "loss")]
    base = flow_record(*layers, edges=edges, optimizer=optimizer, losses=np.broadcast_to(losses, (8,)))
    return attrs.evolve(base, policy=PolicyRecord(**{**values, **arrays}))


def verdict(detector: Any, found: FlowRecord) -> list[tuple[IssueSeverity, IssueType, str]]:
    return [(i.severity, i.issue_type, i.layer) for i in detector(found)]


@pytest.mark.parametrize("factory", EVERY)
def test_nothing_is_said_of_a_healthy_policy_or_without_one(factory: Any) -> None:
    assert list(factory()(record())) == []
    assert list(factory()(record(gaussian()))) == []
    assert list(factory()(attrs.evolve(record(), policy=None))) == []
    nothing: Any = {name: [] for name in ARRAYS}
    empty = PolicyRecord(**nothing)
    assert list(factory()(attrs.evolve(record(), policy=empty))) == []


ARRAYS = (
    "steps",
    "policy_reached",
    "value_reached",
    "policy_grad_norm",
    "value_grad_norm",
    "gradient_cosine",
    "policy_head_grad_norm",
    "value_head_grad_norm",
)
FALLING = np.geomspace(2.0, 0.1, 8)


@pytest.mark.parametrize(
    ("shares", "losses", "severity"),
    [
        ([0.9, 0.5, 0.2, 0.06], 2.0, None),
        ([0.9, 0.5, 0.2, 0.04], 2.0, S.HIGH),  # has fallen within the run
        ([0.9, 0.5, 0.2, 0.04], FALLING, S.HIGH),  # the loss falls by itself as it becomes sure
        ([0.04, 0.04, 0.04, 0.04], 2.0, S.MEDIUM),  # was so before
        ([0.04, 0.04, 0.04, 0.005], 2.0, S.HIGH),
        ([0.005, 0.005, 0.5, 0.6], 2.0, None),  # has found its way out
    ],
)
def test_collapsed_entropy(shares: Any, losses: Any, severity: Any) -> None:
    found = record(choice(entropy_share=shares, entropy=0.01), losses=losses, optimizer="Adam")
    assert verdict(collapsed_policy(), found) == ([(severity, T.SATURATION, "pi")] if severity else [])


@pytest.mark.parametrize(
    ("shares", "losses", "severity"),
    [
        ([0.0, 0.2, 0.4, 0.45], 2.0, None),
        ([0.0, 0.2, 0.4, 0.55], 2.0, S.MEDIUM),
        ([0.0, 0.2, 0.4, 0.95], 2.0, S.HIGH),
        ([0.95, 0.95, 0.95, 0.95], 2.0, S.HIGH),
    ],
)
def test_deterministic_samples(shares: Any, losses: Any, severity: Any) -> None:
    found = record(choice(deterministic_share=shares), losses=losses, optimizer="Adam")
    assert verdict(deterministic_policy(), found) == ([(severity, T.SATURATION, "pi")] if severity else [])


@pytest.mark.parametrize(
    ("evidence", "value", "losses", "shares", "severity"),
    [
        ("cross_entropy was applied to it", (), FALLING, [0.9, 0.5, 0.2, 0.005], S.LOW),
        ("nll_loss was applied to it", (), FALLING, [0.9, 0.5, 0.2, 0.005], S.LOW),
        ("cross_entropy was applied to it", (), 2.0, [0.9, 0.5, 0.2, 0.005], S.HIGH),
        ("cross_entropy was applied to it", ("v",), FALLING, [0.9, 0.5, 0.2, 0.005], S.HIGH),
        ("cross_entropy was applied to it", (), FALLING, [0.005] * 4, S.HIGH),  # sure before it learned
    ],
)
def test_a_teachers_actions_may_be_learned(
    evidence: str, value: Any, losses: Any, shares: Any, severity: IssueSeverity
) -> None:
    made = choice(evidence=evidence, entropy_share=shares, deterministic_share=[1 - s for s in shares])
    found = record(made, losses=losses, value_heads=value)
    assert [v[0] for v in verdict(collapsed_policy(), found)] == [severity]
    assert [v[0] for v in verdict(deterministic_policy(), found)] == [severity]


def test_what_is_only_assumed_is_low() -> None:
    sure = choice(entropy_share=0.001, deterministic_share=1.0, assumed=True)
    assert verdict(collapsed_policy(), record(sure)) == [(S.LOW, T.SATURATION, "pi")]
    assert verdict(deterministic_policy(), record(sure)) == [(S.LOW, T.SATURATION, "pi")]


def test_both_are_one_issue_with_actions_that_fit() -> None:
    fell = choice(entropy_share=[0.9, 0.5, 0.1, 0.01], deterministic_share=[0.0, 0.1, 0.8, 0.9])
    (issue,) = detect(record(fell, optimizer="Adam"), [collapsed_policy(), deterministic_policy()])
    assert issue.severity is S.HIGH
    assert any("learning rate of Adam (0.1)" in action for action in issue.recommended_actions)
    assert {"entropy_share", "deterministic_share"} <= set(issue.metrics)
    (before,) = deterministic_policy()(record(choice(deterministic_share=1.0)))
    assert "orthogonal_" in before.recommended_actions[0]
    assert "finished learning" in before.description


@pytest.mark.parametrize(
    ("policy", "own", "severity"),
    [
        (2e-4, 1e-3, None),
        (9e-5, 1e-3, S.MEDIUM),
        (9e-5, 3e-3, None),  # the heads' own gradients do not agree: the policy's weights are small
        (9e-6, 1e-3, S.MEDIUM),
        (9e-6, 3e-4, S.HIGH),
        (0.0, 0.0, None),  # that is `starved_policy`'s
    ],
)
def test_a_value_that_dominates(policy: float, own: float, severity: Any) -> None:
    found = record(policy_grad_norm=policy, policy_head_grad_norm=own)
    assert verdict(dominant_value(), found) == ([(severity, T.EXPLODING, "v")] if severity else [])
    louder = record(
        policy_grad_norm=1e6 * policy,
        value_grad_norm=1e6,
        policy_head_grad_norm=1e6 * own,
        value_head_grad_norm=1e6,
    )
    assert verdict(dominant_value(), louder) == verdict(dominant_value(), found)
    apart = record(policy_grad_norm=policy, policy_head_grad_norm=own, shared_parameters=())
    assert verdict(dominant_value(), apart) == []


def test_dominance_is_told_once() -> None:
    (issue,) = dominant_value()(record(policy_grad_norm=1e-5, policy_head_grad_norm=1e-3))
    base = attrs.evolve(issue, severity=S.HIGH, description="Told by the base detector.")
    (merged,) = detect(record(), [lambda r: [base], lambda r: [issue]])
    assert merged.severity is S.HIGH


@pytest.mark.parametrize(
    ("cosine", "policy", "severity"),
    [
        ([-0.9, -0.9, 0.5, 0.5], 1.0, None),
        ([-0.9, -0.9, -0.9, 0.5], 0.05, S.LOW),
        ([-0.9, -0.9, -0.9, 0.5], 1.0, S.MEDIUM),  # of like size: they cancel
        ([-0.9, -0.9, np.nan, np.nan], 1.0, None),  # too few
    ],
)
def test_conflict(cosine: Any, policy: float, severity: Any) -> None:
    found = record(gradient_cosine=cosine, policy_grad_norm=policy)
    assert verdict(conflicting_heads(), found) == ([(severity, T.BOTTLENECK, "trunk")] if severity else [])


@pytest.mark.parametrize(
    ("fields", "severity"),
    [
        ({"policy_reached": np.zeros(LOOKS, bool)}, S.HIGH),
        ({}, S.MEDIUM),  # a path that brings exact zeros
        ({"policy_reached": np.zeros(LOOKS, bool), "policy_differentiable": False}, S.INFO),
        ({"policy_grad_norm": [0.0, 0.0, 0.0, 1e-30]}, None),
        ({"policy_heads": ()}, None),
        ({"policy_head_grad_norm": float("nan"), "policy_grad_norm": float("nan")}, None),  # not measured
    ],
)
def test_a_policy_that_gets_nothing(fields: Any, severity: Any) -> None:
    found = record(**{"policy_grad_norm": 0.0, "policy_head_grad_norm": 0.0, **fields})
    assert verdict(starved_policy(), found) == ([(severity, T.DEAD, "pi")] if severity else [])


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (gaussian(std_min=5e-4, mean_rms=0.5), (S.HIGH, T.SATURATION)),
        (gaussian(std_min=5e-4, mean_rms=1e-3), None),  # small actions, of its own size
        (gaussian(std_min=5e-4, mean_rms=1e-3, bounded=True), (S.HIGH, T.SATURATION)),
        (gaussian(std_min=0.5, mean_rms=1e3), (S.HIGH, T.SATURATION)),  # of actions in the thousands
        (gaussian(std_min=2.0, std_max=2.0, mean_rms=1e3), None),
        (gaussian(std_max=19.0), None),
        (gaussian(std_max=21.0), (S.MEDIUM, T.EXPLODING)),
        (gaussian(std_max=210.0), (S.HIGH, T.EXPLODING)),
        (gaussian(std_max=210.0, std_min=210.0, mean_rms=1e2), None),
        (gaussian(std_min=float("nan"), std_max=float("nan")), None),
    ],
)
def test_deviations_out_of_range(made: ActionDistribution, expected: Any) -> None:
    found = verdict(misscaled_deviation(), record(made))
    assert [f[:2] for f in found] == ([expected] if expected else [])


def test_a_deviation_is_told_at_its_own_head_and_with_its_parameter() -> None:
    own = gaussian(heads=("pi", "v"), std_max=50.0, parameters=("log_std",))
    (issue,) = misscaled_deviation()(record(own))
    assert issue.layer == "v"  # the last
    assert "log_std" in issue.description
    assert "log_std" in issue.recommended_actions[0]
    named = attrs.evolve(own, heads=("net.sigma", "pi"))
    (issue,) = misscaled_deviation()(record(named))
    assert issue.layer == "net.sigma"


def test_probabilities_taken_for_logits() -> None:
    (issue,) = renormalised_policy()(record(choice(normalised_twice=True)))
    assert (issue.severity, issue.issue_type, issue.layer) == (S.MEDIUM, T.BOTTLENECK, "pi")
    assert issue.magnitude == pytest.approx(np.e / (np.e + 1))


PAGE = (Path(__file__).parents[3] / "docs" / "detectors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("factory", EVERY, ids=lambda f: f.__name__)
def test_page_and_docstring_tell_measure_reason_and_thresholds(factory: Any) -> None:
    section = PAGE.split(f"\n### {factory.__name__}\n")[1].split("\n### ")[0].split("\n## ")[0]
    stated = re.findall(r"^\| `(\w+)` \| ([\d.e+-]+) \| (.+) \|$", section, re.M)
    defaults = {name: p.default for name, p in inspect.signature(factory).parameters.items()}
    assert {name: float(value) for name, value, _ in stated} == defaults
    text = inspect.getdoc(factory) or ""
    for part, on_page in (
        ("Measured", "Measured"),
        ("Why this is evidence", "Why it is evidence"),
        ("Looks alike and is not", "Looks alike and is not"),
    ):
        assert part in text
        assert f"*{on_page}*" in section
    for name in defaults:
        assert re.search(rf"^    {name}: ", text, re.M), name


def test_what_policies_are_like_by_design_is_spared() -> None:
    def issue(layer: str, kind: IssueType, *roles: Role) -> Issue:
        return Issue(
            layer=layer, layer_type="Linear", issue_type=kind, severity=S.HIGH, description="", magnitude=1.0,
            evidence=Evidence(roles=roles),
        )  # fmt: skip

    given = [
        issue("pi", T.BOTTLENECK),
        issue("trunk", T.BOTTLENECK),
        issue("critic_target", T.DEAD, Role.UNUSED),
        issue("critic_target.0", T.DEAD, Role.UNUSED),
        issue("critic_target", T.DEAD, Role.CUT),
        issue("trunk", T.DEAD, Role.UNUSED),
    ]
    found = list(sparing_policies(lambda r: given)(record(others=("critic_target",))))
    assert [i.severity for i in found] == [S.LOW, S.HIGH, S.LOW, S.LOW, S.HIGH, S.HIGH]
    assert list(sparing_policies(lambda r: given)(attrs.evolve(record(), policy=None))) == given
    assert list(sparing_policies(dead())(record())) == list(dead()(record()))


def test_a_policy_that_is_sure_of_other_actions_in_other_states_has_learned() -> None:
    sure = {"entropy_share": [0.004] * 4, "deterministic_share": [1.0] * 4}
    for mixture, severity in ((0.9, S.LOW), (0.05, S.HIGH)):
        found = record(choice(**sure, mixture_share=[mixture] * 4))
        for factory in (collapsed_policy, deterministic_policy):
            assert [v[0] for v in verdict(factory(by_state=0.3), found)] == [severity]
            assert [v[0] for v in verdict(factory(), found)] == [S.HIGH]
    fell = record(choice(entropy_share=[0.9, 0.5, 0.1, 0.004], mixture_share=[0.9] * 4))
    assert [v[0] for v in verdict(collapsed_policy(by_state=0.3), fell)] == [S.HIGH]
