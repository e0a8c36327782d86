"""Checks every label of the zoo with plain PyTorch, without gradflow, and prints what does not hold.

    python benchmarks/verdicts/check_labels.py [--only PART] [--family NAME] [--all] [--verbose]

For a sick case: the claimed mechanism is seen in the sick build and not in the repaired one, and the
repaired one trains. For a healthy case: it trains, and looks as suspicious as it says. With `--all` at every
width and in every dtype of the case, else at the usual width in float32. Exit status 1 if anything fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections import Counter

import torch
from zoo import CASES, DTYPES, FLOAT32, TYPES, Case
from zoo.claims import asked, training


def trains(case: Case, width: int, dtype: torch.dtype) -> str:
    """Return why a build without illness does not train, or nothing if it does."""
    setup = case.build(sick=False, width=width, dtype=dtype)
    losses = [step.loss for step in training(setup, case.steps)]
    if not all(map(math.isfinite, losses)):
        return f"loss not finite at step {next(i for i, x in enumerate(losses) if not math.isfinite(x))}"
    begin, end = sum(losses[:5]) / 5, sum(losses[-15:]) / 15
    if case.converged:
        return "" if end <= 2 * begin else f"loss leaves {begin:.3g} for {end:.3g}"
    # In bfloat16 small updates of large weights are lost to rounding, so more of the loss may be left.
    limit = case.falls_to if dtype == FLOAT32 else (1 + case.falls_to) / 2
    fell = end < limit * begin if begin > 0 else end < begin - abs(begin) * (1 - limit)
    return "" if fell else f"loss only falls from {begin:.3g} to {end:.3g} in {case.steps} steps"


def problems(case: Case, width: int, dtype: torch.dtype, told: list[str]) -> list[str]:
    """Return what does not hold of a case at a width and in a dtype."""
    found = []
    if case.claim is not None:
        holds, seen = asked(case.claim, lambda: case.build(sick=True, width=width, dtype=dtype))
        told.append(f"sick: {seen}")
        if not holds:
            found.append(f"not seen in the sick build: {seen}")
        holds, seen = asked(case.claim, lambda: case.build(sick=False, width=width, dtype=dtype))
        told.append(f"repaired: {seen}")
        if holds:
            found.append(f"seen in the repaired build too: {seen}")
    if case.looks is not None:
        holds, seen = asked(case.looks, lambda: case.build(width=width, dtype=dtype))
        told.append(f"looks: {seen}")
        if not holds:
            found.append(f"does not look suspicious: {seen}")
    why = trains(case, width, dtype)
    return found + ([why] if why else [])


def main() -> int:
    """Check the chosen cases, print what fails and how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the ids to check")
    parser.add_argument("--family", default="", help="the family to check")
    parser.add_argument("--all", action="store_true", help="at every width and in every dtype")
    parser.add_argument("--verbose", action="store_true", help="print what was seen in each")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = [c for c in CASES.values() if args.only in c.id and args.family in ("", c.family)]
    failed, checks, begin = 0, 0, time.perf_counter()
    for case in chosen:
        dtypes = [d for d in DTYPES if d in case.dtypes] if args.all else [case.dtypes[0]]
        for width in case.widths if args.all else [case.width]:
            for dtype in dtypes:
                told: list[str] = []
                start = time.perf_counter()
                try:
                    found = problems(case, width, dtype, told)
                except (
                    Exception
                ) as error:  # a build that cannot run is a failed label, and the rest still counts
                    found = [f"{type(error).__name__}: {error}".splitlines()[0]]
                checks, failed = checks + 1, failed + bool(found)
                name = f"{case.id} (width {width}, {str(dtype).removeprefix('torch.')})"
                for line in found:
                    print(f"FAIL {name}: {line}", flush=True)
                if args.verbose:
                    print(f"     {name} {time.perf_counter() - start:.1f} s: {' | '.join(told)}", flush=True)
    print(counts(chosen))
    print(f"{checks} builds checked, {failed} fail, {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


def counts(cases: list[Case]) -> str:
    """Return how many cases there are of each type and of each family."""
    sick = [c for c in cases if not c.healthy]
    types = Counter(kind for c in sick for kind in {k for k, _ in c.expect})
    families = Counter((c.family, c.healthy) for c in cases)
    lines = [f"{len(sick)} sick, {len(cases) - len(sick)} healthy"]
    lines.append(" · ".join(f"{kind} {types[kind]}" for kind in TYPES if types[kind]))
    names = sorted({c.family for c in cases})
    lines.append(" · ".join(f"{n} {families[n, False]}+{families[n, True]}" for n in names))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
