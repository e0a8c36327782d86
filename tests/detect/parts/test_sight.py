"""Verdicts on attention that sees what it must not, and on dropout that goes on."""

from __future__ import annotations

import attrs

import gradflow as gf
from gradflow.detect import leaking_attention, stray_dropout
from gradflow.records import (
    DropoutRecord,
    FlowRecord,
    Issue,
    IssueSeverity,
    IssueType,
    PartsRecord,
    SightRecord,
)


def sights(*futures: float, **also: float) -> tuple[SightRecord, ...]:
    found = [SightRecord(name=f"h.{i}.attn", type="Attn", future=f) for i, f in enumerate(futures)]
    found += [SightRecord(name="", type="Gpt", future=value, whole=True) for value in also.values()]
    return tuple(found)


def issues(found: tuple[SightRecord, ...]) -> list[Issue]:
    record = FlowRecord(steps=1, losses=[1.0], layers=(), parameters=(), parts=PartsRecord(sights=found))
    return list(gf.detect(record, leaking_attention()))


def told(found: list[Issue]) -> list[tuple[str, IssueSeverity]]:
    assert all(issue.issue_type is IssueType.BOTTLENECK for issue in found)
    return [(issue.layer, issue.severity) for issue in found]


def test_a_leak_in_a_model_of_next_words_is_grave() -> None:
    found = issues(sights(0.0, 0.6, 0.0, model=0.2))
    assert told(found) == [("h.1.attn", IssueSeverity.HIGH)]
    assert "2 others hide it" in found[0].description
    assert len(issues(sights(0.6, 0.6, 0.0, model=0.2))) == 2
    (all_of_them,) = issues(sights(0.6, 0.6, model=0.2))
    assert all_of_them.layer == "h.0.attn"
    assert "as 2 of its 2 attentions do" in all_of_them.description


def test_a_leak_that_cannot_be_used_is_low() -> None:
    blind = SightRecord(name="", type="Gpt", future=0.2, whole=True, ordered=False)
    assert told(issues((*sights(0.6), blind))) == [("h.0.attn", IssueSeverity.LOW)]


def test_a_leak_in_no_attention_is_the_models() -> None:
    assert told(issues(sights(0.0, 0.0, model=0.2))) == [("", IssueSeverity.HIGH)]


def test_targets_that_are_the_inputs_are_told_where_the_future_is_hidden() -> None:
    own = SightRecord(name="", type="Gpt", future=0.0, whole=True, own=True)
    (issue,) = issues((own, *sights(0.0, 0.0)))
    assert issue.severity is IssueSeverity.HIGH
    assert "Shift the targets" in issue.recommended_actions[0]
    encoder = attrs.evolve(own, future=0.4)  # what sees both sides may be asked for what it is given
    assert issues((encoder, *sights(0.4, 0.4))) == []


def test_what_sees_the_future_and_may_is_left_alone() -> None:
    assert issues(sights(0.6, 0.7, 0.6)) == []
    assert issues((SightRecord(name="", type="Encoder", future=0.6),)) == []  # attention of the model itself
    assert issues(sights(0.0, 0.0, 0.0, model=0.0)) == []
    assert issues(sights(0.6, 0.6, model=0.0)) == []  # an encoder beside a decoder that hides it


def test_one_of_several_that_disagrees_is_told() -> None:
    assert told(issues(sights(0.0, 0.0, 0.5))) == [("h.2.attn", IssueSeverity.MEDIUM)]
    assert told(issues(sights(0.6, 0.0, 0.5))) == [("h.1.attn", IssueSeverity.MEDIUM)]
    assert issues(sights(0.6, 0.0)) == []
    assert issues(sights(0.6, 0.0, 0.5, 0.0)) == []


def padded(*shares: float, told: bool) -> list[Issue]:
    return issues(
        tuple(
            SightRecord(name=f"h.{i}.attn", type="Attn", future=0.5, padding=share, padding_told=told)
            for i, share in enumerate(shares)
        )
    )


def test_padding_that_is_seen_is_told_as_gravely_as_it_is_known() -> None:
    assert told(padded(0.0, 0.4, 0.0, told=False)) == [("h.1.attn", IssueSeverity.MEDIUM)]
    assert told(padded(0.4, 0.4, told=True)) == [("h.0.attn", IssueSeverity.MEDIUM)]
    assert told(padded(0.4, 0.4, told=False)) == [("h.0.attn", IssueSeverity.LOW)]
    assert padded(0.0, 0.0, told=True) == []


def test_dropout_in_eval_mode_and_out_of_line() -> None:
    def found(*dropouts: DropoutRecord) -> list[tuple[str, IssueType]]:
        record = FlowRecord(
            steps=1, losses=[1.0], layers=(), parameters=(), parts=PartsRecord(dropouts=dropouts)
        )
        return [(issue.layer, issue.issue_type) for issue in gf.detect(record, stray_dropout())]

    def layers(*shares: float) -> list[DropoutRecord]:
        return [DropoutRecord(name=f"h.{i}.drop", type="Dropout", p=p) for i, p in enumerate(shares)]

    assert found(DropoutRecord(name="h", type="Block", p=0.5, in_eval=True)) == [("h", IssueType.UNSTABLE)]
    assert found(*layers(0.1, 0.1, 0.9)) == [("h.2.drop", IssueType.UNSTABLE)]
    assert found(*layers(0.1, 0.2, 0.3)) == []
    assert found(*layers(0.5, 0.5, 0.6)) == []
    assert found(*layers(0.1, 0.8)) == []
    assert found(*layers(0.9)) == [("h.0.drop", IssueType.UNSTABLE)]
    assert found(*layers(0.9, 0.9, 1.0)) == [(f"h.{i}.drop", IssueType.UNSTABLE) for i in range(2)]
