"""How often a fix that was tried helps, and how often trials see through a false verdict.

    python benchmarks/remedies.py run ROWS.jsonl [--only PART] [--cases FOLDER ...] [--healthy] [--seconds N]
    python benchmarks/remedies.py cost ROWS.jsonl
    python benchmarks/remedies.py print ROWS.jsonl
    python benchmarks/remedies.py write ROWS.jsonl [FILE] [--cases FOLDER ...]

`run` adds a line to ROWS.jsonl for every model that has none there yet, so it can be stopped and gone on
with; first come those that can be mended from outside of the code. The models are those of the zoo
(`benchmarks/verdicts/zoo`) and of the folders given, each with a `cases.py` of labelled models.

  sick      the report of 20 steps, trials of its first two causes, and the loss of the repaired twin after as
            many steps
  healthy   with `--healthy`: models without an illness, a verdict forced on them by extreme thresholds, and
            the trials of its first cause

`cost` adds a line for each of three networks: the processor time of trials of four remedies, over that of as
many plain steps of training. `write` makes the page docs/remedies_measured.md; parts without a row stay as
they were, and sick models without one are named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import workloads

sys.path.insert(0, str(Path(__file__).resolve().parent / "verdicts"))
from remedies_mended import CANNOT, page
from zoo import CASES

import gradflow as gf
from gradflow.records import IssueSeverity, final_losses
from gradflow.remedies import first_action, rate_times, try_remedies

ROOT = Path(__file__).resolve().parents[1]
STEPS, SEEDS, MOST_CAUSES = 50, 3, 2
MOST_STEPS = 2000  # of training, for the trials of a model: what it finds hangs on no clock
# Thresholds at which healthy models are called sick.
EXTREME = {
    "vanishing": lambda: gf.vanishing(1.0, share=0.9, local_share=0.95),
    "exploding": lambda: gf.exploding(1.01, loud=1.0),
    "dead": lambda: gf.dead(0.05, some=0.02, few=0.01),
    "saturation": lambda: gf.saturation(0.01, severe_share=0.02, stuck_share=0.01),
    "unstable": lambda: gf.unstable(0.05, jump=1.2, restless=0.05, restless_jump=1.1),
}


@attrs.frozen
class Model:
    """A labelled model: how it is built, sick or repaired."""

    id: str
    group: str
    healthy: bool
    build: Any
    twin: Any


def models(folders: Sequence[Path]) -> Iterator[Model]:
    """Yield the models of the zoo, then those of other folders."""
    for case in CASES.values():
        twin = None if case.healthy else lambda case=case: case.build(sick=False)
        yield Model(case.id, "zoo", case.healthy, case.build, twin)
    for number, folder in enumerate(folders, start=1):
        spec = importlib.util.spec_from_file_location(f"labelled_{number}", folder / "cases.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for case in module.CASES.values():
            twin = (lambda case=case: case.build(fixed=True)) if case.has_fix else None
            yield Model(case.id, f"labelled {number}", case.healthy, case.build, twin)


def trained_to(built: Any) -> float:
    """Return what the loss of a build comes to after as many steps as a trial has; NaN if it breaks."""
    record = gf.analyze(
        built.model, built.make_batch, built.loss_fn, steps=STEPS, optimizer=built.optimizer(), seed=0
    )
    return float(final_losses(np.array(record.losses)[:, None])[0])


def told(trial: gf.TrialRecord) -> dict[str, Any]:
    """Return a trial in a few plain numbers."""
    return {
        "layer": trial.layer, "type": trial.issue_type.value, "remedy": trial.remedy,
        "verdict": trial.verdict.value, "gain": trial.gain, "gone": trial.gone, "why": trial.why,
        "without": trial.loss_without, "with": trial.loss_with, "seeds": trial.seeds,
        "start": float(trial.losses_without[0, 0]) if trial.steps else math.nan,
    }  # fmt: skip


def sick_row(model: Model) -> dict[str, Any]:
    """Return what trials did for a sick model."""
    row: dict[str, Any] = {"id": model.id, "group": model.group, "kind": "sick"}
    built = model.build()
    optimizer = built.optimizer()
    report = gf.diagnose(built.model, built.make_batch, built.loss_fn, optimizer=optimizer)
    causes = [c for c in report.causes if c.issues[0].severity >= IssueSeverity.MEDIUM][:MOST_CAUSES]
    report = attrs.evolve(report, causes=causes)
    row["causes"] = [[cause.issue_type.value, cause.layer] for cause in causes]
    if not causes:
        return row
    row["action"] = (causes[0].issues[0].recommended_actions or ("",))[0]
    row["first"] = [remedy.name for remedy in first_action(causes[0], report.record)]
    trials = try_remedies(
        report, built.model, built.make_batch, built.loss_fn, optimizer, steps=STEPS, seeds=SEEDS,
        max_steps=MOST_STEPS,
    )  # fmt: skip
    row["trials"] = [told(trial) for trial in trials.trials]
    if model.twin is not None:
        row["twin"] = trained_to(model.twin())
    return row


def healthy_rows(model: Model) -> Iterator[dict[str, Any]]:
    """Yield what trials say of verdicts that are forced on a healthy model, one for each kind of verdict."""
    for kind, detector in EXTREME.items():
        row: dict[str, Any] = {"id": f"{model.id}/{kind}", "group": model.group, "kind": "healthy"}
        built = model.build()
        optimizer = built.optimizer()
        pipeline = [detector()]
        report = gf.diagnose(
            built.model, built.make_batch, built.loss_fn, optimizer=optimizer, pipeline=pipeline
        )
        causes = [c for c in report.causes if c.issues[0].severity >= IssueSeverity.MEDIUM][:1]
        if causes:
            report = attrs.evolve(report, causes=causes)
            row["causes"] = [[causes[0].issue_type.value, causes[0].layer]]
            trials = try_remedies(
                report, built.model, built.make_batch, built.loss_fn, optimizer, steps=STEPS, seeds=SEEDS,
                pipeline=pipeline,
            )  # fmt: skip
            row["trials"] = [told(trial) for trial in trials.trials]
            yield row


def run(args: argparse.Namespace) -> None:
    """Add a row for every model that has none yet."""
    done = {row["id"] for row in rows_of(args.rows)} if args.rows.exists() else set()
    begun = time.perf_counter()
    for model in sorted(models(args.cases), key=lambda model: model.id in CANNOT):  # stable: those last
        if args.only not in model.id or model.healthy is not args.healthy:
            continue
        if args.seconds and time.perf_counter() - begun > args.seconds:
            break
        if model.id in done or (args.healthy and any(key.startswith(f"{model.id}/") for key in done)):
            continue
        start = time.perf_counter()
        try:
            found = list(healthy_rows(model)) if args.healthy else [sick_row(model)]
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found = [{"id": model.id, "group": model.group, "kind": "failed", "error": what}]
        with args.rows.open("a") as file:
            for row in found:
                row["seconds"] = round(time.perf_counter() - start, 1)
                file.write(json.dumps(row) + "\n")
        for row in found:
            print(line_of(row), flush=True)


def plain_step(work: workloads.Workload, optimizer: torch.optim.Optimizer, number: int) -> float:
    """Return the processor time of a plain step of training, in seconds, over a number of them."""
    begun = time.process_time()
    for _ in range(number):
        optimizer.zero_grad()
        work.loss().backward()
        optimizer.step()
    return (time.process_time() - begun) / number


def costs(args: argparse.Namespace) -> None:
    """Add a row for each network with what trials cost."""
    for name in ("mlp", "lstm", "encoder"):
        work = workloads.build(name)
        optimizer = torch.optim.Adam(work.model.parameters(), 1e-3)

        record = gf.analyze(work.model, [work.batch], work.loss_fn, steps=1)
        layer = record.layers[0]
        issue = gf.Issue(
            layer=layer.name, layer_type=layer.type, issue_type=gf.IssueType.VANISHING, description="",
            severity=IssueSeverity.HIGH, magnitude=1.0,
        )  # fmt: skip
        cause = gf.Cause(
            layer=layer.name, issue_type=issue.issue_type, mechanism="", issues=[issue], confidence=0.5
        )
        report = gf.Report(record=record, issues=[issue], causes=[cause])
        remedies = [rate_times(factor) for factor in (10.0, 0.1, 0.01, 1e-3)]
        plain_step(work, optimizer, 3)
        before = plain_step(work, optimizer, 20)
        begun = time.process_time()
        trials = try_remedies(
            report, work.model, [work.batch], work.loss_fn, optimizer, steps=STEPS, seeds=SEEDS,
            remedies=remedies,
        )  # fmt: skip
        spent = time.process_time() - begun
        step = (before + plain_step(work, optimizer, 20)) / 2
        number = STEPS * (sum(t.seeds for t in trials.trials) + max(t.seeds for t in trials.trials))
        row = {
            "kind": "cost", "id": name, "what": workloads.DESCRIPTIONS[name], "steps": number,
            "plain": 1000 * step, "ratio": spent / (number * step),
        }  # fmt: skip
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def line_of(row: dict[str, Any]) -> str:
    """Return a row in one line."""
    best = ", ".join(
        f"{t['verdict']}: {t['remedy'][:50]} (gain {t['gain']:.2f})" for t in row.get("trials", ())
    )
    causes = " ".join(":".join(cause) for cause in row.get("causes", ())) or row.get("error", "no cause")
    return f"{row['kind']:8} {row['id']} | {causes} | {best or 'none'} | {row['seconds']} s"


def main() -> int:
    """Run, print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "cost", "print", "write"))
    parser.add_argument("rows", type=Path)
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "docs" / "remedies_measured.md")
    parser.add_argument("--only", default="")
    parser.add_argument("--cases", type=Path, nargs="*", default=[])
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    if args.what == "run":
        run(args)
        return 0
    if args.what == "cost":
        costs(args)
        return 0
    rows = rows_of(args.rows)
    order = {model.id: place for place, model in enumerate(models(args.cases)) if not model.healthy}
    rows.sort(key=lambda row: order.get(row["id"], len(order)))
    missing = sorted(order.keys() - {row["id"] for row in rows}, key=order.__getitem__)
    before = args.file.read_text(encoding="utf-8") if args.file.exists() else ""
    text = page(rows, before, missing)
    if args.what == "write":
        args.file.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
