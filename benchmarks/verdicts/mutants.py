"""Scores verdicts on mutants: small transformers in which one thing is broken, if it hurts their training.

    python benchmarks/verdicts/mutants.py check [--only PART]     which mutants are sick: trains them all
    python benchmarks/verdicts/mutants.py score [--only PART] [--pipeline flow] [--verbose]

A mutant is sick if in five of five seeds its loss after training, as `mutated.tasks.judged` takes it, is
above that of the unbroken model of the same seed, and above the largest of the unbroken ones by `MARGIN`.
`check` writes what it finds to `mutants.json`, so that scoring trains nothing.

  found         a sick mutant of whose expected (type, layer) pairs one is told at MEDIUM or above
  cause named   the first cause is one of the pairs
  false alarm   an unbroken model, at its start or trained, with any such verdict
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from mutated import tasks
from mutated.models import Transformer
from mutated.operators import OPERATORS, Operator
from score import under

KNOWN = Path(__file__).with_name("mutants.json")
SEEDS = range(5)
MARGIN = 0.03  # of loss, in nats: unbroken models of different seeds differ by a hundredth
SERIOUS = ("CRITICAL", "HIGH", "MEDIUM")


def built(kind: str, seed: int, operator: Operator | None = None) -> Transformer:
    """Return a model as it is before training."""
    torch.manual_seed(seed)
    model = Transformer(kind)
    if operator is not None:
        operator.apply(model)
    return model


def loss_after(kind: str, seed: int, operator: Operator | None = None) -> float:
    """Return the loss of a model after training."""
    model = built(kind, seed, operator)
    torch.manual_seed(100 + seed)
    return tasks.judged(tasks.trained(model, kind, seed), kind)


def mutants(only: str) -> Iterator[tuple[str, str, Operator]]:
    """Yield id, kind and operator of the mutants whose id holds a text."""
    for operator in OPERATORS:
        for kind in operator.kinds:
            if only in (id := f"{kind}-{operator.name}"):
                yield id, kind, operator


def check(only: str) -> None:
    """Train all that is not known yet, and write down which mutants are sick."""
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {"unbroken": {}, "mutants": {}}
    for kind in tasks.KINDS:
        if kind not in known["unbroken"]:
            known["unbroken"][kind] = [round(loss_after(kind, seed), 4) for seed in SEEDS]
            print(kind, known["unbroken"][kind], flush=True)
    for id, kind, operator in mutants(only):
        if id in known["mutants"]:
            continue
        right, losses = known["unbroken"][kind], []
        for seed in SEEDS:
            losses.append(round(loss_after(kind, seed, operator), 4))
            if losses[-1] <= max(right) + MARGIN:
                break  # not hurt: the other seeds do not matter
        sick = len(losses) == len(SEEDS) and not losses[-1] <= max(right) + MARGIN
        known["mutants"][id] = {"sick": sick, "losses": [v if v == v else None for v in losses]}
        print(f"{id:44} {'SICK' if sick else '':5} {losses}", flush=True)
        KNOWN.write_text(written(known))
    KNOWN.write_text(written(known))


def written(known: dict[str, dict[str, object]]) -> str:
    """Return what is known as JSON, a mutant to a line."""
    parts = [
        f'"{part}": {{\n' + ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in found.items()) + "\n}"
        for part, found in known.items()
    ]
    return "{" + ",\n".join(parts) + "}\n"


def verdicts(
    model: Transformer, kind: str, pipeline: str
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the serious (type, layer) pairs that gradflow tells of a model, and the causes."""
    import gradflow
    from gradflow import pipelines

    source = tasks.batches(kind, 1)
    torch.manual_seed(0)
    report = gradflow.diagnose(
        model, lambda: next(source), lambda scores, target: tasks.loss_of(kind, scores, target),
        optimizer=tasks.optimizer_of(model),
        pipeline=None if pipeline == "default" else getattr(pipelines, pipeline)(),
    )  # fmt: skip
    serious = [(i.issue_type.value, i.layer) for i in report.issues if i.severity.value in SERIOUS]
    return serious, [(c.issue_type.value, c.layer) for c in report.causes]


def hit(found: Iterable[tuple[str, str]], operator: Operator) -> bool:
    """Whether one of some pairs is expected."""
    return any(t == kind and under(layer, where) for t, layer in found for kind, where in operator.expect)


def score(only: str, pipeline: str, verbose: bool) -> None:
    """Score the sick mutants, and the unbroken models before and after training."""
    known = json.loads(KNOWN.read_text())["mutants"]
    chosen = [m for m in mutants(only) if known.get(m[0], {}).get("sick")]
    found = cause = 0
    start = time.perf_counter()
    for id, kind, operator in chosen:
        serious, causes = verdicts(built(kind, 0, operator), kind, pipeline)
        is_found, is_cause = hit(serious, operator), hit(causes[:1], operator)
        found, cause = found + is_found, cause + is_cause
        if verbose or not (is_found and is_cause):
            mark = "found" if is_cause else "other cause" if is_found else "MISSED"
            print(f"{id:44} {mark:12} {serious[:4]} | {causes[:1]}", flush=True)
    alarms = looks = 0
    for kind in tasks.KINDS if not only else ():
        for seed in SEEDS:
            model = built(kind, seed)
            for moment in ("start", "trained"):
                serious, _ = verdicts(model, kind, pipeline)
                looks, alarms = looks + 1, alarms + bool(serious)
                if serious:
                    print(f"alarm: {kind} seed {seed} {moment}: {serious}", flush=True)
                if moment == "start":
                    tasks.trained(model, kind, seed)
    print(
        f"{found} of {len(chosen)} sick mutants found, cause named {cause}; alarms at {alarms} of {looks} "
        f"looks at unbroken models; {time.perf_counter() - start:.0f} s"
    )


def main() -> None:
    """Check or score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("check", "score"))
    parser.add_argument("--only", default="", help="only mutants whose id holds this")
    parser.add_argument("--pipeline", default="default", help="a function of gradflow.pipelines")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.what == "check":
        check(args.only)
    else:
        score(args.only, args.pipeline, args.verbose)


if __name__ == "__main__":
    main()
