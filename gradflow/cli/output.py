"""Where a report goes: files, standard output in the format asked for, and the exit status."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from gradflow.cli.faults import OK, SICK, CommandError, explained

if TYPE_CHECKING:  # numpy need not be loaded for help
    from gradflow.records import Issue
    from gradflow.report import Report

FORMATS = ("text", "json", "markdown", "github")
# Those of IssueSeverity; the records load numpy, which help and version need not wait for.
SEVERITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW", "INFO")


def check_writable(*paths: Path | None) -> list[Path | None]:
    """Return paths as absolute ones, since what runs may change the present folder.

    Raises:
        CommandError: if a file cannot be written there, which is told before the run rather than after it.
    """
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise CommandError(f"cannot write {path}: it is a folder")
    return [None if path is None else path.absolute() for path in paths]


def deliver(
    report: Report, options: Any, out: TextIO, *, file: Path | None = None, line: int | None = None
) -> int:
    """Write a report where the command's options say, and return the exit status.

    Args:
        report: the report.
        options: of the command: `json`, `html`, `format`, `verbose`, `quiet`, `fail_on`.
        out: what is printed goes there.
        file: that the model was built by, and the line, for annotations.
    """
    failure: CommandError | None = None
    try:  # the files first, as whoever reads what is printed may have seen enough
        with explained("cannot write the report"):
            if options.json is not None:
                report.to_json(options.json)
            if options.html is not None:
                report.to_html(options.html)
    except CommandError as error:
        failure = error
    if not options.quiet:
        show(report, options, out, file=file, line=line)
    if failure is not None:
        raise failure
    return gate(report.issues, options.fail_on)


def show(report: Report, options: Any, out: TextIO, *, file: Path | None, line: int | None) -> None:
    """Print a report in the format asked for."""
    from gradflow.report import write_text

    if options.format == "text":
        write_text(report.text("full") if options.verbose else report.text(width=_width(out)), out)
    elif options.format == "json":
        out.write(report.to_json() + "\n")
    elif options.format == "markdown":
        out.write(report.markdown())
    else:
        out.write(report.annotations(_in_repository(file), line=line) + "\n")
    out.flush()


def gate(issues: tuple[Issue, ...], fail_on: str | None) -> int:
    """Return the exit status of some issues."""
    if fail_on is None:
        return OK
    from gradflow.records import IssueSeverity

    limit = IssueSeverity(fail_on)
    return SICK if any(issue.severity >= limit for issue in issues) else OK


def _width(out: TextIO) -> int:
    """Return how many letters a line of the short text has: as many as fit, on a terminal that is narrow."""
    from gradflow.report.text.short import WIDTH

    if not out.isatty():
        return WIDTH
    told = os.environ.get("COLUMNS", "")
    try:
        columns = int(told) if told.isdigit() and int(told) else os.get_terminal_size(out.fileno()).columns
    except OSError:
        return WIDTH
    return min(WIDTH, columns or WIDTH)


def _in_repository(file: Path | None) -> str:
    """Return a file's path from the root of the repository that GitHub checked out, or from here."""
    if file is None:
        return ""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or os.getcwd()).resolve()
    path = file.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(file)
