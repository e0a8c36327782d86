"""Scores gradflow's verdicts on whole trainings: looks at each at several moments, from new to long after.

    python benchmarks/verdicts/moments.py [--only PART] [--steps 20] [--jobs 1] [--cache DIR] [--json FILE]

A healthy training is looked at when it is new, after 5 % and 30 % of its steps, at its end, and after as many
steps again; every time with its own optimizer, in the state it is in, and without one. Each look gets a copy
of its own. Any issue of severity MEDIUM and above is an alarm there, and so is a crash. A training that goes
bad late is looked at at its end, where one of the expected (type, layer) pairs is to be found, and early,
where nothing is.

  alarm         a look with any issue of severity MEDIUM and above
  found         a look at the end of one that went bad, with an expected pair among those issues
  layer right   such a look with any of those issues, of whatever type, at a layer that is expected
  cause right   such a look whose first cause is an expected pair
  early clean   an early look at one that goes bad, without such issues

Whether a training has learned by its end, and whether the illness is there, is told by its own figure, taken
with plain PyTorch: a healthy one is not within its bounds when it is new, and is at its end and long after.
One whose figure is not as registered is named, and left out of the shares. `--cache`
keeps the trainings as they are at the moments, so that looking again does not train again; what is kept is
known by the sources that it comes from.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from score import under
from tools import SERIOUS
from torch.nn.utils import parametrize
from trainings import CASES, Case, Training
from zoo import TYPES

MOMENTS = {"new": 0.0, "5%": 0.05, "30%": 0.3, "converged": 1.0, "long after": 2.0}
EARLY, LATE = "early", "late"
HERE = Path(__file__).parent / "trainings"


@dataclass(frozen=True)
class Verdict:
    """One issue: its severity, type and layer."""

    severity: str
    type: str
    layer: str

    def __str__(self) -> str:
        return f"{self.severity} {self.type} {self.layer or '(model)'}"

    def is_one_of(self, pairs: Iterable[tuple[str, str]]) -> bool:
        """Whether its type and layer are one of the pairs."""
        return any(self.type == kind and under(self.layer, prefix) for kind, prefix in pairs)


@dataclass(frozen=True)
class Look:
    """What was said of one training at one moment, with its optimizer or without."""

    id: str
    moment: str
    optimizer: bool
    valid: bool  # the training's figure is as registered
    verdicts: tuple[Verdict, ...]
    cause: Verdict | None
    error: str
    seconds: float

    @property
    def case(self) -> Case:
        """The training that was looked at."""
        return CASES[self.id]

    @property
    def alarm(self) -> bool:
        """Whether anything serious was said, or nothing could be said."""
        return bool(self.verdicts or self.error)

    @property
    def clean(self) -> bool:
        """Whether it is no alarm."""
        return not self.alarm

    @property
    def found(self) -> bool:
        """Whether an expected pair is among the verdicts."""
        return any(verdict.is_one_of(self.case.expect) for verdict in self.verdicts)

    @property
    def layer_right(self) -> bool:
        """Whether a layer that is expected is named, for whatever."""
        return any(under(v.layer, prefix) for v in self.verdicts for _, prefix in self.case.expect)

    @property
    def cause_right(self) -> bool:
        """Whether what is named first is an expected pair."""
        return self.cause is not None and self.cause.is_one_of(self.case.expect)


# --------------------------------------------------------------------------------- the trainings' moments


def moments_of(case: Case) -> dict[str, float]:
    """Return the moments to look at, as shares of the training's steps."""
    return MOMENTS if case.healthy else {EARLY: case.early, LATE: 1.0}


def kept_under(case: Case) -> str:
    """Return what the training's moments are kept under: its id and its sources."""
    files = ("registry.py", "data.py", f"{case.module.split('.')[-1]}.py")
    told = "".join((HERE / file).read_text(encoding="utf-8") for file in files) + torch.__version__
    return f"{case.id}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def pickled(training: Training) -> bytes:
    """Return the training, pickled as a whole, with parametrized modules, which refuse that unless their
    class forgets to."""
    for module in training.model.modules():
        if parametrize.is_parametrized(module) and "__getstate__" in vars(type(module)):
            del type(module).__getstate__
    return cloudpickle.dumps(training)


def snapshots(case: Case) -> tuple[dict[str, bytes], dict[str, float]]:
    """Return the training at every moment, and its figures there. Trains it."""
    training, kept, figures = case.build(), {}, {}
    for moment, share in moments_of(case).items():
        training.carry_on(round(share * case.steps))
        figures[moment] = training.measured()
        kept[moment] = pickled(training)
    return kept, figures


def kept_snapshots(case: Case, cache: Path | None) -> tuple[dict[str, bytes], dict[str, float]]:
    """Return what `snapshots` does, from the cache where it is there."""
    if cache is None:
        return snapshots(case)
    path = cache / f"{kept_under(case)}.pt"
    if not path.exists():
        kept = snapshots(case)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(kept, path)
    return torch.load(path, weights_only=True)


def is_as_registered(case: Case, figures: dict[str, float]) -> bool:
    """Whether the training learned and stayed so, or is well early and ill late."""
    if case.healthy:
        learned = case.within(figures["converged"]) and case.within(figures["long after"])
        return learned and not case.within(figures["new"])
    return case.within(figures[LATE]) and not case.within(figures[EARLY])


# --------------------------------------------------------------------------------------------- the looks


def told(training: Training, steps: int, optimizer: bool) -> tuple[tuple[Verdict, ...], Verdict | None]:
    """Return gradflow's issues of severity MEDIUM and above, and its first cause."""
    import gradflow

    report = gradflow.diagnose(
        training.model,
        training.make_batch,
        training.loss_fn,
        steps=steps,
        optimizer=training.optimizer if optimizer else None,
        clip=training.clip if optimizer else None,
    )
    verdicts = tuple(
        Verdict(i.severity.value, i.issue_type.value, i.layer)
        for i in report.issues
        if i.severity.value in SERIOUS
    )
    cause = next((Verdict("", c.issue_type.value, c.layer) for c in report.causes), None)
    return verdicts, cause


def looks_of(id: str, steps: int, cache: Path | None) -> tuple[list[Look], dict[str, float]]:
    """Return all looks at one training, and its figures; a process of its own can run this."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    case, looks = CASES[id], []
    kept, figures = kept_snapshots(case, cache)
    valid = is_as_registered(case, figures)
    for moment, data in kept.items():
        for optimizer in (True, False):
            training = cloudpickle.loads(data)
            torch.manual_seed(case.seed)
            start, verdicts, cause, error = time.perf_counter(), (), None, ""
            try:
                verdicts, cause = told(training, steps, optimizer)
            except Exception as problem:  # a crash is an alarm or a miss, and is shown
                error = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
            seconds = time.perf_counter() - start
            looks.append(Look(id, moment, optimizer, valid, verdicts, cause, error, seconds))
    return looks, figures


def lines_of(look: Look) -> list[str]:
    """Return a line for each alarm, and for each look at the end of one that went bad."""
    where = f"{look.id} · {look.moment} · {'with' if look.optimizer else 'without'} optimizer"
    if look.moment == LATE:
        mark = "found" if look.found else "MISS "
        want = ", ".join(f"{kind}:{prefix}" for kind, prefix in look.case.expect)
        got = look.error or "; ".join(map(str, look.verdicts[:6])) or "nothing"
        return [f"{mark} {where} · want {want} · got {got}"]
    issues = [look.error] if look.error else [str(verdict) for verdict in look.verdicts]
    return [f"{'CRASH' if look.error else 'ALARM'} {where} · {issue}" for issue in issues]


def all_looks(args: argparse.Namespace) -> list[Look]:
    """Return the looks at the chosen trainings, and print what is worth a line as it comes."""
    chosen = [id for id in CASES if args.only in id]
    looks: list[Look] = []

    def keep(id: str, new: Sequence[Look], figures: dict[str, float]) -> None:
        looks.extend(new)
        if not new[0].valid:
            shown = ", ".join(f"{moment} {figure:.3g}" for moment, figure in figures.items())
            print(f"NOT AS REGISTERED {id}: {shown}", flush=True)
        for look in new:
            for line in lines_of(look):
                print(line, flush=True)

    if args.jobs <= 1:
        for id in chosen:
            keep(id, *looks_of(id, args.steps, args.cache))
        return looks
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        several = [[x] * len(chosen) for x in (args.steps, args.cache)]
        for id, found in zip(chosen, pool.map(looks_of, chosen, *several), strict=True):
            keep(id, *found)
    return looks


# ------------------------------------------------------------------------------------------- the figures


def share(looks: Sequence[Look], is_so: Callable[[Look], bool]) -> str:
    """Return how many of the looks are so."""
    number = sum(map(is_so, looks))
    return f"{number}/{len(looks)}" + (f" ({100 * number / len(looks):.1f} %)" if looks else "")


def print_healthy(looks: Sequence[Look]) -> None:
    """Print the alarms of healthy trainings by moment, by type, and in all."""
    print(f"\nhealthy trainings: {len({look.id for look in looks})}; looks with an alarm")
    for moment in MOMENTS:
        some = [look for look in looks if look.moment == moment]
        parts = [[look for look in some if look.optimizer is optimizer] for optimizer in (True, False)]
        having = [share(part, lambda look: look.alarm) for part in parts]
        print(f"  {moment:12} with optimizer {having[0]:18} without {having[1]}")
    issues = Counter(verdict.type for look in looks for verdict in look.verdicts)
    for kind in TYPES:
        having = share(looks, lambda look, kind=kind: any(v.type == kind for v in look.verdicts))
        print(f"  {kind:12} {having:18} issues {issues[kind]}")
    print(f"  crashes      {share(looks, lambda look: bool(look.error))}")
    print(f"  all looks    {share(looks, lambda look: look.alarm)}")
    alarmed = {look.id for look in looks if look.alarm}
    print(f"  trainings with any alarm {len(alarmed)}/{len({look.id for look in looks})}")


def print_late(looks: Sequence[Look]) -> None:
    """Print how many of those that go bad are found late and left alone early."""
    print(f"\ntrainings that go bad late: {len({look.id for look in looks})}")
    for optimizer in (True, False):
        mine = [look for look in looks if look.optimizer is optimizer]
        late, early = ([look for look in mine if look.moment == moment] for moment in (LATE, EARLY))
        print(
            f"  {'with' if optimizer else 'without'} optimizer: found {share(late, lambda k: k.found)} · "
            f"layer right {share(late, lambda k: k.layer_right)} · "
            f"cause right {share(late, lambda k: k.cause_right)} · "
            f"early clean {share(early, lambda k: k.clean)}"
        )


def row_of(look: Look) -> dict[str, Any]:
    """Return a look as plain data, with what is made of it."""
    told = {name: getattr(look, name) for name in ("alarm", "found", "layer_right", "cause_right")}
    return {**asdict(look), "healthy": look.case.healthy, **told}


def main() -> int:
    """Look at the chosen trainings, and print what was said and how much of it is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the ids to look at")
    parser.add_argument("--steps", type=int, default=20, help="steps of training that a look takes")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--cache", type=Path, help="a folder to keep the trainings' moments in")
    parser.add_argument("--json", type=Path, help="where to write all looks")
    args = parser.parse_args()
    start = time.perf_counter()
    looks = all_looks(args)
    valid = [look for look in looks if look.valid]
    print_healthy([look for look in valid if look.case.healthy])
    print_late([look for look in valid if not look.case.healthy])
    left_out = dict.fromkeys(look.id for look in looks if not look.valid)
    print(f"left out, as their figures are not as registered: {', '.join(left_out) or 'none'}")
    looking = sum(look.seconds for look in looks)
    print(f"{len(looks)} looks, {looking:.0f} s of looking, {time.perf_counter() - start:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps([row_of(look) for look in looks], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
