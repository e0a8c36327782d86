"""DEAD: wiring, exact zeros and silent rectifiers; and the zeros that are by design."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest

from gradflow.detect import dead, detect
from gradflow.records import (
    ActivationRecord,
    Evidence,
    FlowRecord,
    Issue,
    IssueSeverity,
    KnowledgeRecord,
    Role,
)
from tests.detect.builders import STEPS, Layer, activation, flow_record

LOST = np.full(STEPS, np.nan)


def seen(record: FlowRecord, **options: Any) -> dict[str, Issue]:
    return {issue.layer: issue for issue in detect(record, dead(**options))}


# ------------------------------------------------------------------------------------ wiring


def cut(reason: str, op: str, **fields: Any) -> FlowRecord:
    why = {"reachable": False, "reason": reason}
    return flow_record(
        Layer(name="enc.0", grad=LOST),
        Layer(name="enc.1", grad=LOST),
        Layer(name="head"),
        edges=[("head", "loss")],
        cuts=[("enc.1", "head", op)],
        nodes={"enc.0": why, "enc.1": why},
        **fields,
    )


def test_a_cut_is_named_with_its_operation() -> None:
    found = seen(cut("its output goes on without its gradient: argmax before head", "argmax"))
    assert set(found) == {"enc.0", "enc.1"}
    assert found["enc.1"].severity is IssueSeverity.HIGH
    assert found["enc.1"].metrics["op"] == "argmax"
    assert "gumbel_softmax" in found["enc.1"].recommended_actions[0]


def test_under_no_grad_only_an_optimizer_says_that_it_should_train() -> None:
    assert seen(cut("it ran under no_grad", "no_grad"))["enc.1"].severity is IssueSeverity.LOW
    trained = seen(cut("it ran under no_grad", "no_grad", optimizer="Adam"))
    assert trained["enc.1"].severity is IssueSeverity.HIGH


@pytest.mark.parametrize("field", ["trainable", "optimized"])
def test_frozen_and_unoptimized_parts_are_by_design(field: str) -> None:
    idle = {field: False}
    record = flow_record(
        Layer(name="teacher", grad=LOST, weight=idle), Layer(name="head"), edges=[("head", "loss")]
    )
    assert not seen(record)


def test_a_head_that_other_batches_use_is_well() -> None:
    half = np.where(np.arange(STEPS) % 2, 1.0, np.nan)
    assert not seen(flow_record(Layer(name="trunk"), Layer(name="head", grad=half)))


def test_idle_modules_of_a_container_are_told_together() -> None:
    idle = [Layer(name=f"experts.{i}.fc", grad=LOST) for i in (1, 2)]
    record = flow_record(Layer(name="head"), *idle, edges=[("head", "loss")])
    ran = [layer for layer in record.layers if layer.name == "head"]
    record = FlowRecord(
        steps=STEPS,
        losses=record.losses,
        layers=ran,
        parameters=record.parameters,
        never_called=("experts.1.fc", "experts.2.fc"),
    )
    found = seen(record)
    assert set(found) == {"experts"}
    assert found["experts"].metrics["modules"] == ("experts.1.fc", "experts.2.fc")


@pytest.mark.parametrize(
    ("passed_by", "optimizer", "severity"),
    [
        ((), "", IssueSeverity.HIGH),  # nothing that ran names it: forgotten
        (("tower",), "", IssueSeverity.LOW),
        (("tower",), "Adam", IssueSeverity.HIGH),
    ],
)
def test_a_part_for_other_batches_is_a_remark_unless_an_optimizer_holds_it(
    passed_by: tuple[str, ...], optimizer: str, severity: IssueSeverity
) -> None:
    record = flow_record(
        Layer(name="head"), Layer(name="tower", grad=LOST), edges=[("head", "loss")], optimizer=optimizer
    )
    layers = [layer for layer in record.layers if layer.name == "head"]
    record = attrs.evolve(record, layers=layers, never_called=("tower",), passed_by=passed_by)
    issue = seen(record)["tower"]
    assert issue.severity is severity
    assert ("on a branch not taken" in issue.description) is bool(passed_by)


def test_parameters_that_take_no_part_though_the_output_does() -> None:
    unused = {"reached": np.zeros(STEPS, bool), "grad_norm": LOST}
    found = seen(flow_record(Layer(name="a", weight=unused), Layer(name="head")))
    assert "take no part" in found["a"].description


# ------------------------------------------------------------------------------- exact zeros


def zeros(optimizer: str = "", *, weight: float = 0.0, **fields: Any) -> FlowRecord:
    return flow_record(
        Layer(name="a", grad=0.0), Layer(name="last", gain=weight), optimizer=optimizer, **fields
    )


def test_without_an_optimizer_a_zero_may_be_by_design() -> None:
    issue = seen(zeros())["a"]
    assert issue.severity is IssueSeverity.INFO
    assert "pass optimizer=" in issue.description
    assert issue.metrics["why"] == "zero weight"


def test_after_some_steps_of_the_optimizer_it_is_dead() -> None:
    assert seen(zeros("Adam"))["a"].severity is IssueSeverity.HIGH
    assert seen(zeros("Adam", steps=3))["a"].severity is IssueSeverity.INFO


def test_a_zero_that_ends_with_the_first_steps_is_a_start() -> None:
    starting = np.array([0, 0, 1e-3, 1e-2, 1, 1, 1, 1])
    assert not seen(flow_record(Layer(name="a", grad=starting), Layer(name="last"), optimizer="Adam"))


def test_a_silent_rectifier_is_never_by_design() -> None:
    record = flow_record(
        Layer(name="fc1", grad=0.0),
        Layer(name="fc2", grad=0.0, gain=0.0, op="relu"),
        Layer(name="fc3"),
        activations=[
            activation("fc2:relu", "fc2", "relu", "rectifier", never_fired=1.0, fired_share=np.zeros(STEPS))
        ],
    )
    found = seen(record)
    assert found["fc2"].severity is found["fc1"].severity is IssueSeverity.CRITICAL
    assert found["fc2"].evidence.roles == (Role.BLOCKING,)
    assert found["fc1"].evidence == Evidence(roles=Role.BLOCKED, origin="fc2")
    assert "kaiming" in found["fc2"].recommended_actions[0]


def test_a_softmax_over_one_alternative_is_never_by_design() -> None:
    record = flow_record(
        Layer(name="out", grad=0.0, op="softmax"),
        Layer(name="late"),
        activations=[activation("out:softmax", "out", "softmax", "softmax", width=1)],
    )
    issue = seen(record)["out"]
    assert issue.severity is IssueSeverity.CRITICAL
    assert "sigmoid" in issue.recommended_actions[0]


def test_a_norm_over_one_feature_is_never_by_design() -> None:
    """Its gradient is zero by mathematics, and rounding in fact."""
    rounding = np.full(STEPS, 1e-6)
    norm = {"type": "LayerNorm", "shape": (32, 1)}
    layers = [Layer(name="score", grad=rounding), Layer(name="norm", fields=norm, weight={"shape": (1,)})]
    issue = seen(flow_record(*layers, optimizer="Adam"))["score"]
    assert (issue.severity, issue.metrics["why"]) == (IssueSeverity.CRITICAL, "one feature")
    wide = [layers[0], Layer(name="norm", fields=norm, weight={"shape": (64, 1)})]
    assert not seen(flow_record(*wide, optimizer="Adam"))


def test_zero_in_most_steps_and_rounding_in_the_others_is_zero() -> None:
    rounding = np.where(np.arange(STEPS) % 4 == 3, 1e-6, 0.0)
    record = flow_record(Layer(name="a", grad=rounding, op="sub"), Layer(name="b"), optimizer="Adam")
    assert seen(record)["a"].severity is IssueSeverity.HIGH


def test_a_loss_that_is_met_by_most_batches_is_no_death() -> None:
    rare = np.where(np.arange(STEPS) % 4 == 3, 1.0, 0.0)
    record = flow_record(Layer(name="a", grad=rare), Layer(name="b", grad=rare), optimizer="Adam")
    assert not seen(record)


def test_two_factors_that_both_start_at_zero() -> None:
    record = flow_record(
        Layer(name="base"),
        Layer(name="A", grad=0.0, gain=0.0, fields={"output_rms": np.zeros(STEPS)}),
        Layer(name="B", grad=1.0, gain=0.0, weight={"grad_norm": np.zeros(STEPS)}),
        optimizer="Adam",
    )
    found = seen(record)
    assert found["A"].metrics["why"] == "zero weight"
    assert found["B"].metrics["why"] == "zero input"
    assert "both start at zero" in found["A"].recommended_actions[0]


def test_a_loss_that_hands_back_nothing() -> None:
    assert seen(flow_record(Layer(name="out", grad=0.0)))["out"].metrics["why"] == "loss"


def test_an_operation_between_two_layers() -> None:
    record = flow_record(Layer(name="a", grad=0.0, op="sign"), Layer(name="b"), optimizer="SGD")
    assert seen(record)["a"].metrics["why"] == "operation"


# -------------------------------------------------------------------------------- rectifiers


def partly_silent(share: float, *, variation: float = 1.0, **fields: Any) -> FlowRecord:
    return flow_record(
        Layer(name="fc", fields={"output_variation": np.full(STEPS, variation)}, op="relu"),
        Layer(name="head"),
        activations=[activation("fc:relu", "fc", "relu", "rectifier", never_fired=share, **fields)],
    )


@pytest.mark.parametrize(
    ("share", "severity"),
    [(0.95, IssueSeverity.HIGH), (0.6, IssueSeverity.MEDIUM), (0.3, IssueSeverity.LOW), (0.1, None)],
)
def test_severity_goes_by_the_share_of_silent_units(share: float, severity: IssueSeverity | None) -> None:
    found = seen(partly_silent(share))
    assert (found["fc"].severity if found else None) is severity


def test_where_all_samples_look_alike_chance_switches_half_off() -> None:
    assert seen(partly_silent(0.6, variation=0.01))["fc"].severity is IssueSeverity.LOW


def test_a_hinge_in_the_loss_is_meant_to_be_off() -> None:
    record = flow_record(
        Layer(name="fc"),
        activations=[activation("fc:relu", "fc", "relu", "rectifier", never_fired=0.99)],
    )
    assert not seen(record)


def test_units_that_have_died_in_training() -> None:
    fired = np.array([0.5, 0.2, 0, 0, 0, 0, 0, 0])
    issue = seen(partly_silent(0.4, fired_share=fired))["fc"]
    assert issue.severity is IssueSeverity.CRITICAL
    assert issue.evidence.developed


def test_a_batch_with_a_nan_spoils_the_count_of_firing_units() -> None:
    assert not seen(partly_silent(1.0))  # half of its elements fire
    broken = {"output_finite": np.arange(STEPS) != 3}
    record = flow_record(
        Layer(name="fc", fields=broken, op="relu"),
        Layer(name="head"),
        activations=[activation("fc:relu", "fc", "relu", "rectifier", never_fired=1.0)],
    )
    assert not seen(record)


def test_a_unit_of_a_reused_module_is_dead_only_if_all_calls_are_silent() -> None:
    record = flow_record(
        Layer(name="fc"),
        Layer(name="act", gain=None),
        Layer(name="act@1", gain=None),
        Layer(name="head"),
        activations=[
            activation("act", "act", "relu", "rectifier", never_fired=0.9),
            activation("act@1", "act@1", "relu", "rectifier", never_fired=0.0),
        ],
    )
    assert not seen(record)


@pytest.mark.parametrize(
    ("first", "shuffled", "silent", "ill"),
    [(0.0, 1.0, 1.0, False), (0.0, 0.0, 1.0, True), (2.0, 0.0, 1.0, False), (2.0, 0.0, 0.0, True)],
)
def test_a_margin_that_every_sample_keeps_leaves_nothing_to_learn(
    first: float, shuffled: float, silent: float, ill: bool
) -> None:
    """Of pairs in order, others' outputs cost nothing either: then the loss must have fallen to zero."""
    hinge = activation("head:relu", "head", "relu", "rectifier", never_fired=1.0, fired_share=np.zeros(STEPS))
    layers = [Layer(name=name, grad=0.0) for name in ("fc", "head")]
    losses = np.array([first, *np.zeros(STEPS - 1)])
    record = flow_record(*layers, activations=[hinge], losses=losses, optimizer="SGD")
    known = KnowledgeRecord(step=STEPS - 1, loss=0.0, shuffled=shuffled, silent=silent)
    found = seen(attrs.evolve(record, knowledge=known))
    assert any(issue.severity.is_serious for issue in found.values()) is ill


@pytest.mark.parametrize(
    ("dropped", "ever", "severity"),
    [
        ((1,), True, IssueSeverity.LOW),
        ((1,), False, IssueSeverity.HIGH),  # nothing ever chose it
        ((1, 2), True, IssueSeverity.HIGH),  # half of them: the router has collapsed
    ],
)
def test_an_expert_that_is_dropped_within_the_run(
    dropped: tuple[int, ...], ever: bool, severity: IssueSeverity
) -> None:
    gone = np.zeros(STEPS)
    gone[:3] = 1.0 if ever else 0.0
    experts = [Layer(name=f"experts.{i}", op="index", grad=gone if i in dropped else 1.0) for i in range(4)]
    edges = [("stem", e.name) for e in experts]
    edges += [(e.name, f"op:{e.name}") for e in experts] + [(f"op:{e.name}", "head") for e in experts]
    record = flow_record(
        Layer(name="stem"),
        *experts,
        Layer(name="head"),
        edges=[*edges, ("head", "loss")],
        optimizer="Adam",
    )
    found = {issue.layer: issue.severity for issue in detect(record, dead())}
    assert found == {f"experts.{i}": severity for i in dropped}


@pytest.mark.parametrize(
    ("dropped", "rows", "severity"),
    [
        ((1,), 64, IssueSeverity.LOW),
        ((1, 2), 64, IssueSeverity.HIGH),
        ((0, 1, 2), 64, IssueSeverity.HIGH),
        ((0, 1, 2), 1, None),  # so few rows that chance leaves some out
    ],
)
@pytest.mark.parametrize("saturated", [None, 0.0, 0.1])
def test_experts_that_are_not_called_any_more(
    dropped: tuple[int, ...], rows: int, severity: IssueSeverity | None, saturated: float | None
) -> None:
    if saturated == 0 and severity:  # the scores are near each other in all rows
        severity = IssueSeverity.LOW
    scores = ActivationRecord(
        name="stem:softmax", op="softmax", kind="softmax", functional=True, layer="stem", num_units=0,
        fired_share=np.full(STEPS, np.nan), input_rms=np.ones(STEPS),
        saturated_share=np.full(STEPS, saturated or 0.0), width=4,
    )  # fmt: skip
    ran = np.arange(STEPS) < 3
    given = np.where(np.arange(STEPS) % 2, 1, 2) * rows * 8  # other numbers from step to step
    experts = [
        Layer(
            name=f"experts.{i}.fc",
            op="index",
            grad=np.where(ran | (i not in dropped), 1.0, np.nan),
            fields={
                "called": ran | (i not in dropped),
                "num_elements": np.where(ran | (i not in dropped), given, 0),
                "shape": (rows, 8),
            },
        )
        for i in range(4)
    ]
    edges = [("stem", e.name) for e in experts] + [(e.name, "head") for e in experts]
    record = flow_record(
        Layer(name="stem"),
        *experts,
        Layer(name="head"),
        edges=[*edges, ("head", "loss")],
        optimizer="Adam",
        activations=() if saturated is None else (scores,),
    )
    found = detect(record, dead())
    assert [(issue.layer, issue.severity) for issue in found] == ([("experts", severity)] if severity else [])


def test_layers_in_a_row_are_no_alternatives() -> None:
    gone = np.zeros(STEPS)
    gone[:3] = 1.0
    layers = [Layer(name=f"blocks.{i}", op="mul", grad=gone if i == 0 else 1.0) for i in range(5)]
    (issue,) = detect(flow_record(*layers, optimizer="Adam"), dead())
    assert (issue.layer, issue.severity) == ("blocks.0", IssueSeverity.HIGH)
