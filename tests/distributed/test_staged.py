"""The record of the stages of a pipeline is that of the whole model in one process."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import ModelInputError
from gradflow.functional.processes.shards import _spanned
from gradflow.functional.updates.curvature import curvature
from gradflow.records import FlowRecord, Provenance, Reason
from tests.distributed.pieces import Chain, Whole, pieces
from tests.distributed.scenarios import diagnosed
from tests.distributed.staged import (
    ON_FOUR,
    ON_TWO,
    OTHERS,
    PIECES,
    Dropping,
    Straight,
    own,
    whole,
)
from tests.distributed.test_same_record import differences
from tests.distributed.test_told import same as same_but_counts
from tests.distributed.worlds import World

ILL = ("CRITICAL", "HIGH", "MEDIUM")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, World]:
    """All scenarios, on as many processes as each wants."""
    found = {}
    for size, wanted in ((2, ON_TWO), (4, ON_FOUR)):
        names = [f"{how} {name}" for how, name in wanted]
        names += [*(f"piece {kind}" for kind in PIECES), *OTHERS] if size == 2 else []
        folder = tmp_path_factory.mktemp("stages")
        found[size] = World.started(size, names, folder, "tests.distributed.staged")
    for world in found.values():
        world.joined()
    return found


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two stages, each on two of four processes.

    On a machine that is busy gloo may break the connections of a process that has raised before the others
    have heard of it, and end one of them: then all are started once more.
    """
    names = ["told_on_one", "raises_beside"]

    def world() -> World:
        folder = tmp_path_factory.mktemp("beside")
        return World.started(4, names, folder, "tests.distributed.staged_beside").joined()

    first = world()
    came = all((first.folder / f"{name}.{rank}").exists() for name in names for rank in range(4))
    return first if came else world()


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for (_, name), (moves, options) in {**ON_TWO, **ON_FOUR}.items():
        key = name, moves, "detail" in options
        if key not in found:
            found[key] = diagnosed(*whole(name), moves=moves, **options)
    return found


@pytest.mark.parametrize(
    ("size", "how", "name"), [(2, *key) for key in ON_TWO] + [(4, *key) for key in ON_FOUR]
)
def test_the_record_is_that_of_the_whole_model(
    size: int, how: str, name: str, worlds: dict[int, World], alone: dict[Any, Any]
) -> None:
    moves, options = (ON_TWO if size == 2 else ON_FOUR)[how, name]
    expected, verdicts = alone[name, moves, "detail" in options]
    first, *others = worlds[size].results(f"{how} {name}")
    wrong = differences(first["record"], expected)
    assert not wrong, "\n".join(wrong[:40])
    assert sorted(first["verdicts"]) == sorted(verdicts)
    assert ("sick" in name or "born" in name) == any(severity in ILL for _, _, severity in verdicts)
    assert same_reasons(first["record"], expected)
    assert [own(layer.name) for layer in first["record"]] == [layer.name for layer in expected]
    assert all(result["changed"] == [] for result in (first, *others))
    for other in others:
        assert other["record"] == first["record"]
        assert other["verdicts"] == first["verdicts"]


@pytest.mark.parametrize("name", [name for how, name in ON_TWO if how == "alone"])
def test_all_else_of_the_record_is_that_of_the_whole_model(
    name: str, worlds: dict[int, World], alone: dict[Any, Any]
) -> None:
    moves, options = ON_TWO["alone", name]
    expected, _ = alone[name, moves, "detail" in options]
    a, b = (told(record) for record in (worlds[2].result(f"alone {name}", 0)["record"], expected))
    assert [key for key in a.keys() | b.keys() if not same(a.get(key, ""), b.get(key, ""))] == []


def told(record: FlowRecord) -> dict[str, Any]:
    """Return every number and word of a record, but for where it comes from, by where it stands.

    Whether the whole model sees what it is to predict is not measured of stages.
    """
    sights = [sight for sight in record.parts.sights if not sight.whole]
    parts = attrs.evolve(record.parts, sights=sights)
    record = attrs.evolve(record, provenance=Provenance(), parts=parts, processes=None)
    found: dict[str, Any] = {}

    def put(value: Any, where: str) -> None:
        for key, inner in enumerate(value) if isinstance(value, list) else dict(value).items():
            place = f"{where}.{key}"
            if isinstance(inner, (list, dict)):
                named = isinstance(inner, dict) and "source" in inner and "target" in inner
                put(inner, f"{where}.{inner['source']}>{inner['target']}" if named else place)
            else:
                found[place] = inner

    put(json.loads(record.to_json()), "")
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two numbers are the same to 1e-5, or to the rounding of what is a root of a difference."""
    both = isinstance(a, float) and isinstance(b, float)
    return a == b or (both and a == pytest.approx(b, rel=1e-5, abs=1e-7))


@pytest.mark.parametrize("kind", PIECES)
def test_what_lies_between_two_stages_is_seen_from_both(kind: str, worlds: dict[int, World]) -> None:
    stages, batches = pieces(kind)
    options = dict(PIECES[kind])
    model = (Whole if kind == "skips" else Chain)(stages)
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if options.pop("moves", False) else None
    expected = gf.diagnose(
        model, batches, nn.CrossEntropyLoss(), steps=5, optimizer=optimizer, seed=0, **options
    )
    first, second = worlds[2].results(f"piece {kind}")
    wrong = differences(first["record"], expected.record)
    assert not wrong, "\n".join(wrong[:40])
    assert graph_of(first["record"]) == graph_of(expected.record)
    assert same_reasons(first["record"], expected.record)
    verdicts = [(i.layer, i.issue_type.value, i.severity.value) for i in expected.issues]
    assert sorted(first["verdicts"]) == sorted(verdicts)
    assert second["record"] == first["record"]
    assert first["changed"] == second["changed"] == []


def test_what_ends_the_gradient_in_a_later_stage_is_told_of_an_earlier_one(worlds: dict[int, World]) -> None:
    record = worlds[2].result("piece dead", 0)["record"]
    (part,) = record.reach.of("stage0.2.bias")
    assert (part.reason, part.at, part.layer_at, part.slices) == (
        Reason.OFF, "stage1.0", "stage1.0", ((0, 5),),
    )  # fmt: skip
    nodes = {node.name: node for node in worlds[2].result("piece detached", 0)["record"].graph_record.nodes}
    assert not nodes["stage0.2"].reachable


def test_what_is_not_taken_says_what_to_do(worlds: dict[int, World]) -> None:
    for said in worlds[2].results("refused"):
        for what in ("transform='vjp'", "processes='alone'"):
            name = what.split("=")[-1].strip("'")
            assert f"the model is a stage of a pipeline, and {what} was passed" in said[name]
        assert "and an optimizer that asks for the loss at other parameters was passed" in said["lbfgs"]
        assert "ScheduleInterleaved1F1B is of a pipeline of 4 stages on 2 processes" in said["several"]
        assert "as ScheduleGPipe and Schedule1F1B run them" in said["several"]
        assert "cut it into 2, and pass `PipelineStage(part, rank, 2, device)`" in said["several"]
        assert said["vjp"].endswith("Pass transform='fused', outside of any transform of torch.func.")
        assert said["alone"].endswith("call gradflow on the process of every stage.")
        assert "or pass one that steps once a batch" in said["lbfgs"]
        assert "model is a PipelineStage" in said["outline"]


def test_a_stage_without_a_batch_ends_the_run_on_all(worlds: dict[int, World]) -> None:
    first, second = worlds[2].results("runs_out")
    assert first.steps == second.steps == 3
    assert first == second
    assert any("ended after 3 of 5 steps" in note for note in first.provenance.notes)


def test_what_stages_send_one_another_is_counted(worlds: dict[int, World]) -> None:
    records, other = worlds[2].results("counted")
    assert other == records
    assert FlowRecord.from_json(records[0].to_json()) == records[0]
    assert not [i for i in gf.detect(records[0]) if "process" in i.description]
    eight, nine = (record.processes for record in records)
    fewer, more = eight.exchanged, nine.exchanged
    assert more.messages - fewer.messages == 2  # a batch forward, its gradient back
    assert more.message_bytes - fewer.message_bytes == 2 * 16 * 16 * 8
    assert fewer.messages >= 16
    assert fewer.gradients == 0
    assert 0 < fewer.gathered_bytes < fewer.other_bytes
    assert eight.ranks == (0,)
    assert eight.losses.shape == (8, 1)


def test_losses_are_added_up_where_the_schedule_does(worlds: dict[int, World]) -> None:
    for measured, trained in worlds[2].results("summed"):
        assert trained
        assert all(measured[name] == pytest.approx(norm, rel=1e-9) for name, norm in trained.items())


@pytest.mark.parametrize(("name", "where"), [("raises_first", 0), ("raises_last", 1)])
def test_a_stage_that_raises_ends_the_others(name: str, where: int, worlds: dict[int, World]) -> None:
    results = worlds[2].results(name)
    assert results[where][0].startswith("ValueError: too large for me")
    expected = f"ProcessError: process {where} raised ValueError: too large for me; so the analysis ends"
    assert results[1 - where][0].startswith(expected)
    for _, seconds, changed, losses in results:
        assert seconds < 30
        assert not changed
        assert losses.tolist() == results[0][3].tolist()  # the same processes go on


def test_a_stage_may_be_sharded_and_split(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("twice")
    world = World.started(8, ["spread_twice"], folder, "tests.distributed.staged_beside").joined()
    model, batches, loss_fn = whole("heads-sick")
    expected, verdicts = diagnosed(model, batches[:3], loss_fn, moves=True)
    first, *others = world.results("spread_twice")
    wrong = differences(first["record"], expected)
    assert not wrong, "\n".join(wrong[:40])
    assert sorted(first["verdicts"]) == sorted(verdicts)
    assert all(other["record"] == first["record"] for other in others)
    assert all(result["changed"] == [] for result in (first, *others))
    expected_words = (
        "the parameters of the model are spread over 4 processes each (dp: 2, tp: 2), of 8 in all"
    )
    assert all(result["said"].startswith(expected_words) for result in (first, *others))


def test_meshes_that_nobody_has_put_together_do_not_tell_who_shares_a_stage() -> None:
    class Mesh:
        def __init__(self, *ranks: int) -> None:
            self.mesh = torch.tensor(ranks)

        def size(self) -> int:
            return self.mesh.numel()

    assert _spanned([Mesh(0, 2), Mesh(3, 1, 0, 2)], 4) == (0, 1, 2, 3)
    with pytest.raises(ModelInputError, match="meshes that are not of one DeviceMesh"):
        _spanned([Mesh(0, 2), Mesh(0, 1)], 4)


def test_one_of_several_that_have_a_stage_ends_all(beside: World) -> None:
    *others, (own_said, _, _) = beside.results("raises_beside")
    assert own_said.startswith("ValueError: too large for me")
    for said, seconds, losses in others:
        assert said.startswith("ProcessError: process 3 raised ValueError: too large for me; so the analysis")
        assert seconds < 30
        assert losses.tolist() == others[0][2].tolist()


def test_one_process_of_one_stage_has_the_record_of_all(beside: World) -> None:
    results = beside.results("told_on_one")
    everywhere, record = results[1]
    assert same_but_counts(record, everywhere)
    assert len(record.updates.curves) == 2
    assert any("flow on every edge was measured at step 3" in note for note in record.provenance.notes)
    assert [told for _, told in (results[0], *results[2:])] == [None] * 3


def test_a_stage_that_is_killed_ends_the_others(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World.started(2, ["killed"], tmp_path_factory.mktemp("killed"), "tests.distributed.staged")
    said, seconds, changed, _ = world.joined().result("killed", 0)
    assert said.startswith("ProcessError: process 1 of the analysis is gone")
    assert seconds < 30
    assert not changed


def test_batch_norms_of_microbatches_are_told(worlds: dict[int, World]) -> None:
    record = worlds[2].result("alone resnet", 0)["record"]
    assert any("in one piece, not in 2 microbatches: batch norms" in n for n in record.provenance.notes)


def test_a_traced_model_has_the_layers_of_the_whole_one(worlds: dict[int, World]) -> None:
    expected = gf.analyze(Straight().double(), pieces("plain")[1], nn.CrossEntropyLoss(), seed=0)
    first, second = worlds[2].results("traced")
    wrong = [line for line in differences(first, expected) if not line.startswith("ActivationRecord")]
    assert not wrong, "\n".join(wrong[:40])
    assert first == second


def test_how_the_loss_bends_and_what_drops_in_eval_mode(worlds: dict[int, World]) -> None:
    stages, batches = pieces("plain")
    model = Chain([stages[0], nn.Sequential(Dropping(), nn.Tanh(), stages[1][1])])  # type: ignore[index]
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    expected = gf.analyze(
        model, batches, nn.CrossEntropyLoss(), optimizer=adam, seed=0, measurements=[curvature()]
    )
    (first, changed), (second, also) = worlds[2].results("bent")
    assert first == second
    assert changed == also == []
    assert len(first.updates.curves) == 2
    assert expected.updates is not None
    for found, exact in zip(first.updates.curves, expected.updates.curves, strict=True):
        assert found.slope == pytest.approx(exact.slope, rel=1e-9)
        assert found.actual == pytest.approx(exact.actual, rel=1e-9)
        assert found.bend == pytest.approx(exact.bend, rel=1e-2)
        assert found.changes == pytest.approx(exact.changes, rel=1e-6, abs=1e-12)
    (dropout,) = first.parts.dropouts
    assert (dropout.name, dropout.in_eval) == ("stage1.0", True)


def graph_of(record: FlowRecord) -> set[Any]:
    """Return the nodes and edges of a graph, and why some carry nothing."""
    assert record.graph_record is not None
    nodes = {(n.name, n.kind, n.type, n.reachable, n.reason, n.parameters) for n in record.graph_record.nodes}
    return nodes | {(e.source, e.target, e.severed, e.reason) for e in record.graph_record.edges}


def same_reasons(found: FlowRecord, expected: FlowRecord) -> bool:
    """Whether two records tell the same of why gradient did not arrive."""

    def told(record: Any) -> list[Any]:
        parts = [attrs.evolve(part, whose=own(part.whose)) for part in record.reach.unreached]
        return sorted(
            (own(p.parameter), p.reason.value, own(p.at), own(p.layer_at), p.op, p.whose, p.slices)
            for p in parts
        )

    return told(found) == told(expected)
