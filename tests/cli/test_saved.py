"""`gradflow show` and `gradflow compare`: what was saved, in every format, and what is no such thing."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from gradflow.records import IssueSeverity, IssueType, TrialRecord, TrialsRecord, TrialVerdict
from gradflow.report import Report
from tests.cli.running import python, run
from tests.samples import chain_record, make_issue, sick_chain


def sick_report() -> Report:
    record, issues, causes = sick_chain()
    return Report(record=record, issues=issues, causes=causes, lines=("Outliers: none",))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "flow.json"
    sick_report().to_json(path)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], lambda report: report.text() + "\n"),
        (["--verbose"], lambda report: report.text("full") + "\n"),
        (["--format", "json"], lambda report: report.to_json() + "\n"),
        (["--format", "markdown"], lambda report: report.markdown()),
        (["--format", "github"], lambda report: report.annotations() + "\n"),
        (["--quiet"], lambda report: ""),
    ],
)
def test_a_report_is_shown_as_it_was(
    saved: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: object
) -> None:
    assert run(capsys, "show", saved, *options) == (0, expected(sick_report()), "")  # type: ignore[operator]


def test_it_is_written_and_is_a_gate(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, again = tmp_path / "flow.html", tmp_path / "again.json"
    told = ["--html", page, "--json", again, "--quiet", "--fail-on", "high"]
    assert run(capsys, "show", saved, *told) == (1, "", "")
    assert page.read_text(encoding="utf-8") == sick_report().html()
    assert again.read_text() == saved.read_text()


def test_a_record_is_judged_now_and_a_report_anew_where_that_is_asked_for(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    sick_report().record.to_json(record)
    status, out, _ = run(capsys, "show", record, "--fail-on", "CRITICAL")
    assert (status, out.partition("\n")[0]) == (
        1,
        "gradflow: VANISHING in fc1, which explains the other 2 issues",
    )
    assert "Outliers" not in out
    assert run(capsys, "show", saved, "--pipeline", "automatic")[1] == out
    assert "Outliers" in run(capsys, "show", saved)[1]


def test_standard_input_will_do(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["show", "-"], ["compare", saved, "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(saved.read_text()))
        status, out, _ = run(capsys, *command)
        assert (status, out[:10]) == (0, "gradflow: ")


@pytest.mark.parametrize("command", [["show"], ["compare", "{}"]])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "there is no file '{}': give a file that to_json() or --json wrote"),
        ("", "cannot read {}: from_json: expected JSON, but the text is not JSON"),
        ("[1]", "cannot read {}: from_json: expected an object for FlowRecord, got list"),
        ('{"record": 1}', "cannot read {}: from_json: expected a report, an object with the keys ok, record"),
        ('{"format": 1, "steps": 1}', "cannot read {}: from_json: FlowRecord: missing fields ['losses', "),
        (b"\xff\xfe", "cannot read {}: UnicodeDecodeError"),
    ],
)
def test_what_was_not_saved_by_gradflow_is_one_clear_line(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    text: object,
    told: str,
) -> None:
    path = tmp_path / "other.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else str(text).encode())
    status, out, err = run(capsys, *(part.format(saved) for part in command), path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"gradflow: error: {told.format(path)}")


def test_a_folder_and_one_that_is_not_there_are_told(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{str(tmp_path)!r} is a folder: give a file" in run(capsys, "show", tmp_path)[2]
    status, out, err = run(capsys, "show", saved, "--html", tmp_path / "none" / "flow.html")
    assert (status, out) == (2, "")
    assert "there is no folder" in err


def test_compare_is_a_gate_on_what_has_begun(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = tmp_path / "worse.json"
    report = sick_report()
    more = make_issue("fc5", IssueType.DEAD, IssueSeverity.HIGH)
    attrs.evolve(report, issues=(*report.issues, more)).to_json(worse)
    status, out, _ = run(capsys, "compare", saved, worse, "--fail-on", "HIGH")
    assert status == 1
    assert out.startswith("gradflow: 1 issue(s) begun, 0 ended, 3 lasting")
    assert run(capsys, "compare", saved, worse, "--fail-on", "CRITICAL", "--quiet") == (0, "", "")
    assert run(capsys, "compare", worse, saved, "--fail-on", "INFO", "--quiet")[0] == 0


def test_what_trials_did_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [[1.0], [0.5]]
    trial = TrialRecord(
        remedy="relu for sigmoid", words="...", code="...", layer="fc1", issue_type=IssueType.VANISHING,
        verdict=TrialVerdict.CURES, why="the loss is half", steps=2, losses_without=losses,
        losses_with=losses,
    )  # fmt: skip
    trials = TrialsRecord(trials=[trial], steps=2, seeds=1, optimizer="Adam", num_batches=2)
    path = tmp_path / "tried.json"
    sick_report().with_trials(trials).to_json(path)
    assert "Tried     [cures] relu for sigmoid: the loss is half" in run(capsys, "show", path)[1]
    told = run(capsys, "show", path, "--format", "markdown")[1]
    assert "- Tried: \\[cures\\] relu for sigmoid: the loss is half" in told


def test_a_saved_report_is_shown_without_torch(saved: Path) -> None:
    code = "import sys\nfrom gradflow.cli import main\nmain(sys.argv[1:])\nprint('torch' in sys.modules)"
    done = python("-c", code, "show", str(saved))
    assert done.stdout == sick_report().text() + "\nFalse\n"


def test_a_failed_look_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = chain_record(steps=0, depth=0)
    record = attrs.evolve(record, provenance=attrs.evolve(record.provenance, notes=("It raised.",)))
    record.to_json(tmp_path / "none.json")
    _, out, _ = run(capsys, "show", tmp_path / "none.json", "--format", "github")
    assert out.startswith("::error title=gradflow%3A nothing could be measured::Chain: 0 layer calls")


@pytest.mark.parametrize("columns", [60, 200])
def test_a_terminal_gets_lines_that_fit_it_and_colours(saved: Path, columns: int) -> None:
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    pytest.importorskip("rich")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "gradflow", "show", str(saved)]
    subprocess.run(command, stdout=theirs, env=environment, check=True)
    os.close(theirs)
    told = os.read(ours, 1 << 16).decode().replace("\r\n", "\n")
    os.close(ours)
    assert "\x1b[1;31m[CRITICAL]\x1b[0m" in told
    assert re.sub(r"\x1b\[[0-9;]*m", "", told) == sick_report().text(width=min(columns, 100)) + "\n"
