"""One process alone has what several show together."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import nn

import gradflow as gf
from gradflow.errors import ModelInputError
from gradflow.records import ExchangeRecord, FlowRecord
from tests.distributed.worlds import World


def same(a: FlowRecord, b: FlowRecord) -> bool:
    """Whether two records are the same, but for how often processes have exchanged something."""
    assert a.processes is not None
    assert b.processes is not None
    processes = attrs.evolve(b.processes, exchanged=a.processes.exchanged)
    return a == attrs.evolve(b, processes=processes)


def test_one_process_has_the_record_of_all_and_alone_judges_it(world: World) -> None:
    *others, (everywhere, record, judged, pure, no_other) = world.results("told_on_one")
    assert same(record, everywhere)
    assert judged > 0
    assert pure
    assert no_other
    assert record.processes.exchanged.gathered_bytes < everywhere.processes.exchanged.gathered_bytes
    assert record.processes.exchanged != ExchangeRecord()
    for rank, (_, nothing, did_judge, is_pure, is_none) in enumerate(others):
        assert nothing is None
        assert did_judge == 0
        assert is_pure
        assert is_none == (rank > 0)  # of the second, the first is told


def test_a_process_that_takes_no_part_cannot_be_told(world: World) -> None:
    for alone, beyond in world.results("told_on_none"):
        assert "process 0 is to have the report, and takes no part in the analysis" in alone
        assert "runs on each process by itself. Pass the processes that do" in alone
        assert f"process {world.size} is to have the report" in beyond


def test_without_other_processes_this_one_is_told() -> None:
    model, batch = nn.Linear(3, 1), torch.ones(4, 3)
    record = gf.analyze(model, [batch], lambda y: y.mean(), processes=gf.OnRank(0))
    assert record.steps == 1
    with pytest.raises(ModelInputError, match="process 1 is to have the report, and takes no part"):
        gf.analyze(model, [batch], lambda y: y.mean(), processes=gf.OnRank(1))


@pytest.mark.parametrize("rank", [-1, True, "first"])
def test_a_rank_is_a_whole_number(rank: object) -> None:
    with pytest.raises(ModelInputError, match="OnRank takes the rank of a process"):
        gf.OnRank(rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("processes", ["alone", gf.OnRank(0)])
def test_what_a_process_measures_alone_it_has_itself(processes: object) -> None:
    with pytest.raises(ModelInputError, match="OnRank says which of several processes"):
        gf.OnRank(0, processes)


def test_all_that_watch_a_training_have_its_history() -> None:
    with pytest.raises(ModelInputError, match="all that watch have the history"):
        gf.Monitor(nn.Linear(2, 1), processes=gf.OnRank(0))
