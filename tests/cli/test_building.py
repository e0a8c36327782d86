"""Arguments of the user's function, and what it returns on another device and in another dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradflow.cli.building import Built, _placed, builder_arguments
from gradflow.cli.faults import CommandError
from gradflow.records import FlowRecord
from gradflow.report import Report
from tests.cli.running import run, write


def sized(width: int = 8, depth=2, *, norm=False, rate: float = 1, act="relu", size=0) -> None: ...


def needs(width: int, flag: bool, name, *, other=None) -> None: ...


def takes_any(**more: Any) -> None: ...


@pytest.mark.parametrize(
    ("build", "pairs", "expected"),
    [
        (sized, [("width", "64"), ("width", "32")], {"width": 32}),
        (sized, [("norm", "true"), ("rate", "0.1")], {"norm": True, "rate": 0.1}),
        (sized, [("norm", "False"), ("depth", "2.5"), ("size", "0x10")],
         {"norm": False, "depth": 2.5, "size": 16}),
        (sized, [("act", "gelu")], {"act": "gelu"}),
        (sized, [("act", "'a=b'")], {"act": "a=b"}),
        (sized, [("act", "[1, (2, 3)]"), ("width", "None")], {"act": [1, (2, 3)], "width": None}),
        (sized, [("act", "__import__('os')")], {"act": "__import__('os')"}),
        (takes_any, [("any", "1e-3"), ("b", "")], {"any": 0.001, "b": ""}),
        (lambda: None, [], {}),
        (dict, [("a", "1")], {"a": 1}),
    ],
)  # fmt: skip
def test_values_are_literals_or_texts(build: Callable[..., Any], pairs: Any, expected: Any) -> None:
    assert builder_arguments(build, pairs, "f()") == expected


@pytest.mark.parametrize(
    ("build", "pairs", "told"),
    [
        (sized, [("widht", "1")], "f() has no parameter 'widht'; its parameters are width: int = 8, depth=2, "
                                  "norm=False, rate: float = 1, act='relu', size=0; did you mean width?"),
        (lambda: None, [("a", "1")], "f() has no parameter 'a'; it has no parameters"),
        (sized, [("width", "wide")], "f(): expected a number for the parameter width: int = 8, got 'wide'"),
        (sized, [("depth", "True")], "f(): expected a number for the parameter depth=2, got 'True'"),
        (sized, [("norm", "1")], "f(): expected True or False for the parameter norm=False, got '1'"),
        (sized, [("norm", "off")], "f(): expected True or False for the parameter norm=False, got 'off'"),
        (needs, [("flag", "true")], "f() needs a value for width, name: give it by --set width=VALUE; its "
                                    "parameters are width: int, flag: bool, name, other=None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_signature_is_told_with_what_there_is(
    build: Callable[..., Any], pairs: Any, told: str
) -> None:
    with pytest.raises(CommandError) as raised:
        builder_arguments(build, pairs, "f()")
    assert str(raised.value) == told


def test_types_alone_tell_as_well() -> None:
    def typed(width: int, flag: bool, other: NotThere = None) -> None: ...  # type: ignore  # noqa: F821

    with pytest.raises(CommandError, match="f.. needs a value for width, flag"):
        builder_arguments(typed, [], "f()")

    def typed(width: int, flag: bool) -> None: ...

    with pytest.raises(CommandError, match="expected a number for the parameter width: .*int.*, got 'x'"):
        builder_arguments(typed, [("width", "x"), ("flag", "yes")], "f()")
    with pytest.raises(CommandError, match="expected True or False for the parameter flag"):
        builder_arguments(typed, [("width", "1"), ("flag", "yes")], "f()")
    assert builder_arguments(typed, [("width", "1"), ("flag", "true")], "f()") == {"width": 1, "flag": True}


def test_the_command_hands_them_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{write(tmp_path)}:sized"
    told = ["--set", "width=4", "--set", "depth=3", "--set", "more=[1]", "--set", "name=y"]
    status, out, err = run(capsys, "diagnose", target, "--quiet", *told)
    assert (status, out, err) == (0, "", "sized 4 3 False 0.001 y {'more': [1]}\n")
    status, _, err = run(capsys, "diagnose", f"{target[:-5]}needs")
    assert (status, err.count("\n")) == (2, 1)
    assert (
        "needs() needs a value for width: give it by --set width=VALUE; its parameters are width, depth=1"
        in err
    )
    assert "expected NAME=VALUE, got 'width'" in run(capsys, "diagnose", target, "--set", "width")[2]


def test_mode_detail_and_dtype_reach_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = write(tmp_path), tmp_path / "flow.json"
    options = ["--mode", "eval", "--detail", "full", "--dtype", "float64", "--steps", "2", "--seed", "3"]
    assert run(capsys, "diagnose", f"{path}:trained", *options, "--json", data, "--quiet") == (0, "", "")
    ran = Report.from_json(data).record
    assert isinstance(ran, FlowRecord)
    how = ran.provenance
    assert (how.mode, how.detail, how.dtypes, how.seed) == ("eval", "full", ("float64",), 3)
    assert ran.graph.measured
    status, _, err = run(capsys, "diagnose", path, "--device", "nowhere")
    assert status == 2
    assert "net.py:build() returned cannot be made nowhere: RuntimeError" in err


def stepped() -> tuple[nn.Linear, torch.optim.Adam]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("form", [lambda o: o, lambda o: [o], lambda o: {"a": o}])
def test_the_optimizer_s_state_follows_the_model(form: Callable[[Any], Any]) -> None:
    model, optimizer = stepped()
    loss = nn.CrossEntropyLoss(weight=torch.ones(2))
    _placed(Built(model, [], loss, form(optimizer)), None, "float64")
    assert model.weight.dtype == loss.weight.dtype == torch.float64
    assert optimizer.param_groups[0]["params"][0] is model.weight
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float64


X, Y = torch.ones(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    ("batches", "times"),
    [
        ([(X, Y), (X, Y)], 2),
        (DataLoader(TensorDataset(X, Y), batch_size=2), 2),
        (iter([{"x": X, "y": Y}]), 1),
        (lambda: (X, Y), 1),
    ],
)
def test_batches_are_cast_whatever_draws_them(batches: Any, times: int) -> None:
    cast = _placed(Built(nn.Linear(3, 2), batches, None), None, "float16").batches
    for _ in range(times):  # a list and a loader can be gone through again
        found = cast() if callable(cast) else next(iter(cast))
        x, y = found.values() if isinstance(found, dict) else found
        assert (x.dtype, y.dtype) == (torch.float16, torch.int64)


@pytest.mark.parametrize("wrong", [X, (X, Y), {"x": X}, dict, 3])
def test_what_are_no_batches_is_left_for_the_run_to_refuse(wrong: Any) -> None:
    assert _placed(Built(nn.Linear(3, 2), wrong, None), None, "float16").batches is wrong


def test_nothing_is_touched_unless_asked_for() -> None:
    given = Built(nn.Linear(3, 2), [X], None)
    assert _placed(given, None, None) is given
    assert _placed(given, "cpu", None) == given


@pytest.mark.parametrize("text", ["inf", "-inf", "nan"])
def test_numbers_that_are_no_literals_are_numbers_all_the_same(text: str) -> None:
    def build(scale: float = 1.0, width: int = 3) -> None: ...

    found = builder_arguments(build, [("scale", text)], "build()")["scale"]
    assert isinstance(found, float)
    assert repr(found) == text
    with pytest.raises(CommandError, match="expected a number for the parameter width"):
        builder_arguments(build, [("width", text)], "build()")
