"""`gradflow diagnose`: run what a file builds, and tell which layer is at fault, and of what."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow.cli.building import Built, built
from gradflow.cli.faults import CommandError, explained
from gradflow.cli.output import check_writable, deliver
from gradflow.cli.program import own_output, program
from gradflow.cli.target import Target, split_target

if TYPE_CHECKING:  # importing it for real imports torch, which takes seconds
    from gradflow.report import Report

# Functions of `gradflow.pipelines`.
PIPELINES = ("automatic", "flow", "transformer", "recurrent", "policy", "precision")


def diagnose_command(options: Any) -> int:
    """Run the command and return its exit status."""
    if options.budget is not None and not options.tried:
        raise CommandError("--budget bounds what --try does: give --try as well")
    target = split_target(options.target)
    options.json, options.html = check_writable(options.json, options.html)
    with own_output(for_good=options.owns_process) as out:
        report, place = _report(target, options)
        file, line = place or (target.file, None)
        return deliver(report, options, out, file=file, line=line)


def _report(target: Target, options: Any) -> tuple[Report, tuple[Path, int] | None]:
    """Return the report, and where the function is that builds the model."""
    from gradflow import pipelines
    from gradflow.diagnosis import diagnose
    from gradflow.functional.processes.launched import launched
    from gradflow.report.progress import progress_bar

    pipeline = getattr(pipelines, options.pipeline)() if options.pipeline else None
    wanted = sys.stderr.isatty() if options.progress is None else options.progress
    with program(target, options.arguments) as module:
        given = built(module, target, options)
        bar = progress_bar(sys.stderr) if wanted and not options.quiet else contextlib.nullcontext()
        cannot = explained(f"the model of {target}() cannot be diagnosed")
        with cannot, bar as progress, launched(options, given.model) as processes:
            report = diagnose(
                given.model, given.batches, given.loss_fn, optimizer=given.optimizer, processes=processes,
                steps=options.steps, seed=options.seed, mode=options.mode, detail=options.detail,
                pipeline=pipeline, progress=progress, **_loop(given, options),
            )  # fmt: skip
            if options.tried:
                report = _with_trials(report, given, options.budget, pipeline, progress)
    return report, given.place


def _loop(given: Built, options: Any) -> dict[str, Any]:
    """Return what the training loop does: as it was built, and where the command says, as that says."""
    told = {name: value for name in ("clip", "accumulate") if (value := getattr(options, name)) is not None}
    return {**given.loop, **told}


def _with_trials(report: Report, given: Built, budget: float | None, pipeline: Any, progress: Any) -> Report:
    """Return the report with what fixes did."""
    from gradflow.remedies import try_remedies

    trials = try_remedies(
        report, given.model, given.batches, given.loss_fn, given.optimizer,
        budget=budget, pipeline=pipeline, progress=progress,
    )  # fmt: skip
    return report.with_trials(trials)
