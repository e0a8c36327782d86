"""Help, examples and completion of the command."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gradflow.cli.completing import SHELLS
from gradflow.cli.parser import make_parser
from tests.cli.running import run, write

COMMANDS = ("diagnose", "show", "compare", "graph", "completion")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 110
    assert "Exit status: 0 done, 1 an issue at or above --fail-on" in out
    examples = re.findall(
        rf"gradflow {command} .*?(?=\s{{2,}}|[)>]|$)", out.partition("examples:\n")[2], re.M
    )
    assert len(examples) >= 2
    for example in examples:
        arguments = shlex.split(example)[1:]
        options = make_parser().parse_args([a for a in arguments if a][: [*arguments, "--"].index("--")])
        assert options.command == command


def test_help_says_what_no_optimizer_means_and_lists_every_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "Without an optimizer the parameters are held fixed" in run(capsys, "diagnose", "--help")[1]
    out = run(capsys, "--help")[1]
    assert [name for name in COMMANDS if re.search(rf"^    {name}\b", out, re.M)] == list(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["diagnose", "net.py", "--clip", "0"], "expected a number above 0, got '0'"),
        (["diagnose", "net.py", "--budget", "inf"], "expected a number above 0, got 'inf'"),
        (["diagnose", "net.py", "--set", "1a=2"], "expected NAME=VALUE, got '1a=2'"),
        (["diagnose", "net.py", "--budget", "3"], "--budget bounds what --try does: give --try as well"),
        (["show", "flow.json", "--", "--x"], "unrecognized arguments: --x"),
        (["diagnose", "net.py", "--stepss=3"], "unrecognized arguments: --stepss=3; did you mean --steps?"),
        (["compare", "a.json", "b.json", "--html", "c"], "usage: gradflow compare "),
        (["completion", "tcsh"], "invalid choice: 'tcsh'"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert told in err


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_argcomplete_s(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("argcomplete")
    status, out, _ = run(capsys, "completion", shell)
    assert status == 0
    assert "_ARGCOMPLETE" in out
    assert "gradflow" in out


def test_without_argcomplete_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = run(capsys, "completion", "bash")
    assert status == 2
    assert "pip install 'gradient-flow[completion]'" in err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gradflow ", set(COMMANDS)),
        ("gradflow diagnose --pipeline re", {"recurrent"}),
        ("gradflow diagnose --fail", {"--fail-on"}),
        ("gradflow diagnose n", {"net.py"}),
        ("gradflow show n", {"notes.json"}),
    ],
)
def test_a_shell_is_answered_without_torch(line: str, expected: set[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    write(tmp_path)
    (tmp_path / "notes.json").touch()
    code = "import sys; sys.modules['torch'] = None; from gradflow.cli import main; main()"
    answer = tmp_path / "answer"
    environment = os.environ | {
        "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=False)
    found = {word.strip() for word in answer.read_text().split("\n")}
    assert expected <= found
    assert not (line.endswith("n") and {"net.py", "notes.json"} <= found)


def test_the_parser_s_commands_are_those_told() -> None:
    (commands,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert tuple(commands.choices) == COMMANDS
