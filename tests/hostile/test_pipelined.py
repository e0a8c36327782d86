"""Models that are split for a pipeline: what has no loss of its own is refused, or the record says so."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import pipelining

import gradflow as gf
from gradflow.errors import LossError, ModelInputError
from gradflow.functional.torch_pipelining import stages_of
from tests.models import squares

pytestmark = pytest.mark.usefixtures("group")
CPU = torch.device("cpu")
X = torch.linspace(-1.0, 1.0, 20).reshape(5, 4)
STAGE = r"The model is stage 0 \(from 0\) of the 2 of a pipeline"


class Whole(nn.Module):
    """A model of two parts, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())

    @property
    def front(self) -> nn.Module:
        return nn.Sequential(self.a, nn.Tanh())

    @property
    def back(self) -> nn.Module:
        return nn.Sequential(self.b, nn.Tanh(), self.c)


def stage(module: nn.Module, index: int = 0, number: int = 2) -> pipelining.PipelineStage:
    return pipelining.PipelineStage(module, index, number, CPU, input_args=X, output_args=X)


def split() -> pipelining.Pipe:
    with warnings.catch_warnings():  # of its own tracer
        warnings.simplefilter("ignore")
        return pipelining.pipeline(Whole(), mb_args=(X,), split_spec={"b": pipelining.SplitPoint.BEGINNING})


def plain(output: Tensor) -> Tensor:
    return output.sum()


def noted(model: nn.Module, loss_fn: Any, words: str) -> bool:
    notes = gf.analyze(model, [X], loss_fn, steps=1).provenance.notes
    return any(words.replace("\\", "") in note for note in notes)


# ------------------------------------------------------------------------------------- what is no model


class Mine(pipelining.PipelineStage):
    """A stage of a class of the user's."""


REFUSED: dict[str, Any] = {
    "a stage": (lambda: stage(Whole()), r"PipelineStage is of a pipeline of 2 stages on 1 .*the whole model"),
    "the last stage": (lambda: stage(Whole(), 1), r"PipelineStage is of a pipeline of 2 stages on 1"),
    "a stage of the user's": (
        lambda: Mine(Whole(), 0, 2, CPU, input_args=X, output_args=X),
        "the Mine is of a pipeline of 2 stages on 1 processes",
    ),
    "a stage of a traced model": (
        lambda: split().build_stage(0, CPU),
        "the _PipelineStage is of a pipeline of 2 stages on 1 processes",
    ),
    "a schedule": (
        lambda: pipelining.ScheduleGPipe(stage(Whole()), 2, loss_fn=squares),
        "the ScheduleGPipe is of a pipeline of 2 stages on 1 processes",
    ),
    "a schedule of several stages": (
        lambda: pipelining.ScheduleInterleaved1F1B([stage(Whole()), stage(Whole(), 1)], 2, loss_fn=squares),
        "the ScheduleInterleaved1F1B is of a pipeline of 2 stages on 1 processes",
    ),
    "all stages": (lambda: split(), r"'\(model\)' is a Pipe, split into stages.*Pass the whole model"),
    "all stages, inside": (lambda: nn.Sequential(split()), "'0' is a Pipe, split into stages"),
}


def test_calls_that_take_a_module_say_what_a_stage_is() -> None:
    with pytest.raises(ModelInputError, match=r"is a PipelineStage, one of the parts.*diagnose.*take it"):
        gf.outline(stage(Whole()), X, squares)
    with pytest.raises(ModelInputError, match=r"is a ScheduleGPipe.*no stage.*without the others.*'auto'"):
        gf.Monitor(pipelining.ScheduleGPipe(stage(Whole()), 2, loss_fn=squares), squares)


def test_a_pipeline_of_one_stage_is_its_module() -> None:
    model = Whole()
    schedule = pipelining.ScheduleGPipe(stage(model, 0, 1), 2, loss_fn=squares)
    plain, found = gf.analyze(model, [X] * 2, squares), gf.analyze(schedule, [X] * 2)
    assert found.losses.tolist() == plain.losses.tolist()
    assert [layer.name for layer in found] == ["a", "b", "c"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_runs_a_pipeline_is_no_model(name: str) -> None:
    make, match = REFUSED[name]
    thing = make()
    for way in (gf.analyze, gf.diagnose):
        with pytest.raises(ModelInputError, match=match):
            way(thing, [X] * 2, squares)


def test_no_gradient_passes_between_stages_that_are_called_in_one_process() -> None:
    """Why `Pipe` is refused: it would be told that its first layers get nothing."""
    model, pipe = Whole(), split()
    squares(model(X)).backward()
    squares(pipe(X)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [p.grad is not None for p in pipe.parameters()] == [False] * 2 + [True] * 4


# ------------------------------------------------------------------------------- the module of a stage


def test_a_stage_with_the_plain_sum_of_its_output_is_refused() -> None:
    kept = stage(Whole().front)
    for loss in (plain, lambda output: output.mean(), lambda output: -output.mean(0).sum() / 3):
        with pytest.raises(LossError, match=r"plain sum or mean.*stage 0 \(from 0\) of the 2.*gradient\)"):
            gf.diagnose(kept.submod, lambda: X, loss)


@pytest.mark.parametrize("transform", ["fused", "vjp"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_traced_stage_and_one_amid_the_others_are_refused(index: int, transform: Any) -> None:
    kept = split().build_stage(0, CPU) if index == 0 else stage(Whole(), 1, 3)
    with pytest.raises(LossError, match=rf"the model is stage {index}"):
        gf.analyze(kept.submod, [X], lambda output: output.sum(), transform=transform)


def test_a_stage_with_another_loss_is_measured_and_the_record_says_what_it_is() -> None:
    model = Whole()
    squares(model(X)).backward()
    kept = stage(copy.deepcopy(model.front))
    sent = torch.autograd.grad(squares(model.back(h := model.front(X))), h)[0]
    record = gf.analyze(kept.submod, [X], lambda output: (output * sent).sum(), steps=1)
    assert any(note.startswith(STAGE.replace("\\", "")) for note in record.provenance.notes)
    for name, parameter in model.front.named_parameters():
        assert parameter.grad is not None
        found = record.parameter(name).grad_norm[0]
        assert found == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
    assert STAGE.replace("\\", "") in str(gf.diagnose(kept.submod, [X], squares))


def test_a_stage_is_known_by_the_module_inside_a_wrapper_too() -> None:
    wrapped = nn.parallel.DistributedDataParallel(Whole())
    kept = stage(wrapped)
    assert noted(wrapped, squares, STAGE)
    assert noted(wrapped.module, squares, STAGE)
    assert not noted(wrapped.module.front, squares, STAGE)
    assert kept.is_first


def test_the_last_stage_and_the_whole_model_have_a_loss() -> None:
    model = Whole()
    first, last, alone = stage(model.front), stage(model.back, 1), stage(Whole(), 0, 1)
    assert noted(first.submod, squares, STAGE)
    h = model.front(X).detach()
    record = gf.analyze(last.submod, [h], squares, steps=1)
    assert not any("pipeline" in note for note in record.provenance.notes)
    assert not noted(alone.submod, squares, "pipeline")
    assert not noted(model, squares, "pipeline")
    assert not noted(nn.Sequential(first.submod, last.submod), squares, "pipeline")


def test_what_is_handed_on_past_the_next_stage_is_seen() -> None:
    class Skipping(Whole):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            return self.c(self.b(h).tanh()) + h[:, :2]

    def stages(model: nn.Module, *names: str) -> list[bool]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = dict.fromkeys(names, pipelining.SplitPoint.BEGINNING)
            pipe = pipelining.pipeline(model, mb_args=(X,), split_spec=spec)
        return [stages_of(pipe.build_stage(0, CPU))[0].is_chain]

    assert stages(Whole(), "b", "c") == [True]
    assert stages(Skipping(), "b", "c") == [False]
    assert stages(Skipping(), "c") == [True]
