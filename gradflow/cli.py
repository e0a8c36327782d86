"""The `gradflow` command: diagnose a model that a Python file builds, and gate on the verdict; compare.

Exit status: 0 done, 1 an issue at or above `--fail-on`, 2 bad usage, or a file, name or model that cannot
be run, 130 interrupted. An error in the user's code is one line on standard error; `--traceback` shows all.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow import __version__
from gradflow.errors import GradflowError

if TYPE_CHECKING:  # importing these for real imports torch, which takes seconds; see `_report`
    from gradflow.report import Report

# Those of IssueSeverity; the records load numpy, which help and version need not wait for.
SEVERITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW", "INFO")
# Functions of `gradflow.pipelines`.
PIPELINES = ("automatic", "flow", "transformer", "recurrent", "policy", "precision")
_LOOP = ("clip", "accumulate", "scheduler", "scaler", "step_fn")
DEFAULT_NAME = "build"
OK, SICK, FAILED, INTERRUPTED = 0, 1, 2, 130
_TARGET = re.compile(r"(?P<file>.*\.py)(?::(?P<name>.*))?", re.DOTALL)
_RETURNS = (
    "(model, batches, loss_fn), or with an optimizer as fourth, or further options of diagnose as fifth"
)


class CommandError(Exception):
    """The command cannot go on; its text is the one line that the user sees."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows `?` rather than failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return options.run(options)
    except CommandError as error:
        if options.traceback and error.__cause__ is not None:
            traceback.print_exception(error.__cause__, file=sys.stderr)
        print(f"gradflow: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("gradflow: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradflow", description="Tells why a PyTorch model does not train.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gradflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    diagnose = commands.add_parser(
        "diagnose",
        allow_abbrev=False,
        help="run a model on some batches and tell which layer is at fault, and of what",
        description=f"NAME is a function of FILE.py without arguments that returns {_RETURNS}.",
        epilog="Exit status: 0 done, 1 an issue at or above --fail-on, 2 bad usage or a model that fails.",
    )
    add = diagnose.add_argument
    add("target", metavar="FILE.py[:NAME]", help=f"the file and the function in it (default: {DEFAULT_NAME})")
    add("--steps", type=_positive, default=20, metavar="N", help="batches to run at most (default: 20)")
    add(
        "--pipeline",
        choices=PIPELINES,
        help="what to measure and judge: what the model turns out to need (automatic, the default), the base "
        "alone (flow), or also, in full, what attention, recurrent layers or an actor-critic show",
    )
    add("--clip", type=float, metavar="NORM", help="clip gradients to this norm before each update")
    add("--accumulate", type=_positive, metavar="N", help="make an update after every N batches")
    add("--seed", type=int, metavar="N", help="make dropout and the like repeatable")
    add(
        "--try",
        dest="tried",
        action="store_true",
        help="try fixes for what is found, on copies, and tell what they did",
    )
    add(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="seconds after which no further fix is tried (default: no limit)",
    )
    add("--json", type=Path, metavar="PATH", help="write the report as JSON")
    add("--html", type=Path, metavar="PATH", help="write the report as one HTML file")
    add(
        "--fail-on",
        type=str.upper,
        choices=SEVERITIES,
        metavar="SEVERITY",
        help=f"exit with status 1 if an issue is as severe or more: {', '.join(SEVERITIES)}",
    )
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show a progress bar on standard error (default: on a terminal)",
    )
    add("--verbose", action="store_true", help="print all evidence and every issue, not what fits a screen")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--traceback", action="store_true", help="show the whole traceback of what went wrong")
    diagnose.set_defaults(run=_diagnose)
    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="tell what changed between two saved records or reports",
        description="Tells what changed from one saved record or report to another, largest first.",
    )
    compare.add_argument("before", metavar="BEFORE.json", type=Path)
    compare.add_argument("after", metavar="AFTER.json", type=Path)
    compare.set_defaults(run=_compare, traceback=False)
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _diagnose(options: argparse.Namespace) -> int:
    file, name = split_target(options.target)
    for path in (options.json, options.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    report = _report(file, name, options)
    if not options.quiet:
        print(report.text("full" if options.verbose else "short"))
    with _explained("cannot write the report"):
        if options.json is not None:
            report.to_json(options.json)
        if options.html is not None:
            report.to_html(options.html)
    if options.fail_on is None:
        return OK
    from gradflow.records import IssueSeverity

    limit = IssueSeverity(options.fail_on)
    return SICK if any(issue.severity >= limit for issue in report.issues) else OK


def _compare(options: argparse.Namespace) -> int:
    from gradflow.comparing import compare

    before, after = _saved(options.before), _saved(options.after)
    with _explained("cannot compare"):
        print(compare(before, after))
    return OK


def _saved(path: Path) -> Any:
    """Return the report or record that a file holds."""
    from gradflow.records import FlowRecord, read
    from gradflow.report import Report

    if not path.is_file():
        raise CommandError(f"there is no file {str(path)!r}")
    with _explained(f"cannot read {path}"):
        data = read(path)
        is_report = isinstance(data, dict) and "record" in data
        return Report.from_json(path) if is_report else FlowRecord.from_json(path)


def split_target(target: str) -> tuple[Path, str]:
    """Return the file and the name that `FILE.py[:NAME]` means; a drive's colon is part of the file.

    Raises:
        CommandError: if there is no such file, or it is not of this form.
    """
    match = _TARGET.fullmatch(target)
    name = (match["name"] if match and match["name"] is not None else DEFAULT_NAME) if match else ""
    if match is None or not name.isidentifier():
        raise CommandError(f"expected FILE.py or FILE.py:NAME, got {target!r}")
    file = Path(match["file"])
    if not file.is_file():
        raise CommandError(f"there is no file {str(file)!r}")
    return file, name


def _report(file: Path, name: str, options: argparse.Namespace) -> Report:
    """Build the model and diagnose it; the imports are here so that usage errors need not wait for torch."""
    from gradflow import pipelines
    from gradflow.diagnosis import diagnose
    from gradflow.functional.processes.launched import launched
    from gradflow.report.progress import progress_bar

    with _on_path(file.resolve().parent):
        with _explained(f"{file} cannot be imported"):
            module = _load(file)
        build = _builder(module, file, name)
        with _explained(f"{file}:{name}() raised"):
            built = build()
        if not isinstance(built, (tuple, list)) or len(built) not in (3, 4, 5):
            raise CommandError(f"{file}:{name}() must return {_RETURNS}, but returned {_described(built)}")
        how = _options(f"{file}:{name}()", built, options)
        wanted = sys.stderr.isatty() if options.progress is None else options.progress
        bar = progress_bar(sys.stderr) if wanted and not options.quiet else contextlib.nullcontext()
        cannot = _explained(f"the model of {file}:{name}() cannot be diagnosed")
        with cannot, bar as progress, launched(options, built[0]) as processes:
            report = diagnose(
                *built[:3],
                processes=processes,
                pipeline=getattr(pipelines, options.pipeline)() if options.pipeline else None,
                progress=progress,
                **how,
            )
            return (
                _with_trials(report, built, how.get("optimizer"), options, progress)
                if options.tried
                else report
            )


def _with_trials(report: Report, built: Any, optimizer: Any, options: Any, progress: Any) -> Report:
    """Return the report with what fixes did."""
    from gradflow import pipelines
    from gradflow.remedies import try_remedies

    pipeline = getattr(pipelines, options.pipeline)() if options.pipeline else None
    model, batches, loss_fn = built[:3]
    trials = try_remedies(
        report,
        model,
        batches,
        loss_fn,
        optimizer,
        budget=options.budget,
        pipeline=pipeline,
        progress=progress,
    )
    return report.with_trials(trials)


def _options(where: str, built: Sequence[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return how the model is to be trained: as it was built, and where the command says, as that says."""
    own = built[4] if len(built) == 5 else {}
    if not isinstance(own, dict) or set(own) - set(_LOOP):
        raise CommandError(
            f"{where}: the fifth value must be a dict of {', '.join(_LOOP)}, but is {own!r:.100}"
        )
    told = {name: value for name in ("clip", "accumulate") if (value := getattr(options, name)) is not None}
    optimizer = built[3] if len(built) > 3 else None
    return {"steps": options.steps, "seed": options.seed, "optimizer": optimizer, **own, **told}


def _load(file: Path) -> Any:
    """Import a file by its path, under a name that hides no other module."""
    name = f"_gradflow_target_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a path that ends in .py has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle and dataclasses look a class's module up here
    spec.loader.exec_module(module)
    return module


def _builder(module: Any, file: Path, name: str) -> Any:
    build = getattr(module, name, None)
    if callable(build):
        return build
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, functions, n=3, cutoff=0.0)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if build is not None:
        raise CommandError(f"{name!r} in {file} is a {type(build).__name__}, not a function{hint}")
    raise CommandError(f"there is no function {name!r} in {file}{hint}")


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Let the file import its neighbours, as it could if it were run as a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever is raised into a `CommandError` of one line that says what failed, why and where."""
    try:
        yield
    except (BrokenPipeError, CommandError):
        raise
    except GradflowError as error:
        raise CommandError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        raise CommandError(f"{what}: {type(error).__name__}: {error}{_place(error)}{notes}") from error


def _place(error: BaseException) -> str:
    """Return the innermost line of the user's own code that the exception came through, if there is one."""
    libraries = [str(Path(__file__).parent)]
    if "torch" in sys.modules:
        libraries.append(str(Path(str(sys.modules["torch"].__file__)).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", *libraries)):
            return f" (line {frame.lineno} of {frame.filename})"
    return ""
