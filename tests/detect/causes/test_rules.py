"""The table of rules, and issues and rules of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from gradflow.detect import RULES, Rule, detect, explain, find_causes
from gradflow.diagnosis import diagnose
from gradflow.errors import PipelineError
from gradflow.pipelines import Pipeline
from gradflow.records import Evidence, FlowRecord, Issue, IssueSeverity, IssueType, Role, issue_type
from tests.detect.builders import Layer, decaying, flow_record
from tests.samples import make_issue

GATED = issue_type("GATED")


def told(record: FlowRecord, *issues: Issue, **options: Any) -> list[tuple[str, str, int]]:
    found = find_causes(record, issues, **options)
    return [(c.layer, c.issue_type.value, len(c.issues)) for c in found]


def own(layer: str, **evidence: Any) -> Issue:
    return make_issue(layer, GATED, evidence=Evidence(**evidence))


def test_the_table_can_be_read() -> None:
    assert len({rule.because for rule in RULES}) > len(RULES) / 2
    assert all(rule.because and rule.where for rule in RULES)
    known = set(IssueType)
    assert all(set(rule.cause) <= known and set(rule.victim) <= known for rule in RULES)


@pytest.mark.parametrize("kind", [GATED, IssueType.BOTTLENECK, IssueType.SATURATION])
def test_what_absorbs_by_the_word_of_a_detector_of_ones_own_explains_what_starves(kind: Any) -> None:
    record = decaying(6, 0.02)
    starved = detect(record)
    assert told(record, *starved)[0][0] == "fc0"
    gate = make_issue("fc5", kind, evidence=Evidence(roles=Role.ABSORBING))
    assert told(record, *starved, gate) == [("fc5", kind.value, len(starved) + 1)]
    if kind is not IssueType.SATURATION:  # which explains what vanishes whatever it knows
        silent = make_issue("fc5", kind)
        assert told(record, *starved, silent)[0][0] == "fc0"
    behind = make_issue("fc1", kind, evidence=Evidence(roles=Role.ABSORBING))
    assert len(told(record, make_issue("fc3"), behind)) == 2


def test_what_blocks_by_the_word_of_a_detector_of_ones_own_explains_exact_zeros() -> None:
    record = decaying(4, 1.0)
    dead = make_issue("fc0", IssueType.DEAD, evidence=Evidence(roles=Role.BLOCKED, origin="fc2"))
    assert told(record, dead, own("fc2", roles=Role.BLOCKING)) == [("fc2", "GATED", 2)]
    assert len(told(record, dead, own("fc2", roles=Role.ABSORBING))) == 2


def test_an_issue_of_ones_own_is_a_victim_where_it_names_its_origin() -> None:
    record = decaying(4, 1.0)
    cause = make_issue("fc2", IssueType.EXPLODING)
    assert told(record, cause, own("fc0", origin="fc2")) == [("fc2", "EXPLODING", 2)]
    assert len(told(record, cause, own("fc0"))) == 2


def test_a_rule_of_ones_own_is_followed_where_it_holds() -> None:
    record = decaying(4, 1.0)
    narrow = make_issue("fc2", IssueType.BOTTLENECK)
    grown = make_issue("fc0", IssueType.EXPLODING)
    assert len(told(record, narrow, grown)) == 2

    def rule(**fields: Any) -> Rule:
        return Rule(
            **{"cause": IssueType.BOTTLENECK, "victim": IssueType.EXPLODING, "because": "why", **fields}
        )

    def count(**fields: Any) -> int:
        return len(told(record, narrow, grown, rules=[rule(**fields)]))

    assert count(where="upstream") == 1
    assert count(where=("same", "downstream", "beside", "apart")) == 2
    assert count(where="upstream", roles=Role.CUT) == 2
    assert count(where="upstream", victim_roles=Role.CUT) == 2
    assert count(where="upstream", when=lambda flow, cause, victim: flow.record is record) == 1
    assert count(where="upstream", when=lambda flow, cause, victim: cause.layer != "fc2") == 2
    amended, _ = explain(record, [narrow, grown], rules=[rule(where="upstream")])
    assert [issue.evidence.explained_by for issue in amended] == [None, "fc2"]


def test_layers_beside_each_other_and_apart() -> None:
    record = flow_record(
        *(Layer(name=name) for name in ("left", "right", "head", "alone")),
        edges=[("left", "head"), ("right", "head"), ("head", "loss"), ("alone", "loss")],
    )
    kinds = {"cause": GATED, "victim": IssueType.DEAD, "because": "why"}
    for where, right, alone in (("beside", 1, 2), ("apart", 2, 1)):
        rules = [Rule(**{"where": where, **kinds})]  # type: ignore[arg-type]
        assert len(told(record, own("left"), make_issue("right", IssueType.DEAD), rules=rules)) == right
        assert len(told(record, own("left"), make_issue("alone", IssueType.DEAD), rules=rules)) == alone


def test_a_light_issue_explains_no_grave_one() -> None:
    light = lighter(own("fc5", roles=Role.ABSORBING))
    assert len(told(decaying(6, 1.0), make_issue("fc0"), light)) == 2


def lighter(issue: Issue) -> Issue:
    return make_issue(issue.layer, issue.issue_type, IssueSeverity.LOW, evidence=issue.evidence)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule(cause=(), victim=(), where="before", because=""), "where to be some of same, upstream"),  # type: ignore[arg-type]
        (lambda: Rule(cause=(), victim=(), where="same", because="", when="x"), "when to be functions of"),  # type: ignore[arg-type]
    ],
)
def test_rules_that_are_none_are_refused(make: Callable[[], Rule], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        make()


def test_a_pipeline_brings_its_rules_to_the_diagnosis() -> None:
    rule = Rule(cause=GATED, victim=IssueType.DEAD, where="upstream", because="why")

    def both(record: FlowRecord) -> tuple[Issue, ...]:
        return make_issue("0", IssueType.DEAD), own("2")

    def num_causes(pipeline: Pipeline) -> int:
        return len(diagnose(model, [torch.ones(2, 4)], lambda y: y.sum(), pipeline=pipeline).causes)

    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    assert num_causes(Pipeline("plain", [both])) == 2
    assert num_causes(Pipeline("ruled", [both], rules=rule)) == 1
    assert (Pipeline("a", [both], rules=[rule]) + Pipeline("b", [both], rules=rule)).rules == (rule,)


@pytest.mark.parametrize("rules", ["upstream", [1], 2])
def test_a_pipeline_takes_rules_only(rules: Any) -> None:
    with pytest.raises(PipelineError, match="Pipeline: expected rules to be of gradflow.Rule, got"):
        Pipeline("ruled", [], rules=rules)


@pytest.mark.parametrize("developed", [False, True])
def test_growth_that_came_in_training_is_no_cause_of_what_was_there_at_first(developed: bool) -> None:
    """The larger growth explains the other one, but for one that came before it."""
    later = make_issue("fc3", IssueType.EXPLODING, evidence=Evidence(growth=1e6, developed=True))
    first = make_issue("fc1", IssueType.EXPLODING, evidence=Evidence(growth=1e3, developed=developed))
    assert told(decaying(4, 1.0), later, first)[0][0] == ("fc3" if developed else "fc1")


@pytest.mark.parametrize(("grew", "saturated"), [(True, True), (True, False), (False, True)])
def test_scores_that_grow_explain_the_softmax_that_they_drive_to_its_ends(
    grew: bool, saturated: bool
) -> None:
    """Where it was at its ends from the first look on, or nothing is known to have grown, it is the cause."""
    growth = Evidence(growth=400.0, developed=True) if grew else Evidence()
    scores = make_issue("fc1", IssueType.UNSTABLE, evidence=growth)
    ends = make_issue("fc1", IssueType.SATURATION, evidence=Evidence(developed=saturated))
    first = "UNSTABLE" if grew and saturated else "SATURATION"
    assert told(decaying(4, 1.0), scores, ends) == [("fc1", first, 2)]


@pytest.mark.parametrize(("absorbs", "explains"), [("fc3", False), ("fc0", True)])
def test_rows_that_are_alike_are_no_work_of_a_layer_behind_them(absorbs: str, explains: bool) -> None:
    """The signal has passed them by then, and that little gradient comes back makes no rows alike."""
    alike = make_issue("fc1", IssueType.BOTTLENECK)
    absorbing = make_issue(absorbs, IssueType.VANISHING, evidence=Evidence(roles=Role.ABSORBING))
    record = decaying(4, 1.0)
    assert any(c.issues[0] == alike for c in find_causes(record, [alike, absorbing])) is not explains


def test_like_parts_that_never_ran_are_told_in_the_order_of_the_model() -> None:
    record, names = decaying(3, 1.0), ("b.2", "b.10", "a")
    held = [attrs.evolve(p, name=f"{n}.fc.weight") for p, n in zip(record.parameters, names, strict=True)]
    record = attrs.evolve(record, parameters=[*record.parameters, *held])
    dead = [make_issue(n, IssueType.DEAD, evidence=Evidence(roles=Role.UNUSED)) for n in sorted(names)]
    assert [name for name, _, _ in told(record, *dead)] == ["b.2", "b.10", "a"]
