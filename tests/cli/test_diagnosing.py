"""The command: what it prints, where it writes, and its exit status for everything that can go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradflow import __version__, diagnosis, pipelines
from gradflow.cli.diagnosing import PIPELINES
from gradflow.cli.faults import CommandError
from gradflow.cli.output import SEVERITIES
from gradflow.cli.target import FORMS, Target, split_target
from gradflow.records import IssueSeverity, issue_type
from gradflow.report import Report
from tests.cli.running import python, run, write
from tests.samples import make_issue


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path)


def test_prints_the_report(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "diagnose", file)
    assert (status, err) == (0, "")
    assert out.startswith("gradflow: no illness found\n  Sequential: 3 layer calls, 420 parameters; loss ")
    assert len(out.splitlines()) < 10
    lines = run(capsys, "diagnose", file, "--verbose")[1].splitlines()
    assert lines[0] == "gradflow: no illness found"
    assert "  model    Sequential: 3 layer calls, 420 parameters" in lines
    assert "[OK] No gradient issues found." in lines
    assert lines[2].startswith(
        "  steps    8 steps (of 20 asked for: the batches ended), parameters held fixed"
    )


def test_an_optimizer_may_come_fourth(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "diagnose", f"{file}:trained", "--steps", 3, "--seed", 7, "--verbose")
    assert status == 0
    assert "  steps    3 steps, a copy of the parameters stepped by a copy of SGD (lr 0.25)\n" in out
    assert ", seed 7\n" in out


@pytest.mark.parametrize(
    ("name", "limit", "status"),
    [
        ("build", "info", 0),
        ("dead", "CRITICAL", 1),
        ("dead", "critical", 1),
        ("dead", "INFO", 1),
        ("dead", None, 0),
    ],
)
def test_fail_on_is_a_gate(
    file: Path, capsys: pytest.CaptureFixture[str], name: str, limit: str | None, status: int
) -> None:
    gate = [] if limit is None else ["--fail-on", limit]
    assert run(capsys, "diagnose", f"{file}:{name}", *gate)[0] == status


def test_a_pipeline_sees_what_the_default_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parent.parent.parent / "examples" / "forgetful_lstm.py"
    assert run(capsys, "diagnose", example, "--quiet", "--fail-on", "MEDIUM")[0] == 0
    status, out, _ = run(capsys, "diagnose", example, "--pipeline", "recurrent", "--fail-on", "MEDIUM")
    assert status == 1
    assert "is told at steps that teach it nothing" in " ".join(out.split())


def test_every_pipeline_runs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(PIPELINES) == set(pipelines.__all__) - {"Pipeline"}
    for name in PIPELINES:
        assert run(capsys, "diagnose", file, "--pipeline", name, "--fail-on", "INFO")[0] == 0, name
    status, _, err = run(capsys, "diagnose", file, "--pipeline", "transformers")
    assert status == 2
    assert "invalid choice: 'transformers' (choose from" in err


def test_fail_on_lets_through_what_is_less_severe(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mild = make_issue("0", severity=IssueSeverity.MEDIUM)
    monkeypatch.setattr(diagnosis, "automatic", lambda: lambda record: [mild])
    assert run(capsys, "diagnose", file, "--fail-on", "HIGH")[0] == 0
    assert run(capsys, "diagnose", file, "--fail-on", "MEDIUM")[0] == 1


def test_types_of_one_s_own_are_shown_saved_and_gated(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_issue("0", issue_type("OUTLIERS"), IssueSeverity.HIGH)
    monkeypatch.setattr(diagnosis, "automatic", lambda: lambda record: [own])
    data = tmp_path / "flow.json"
    status, out, _ = run(capsys, "diagnose", file, "--fail-on", "HIGH", "--json", data)
    assert status == 1
    assert out.startswith("gradflow: OUTLIERS in 0\n")
    assert Report.from_json(data).issues[0].issue_type == issue_type("OUTLIERS")
    assert run(capsys, "diagnose", file, "--fail-on", "CRITICAL")[0] == 0


def test_what_the_loop_does_is_told_by_the_file_or_the_command(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, "diagnose", "--verbose", f"{file}:scheduled")
    assert "an update after 2 batches" in out
    assert "rates as the scheduler sets them" in out
    _, out, _ = run(capsys, "diagnose", "--verbose", f"{file}:scheduled", "--accumulate", 3, "--clip", 0.5)
    assert "an update after 3 batches" in out
    assert "gradients clipped to norm 0.5" in out


def test_writes_json_and_html(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, page = tmp_path / "flow.json", tmp_path / "flow.html"
    status, out, err = run(capsys, "diagnose", f"{file}:dead", "--json", data, "--html", page, "--quiet")
    assert (status, out, err) == (0, "", "")
    assert json.loads(data.read_text())["issues"][0]["issue_type"] == "DEAD"
    assert "<h1>DEAD in " in page.read_text(encoding="utf-8")


def test_progress_is_shown_when_asked_for(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "diagnose", file, "--steps", 2, "--progress")
    assert err.endswith("2/2\n")
    assert run(capsys, "diagnose", file, "--steps", 2, "--no-progress")[2] == ""
    assert run(capsys, "diagnose", file, "--steps", 2, "--progress", "--quiet")[2] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["diagnose"], "the following arguments are required: FILE.py[:NAME]"),
        (["measure"], "invalid choice: 'measure'"),
        (["diagnose", "net.py", "--steps", "0"], "expected a whole number of at least 1, got '0'"),
        (["diagnose", "net.py", "--steps", "few"], "expected a whole number of at least 1, got 'few'"),
        (["diagnose", "net.py", "--fail-on", "BAD"], "invalid choice: 'BAD'"),
        (["diagnose", "net.py", "--step", "3"], "unrecognized arguments: --step 3"),
    ],
)
def test_bad_usage_is_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("usage: gradflow")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":biuld", "there is no function 'biuld' in {file}; did you mean build"),
        (":threshold", "'threshold' in {file} is a int, not a function; did you mean "),
        (":two", "{file}:two() must return (model, batches, loss_fn), or with an optimizer as fourth, or "
                 "further options of diagnose as fifth, but returned 2 values (Linear, list)"),
        (":strange", "{file}:strange(): the fifth value must be a dict of clip, accumulate, scheduler, "
                     "scaler, step_fn, but is {{'clipp': 1}}"),
        (":nothing", "but returned NoneType"),
        (":raises", "{file}:raises() raised: OverflowError: too much (line 32 of {file})"),
        (":leaves", "{file}:leaves() raised: SystemExit: bye"),
        (":broken", "the model of {file}:broken() cannot be diagnosed: RuntimeError: mat1 and mat2 shapes "
                    "cannot be multiplied (2x8 and 3x4); gradflow: raised at step 0"),
        (":bad_loss", "ZeroDivisionError: division by zero (line 39 of {file})"),
        (":", "expected " + FORMS + ", got '{file}:'"),
        (":a-b", "expected " + FORMS + ", got '{file}:a-b'"),
        ("x", "expected " + FORMS + ", got '{file}x'"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_one_clear_line(
    file: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    status, out, err = run(capsys, "diagnose", f"{file}{name}")
    assert (status, out) == (2, "")
    assert err.startswith("gradflow: error: ")
    assert err.count("\n") == 1
    assert message.format(file=file) in err


def test_missing_and_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "diagnose", "no/such.py")
    assert (status, err) == (2, "gradflow: error: there is no file 'no/such.py'\n")
    bad = tmp_path / "bad.py"
    for text, message in (
        ("def build(:", "SyntaxError"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library' (line 1 of "),
        ("raise SystemExit(0)", "cannot be imported: SystemExit: 0"),
    ):
        bad.write_text(text)
        status, _, err = run(capsys, "diagnose", bad)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err


def test_a_folder_that_is_not_there_is_told_before_the_run(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "diagnose", f"{file}:raises", "--html", tmp_path / "none" / "flow.html")
    assert (status, out) == (2, "")
    assert "there is no folder" in err
    assert "OverflowError" not in err


def test_a_file_that_cannot_be_written_is_status_2_and_the_report_is_printed_all_the_same(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = run(capsys, "diagnose", file, "--json", tmp_path, "--quiet")
    assert status == 2
    assert f"cannot write {tmp_path}: it is a folder" in err

    def full(self: Report, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Report, "to_html", full)
    status, out, err = run(capsys, "diagnose", file, "--html", tmp_path / "flow.html", "--steps", 2)
    assert (status, out[:28]) == (2, "gradflow: no illness found\n ")
    assert err.startswith("gradflow: error: cannot write the report: OSError: [Errno 28] No space left on d")


def test_traceback_shows_the_whole_of_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "diagnose", f"{file}:raises", "--traceback")
    assert status == 2
    assert 'raise OverflowError("too\\nmuch")' in err
    assert err.startswith("Traceback (most recent call last):")
    assert err.splitlines()[-1].startswith("gradflow: error: ")
    assert "Traceback" not in run(capsys, "diagnose", f"{file}:raises")[2]


def test_the_file_may_import_its_neighbours_and_leaves_no_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path).rename(tmp_path / "neighbour_of_net.py")
    (tmp_path / "other.py").write_text("from neighbour_of_net import build\n")
    before = list(sys.path)
    assert run(capsys, "diagnose", tmp_path / "other.py")[0] == 0
    assert sys.path == before


@pytest.mark.parametrize(
    ("target", "file", "name"),
    [
        ("net.py", "net.py", "build"),
        ("net.py:sick", "net.py", "sick"),
        ("C:\\models\\net.py", "C:\\models\\net.py", "build"),
        ("C:\\models\\net.py:sick", "C:\\models\\net.py", "sick"),
        ("a.py:b/net.py:sick", "a.py:b/net.py", "sick"),
    ],
)
def test_targets(target: str, file: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    assert split_target(target) == Target(name, file=Path(file))


@pytest.mark.parametrize(
    ("target", "module", "name"), [("net", "net", "build"), ("a.b.c:sick", "a.b.c", "sick")]
)
def test_targets_that_are_modules(target: str, module: str, name: str) -> None:
    assert split_target(target) == Target(name, module=module)


@pytest.mark.parametrize("target", ["", ":", "a/b", "a b", "a..b", "net:", "net:a-b", "é-x"])
def test_what_is_no_target_is_refused(target: str) -> None:
    with pytest.raises(CommandError, match=r"expected FILE\.py, NOTEBOOK\.ipynb or package\.module, with"):
        split_target(target)


def test_interruption_has_its_own_status(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradflow.cli.diagnosing._report", interrupt)
    assert run(capsys, "diagnose", file) == (130, "", "gradflow: interrupted\n")


def test_the_severities_are_those_of_the_records() -> None:
    assert tuple(severity.value for severity in IssueSeverity) == SEVERITIES


def test_version_and_help_do_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom gradflow.cli import main\n"
        "try:\n    main([sys.argv[1]])\nfinally:\n    print('torch' in sys.modules)"
    )
    assert python("-c", code, "--version").stdout == f"gradflow {__version__}\nFalse\n"
    done = python("-c", code, "--help")
    assert done.stdout.startswith("usage: gradflow ")
    assert done.stdout.endswith("\nFalse\n")


def test_the_module_runs_as_the_command_and_bears_a_closed_pipe(file: Path) -> None:
    command = [sys.executable, "-m", "gradflow", "diagnose", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
    assert python("-m", "gradflow", "--version").stdout == f"gradflow {__version__}\n"


def test_annotations_stand_at_the_function_that_builds_the_model(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(file.parent.parent))
    place = f"file={file.parent.name}/net.py,line=16,"
    other = file.parent / "other.py"
    other.write_text("from net import dead\nfrom functools import partial\nbuild = partial(dead)\n")
    for target in (f"{file}:dead", f"{other}:dead"):
        status, out, _ = run(
            capsys, "diagnose", target, "--format", "github", "--fail-on", "HIGH", "--steps", 2
        )
        assert status == 1
        assert out.splitlines()[0].startswith(
            f"::error {place}title=gradflow%3A [CRITICAL] DEAD in 0 (Linear)::"
        )
    monkeypatch.setenv("GITHUB_WORKSPACE", "/nowhere")
    _, out, _ = run(capsys, "diagnose", other, "--format", "github", "--steps", 2)
    assert out.startswith(f"::error file={other},title=")
