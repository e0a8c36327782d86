"""`gradflow show` and `gradflow compare`: what was saved, records and whole reports."""

from __future__ import annotations

import sys
from typing import Any

from gradflow.cli.faults import CommandError, explained
from gradflow.cli.output import check_writable, deliver, gate


def show_command(options: Any) -> int:
    """Show a saved report; or a saved record, judged now."""
    options.json, options.html = check_writable(options.json, options.html)
    return deliver(_report(options.saved, options.pipeline), options, sys.stdout)


def compare_command(options: Any) -> int:
    """Tell what changed from one saved record or report to another."""
    before, after = saved(options.before), saved(options.after)
    with explained("cannot compare"):
        from gradflow.comparing import compare

        change = compare(before, after)
    if not options.quiet:
        sys.stdout.write(f"{change}\n")
    return gate(change.begun, options.fail_on)


def saved(path: str) -> Any:
    """Return the report or record that a file holds, or standard input, which `-` stands for.

    Raises:
        CommandError: if there is no such file, or it holds neither.
    """
    from pathlib import Path

    from gradflow.records import FlowRecord, read
    from gradflow.report import Report

    if path != "-" and (Path(path).is_dir() or not Path(path).exists()):
        told = f"{path!r} is a folder" if Path(path).is_dir() else f"there is no file {path!r}"
        raise CommandError(f"{told}: give a file that to_json() or --json wrote")
    with explained(f"cannot read {path}"):
        if path.endswith(".npz"):
            return FlowRecord.from_npz(path)
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        data = read(text)
        is_report = isinstance(data, dict) and "record" in data
        return Report.from_json(text) if is_report else FlowRecord.from_json(text)


def _report(path: str, pipeline: str | None) -> Any:
    """Return a saved report; a record, or what is to be judged anew, with the verdicts of a pipeline."""
    from gradflow.report import Report

    found = saved(path)
    if isinstance(found, Report) and pipeline is None:
        return found
    from gradflow import pipelines
    from gradflow.diagnosis import detectors_of, judged

    with explained(f"cannot judge {path}"):
        detectors = detectors_of(getattr(pipelines, pipeline)() if pipeline else None, "show")
        return judged(found.record if isinstance(found, Report) else found, detectors)
