"""Scores verdicts on the zoo: gradflow's, and side by side what one would use instead.

    python benchmarks/verdicts/score.py [--only PART] [--family NAME] [--tools NAME ...] [--widths]
        [--steps 20] [--jobs 1] [--verbose] [--labelled FILE] [--moments FILE]
        [--write [FILE]]

  found         a sick case for which every expected (type, layer) pair is among the tool's serious verdicts,
                for gradflow: those of severity MEDIUM and above
  cause named   the type and layer that the tool names first are one of the expected pairs
  spurious      a sick case with a serious verdict of a type that is neither expected nor allowed
  false alarm   a healthy case, or a sick one's repaired build, with any serious verdict; a crash counts

`--widths` runs gradflow at every width and in every dtype of each case too. `--write` writes the page
`docs/verdicts.md`; with `--labelled` it also tells of a run on other labelled cases, from the JSON file that
their own scorer wrote (rows with the keys id, build, found, cause, spurious, alarm, issues); with `--moments`
of a run of `moments.py --json`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from page import Others, page
from rounds import ROUNDS
from tools import TOOLS, Answer, Finding, seeded_answer, why_not
from zoo import CASES, FLOAT32, TYPES, Case

ROOT = Path(__file__).resolve().parents[2]

# Why gradflow misses what it misses, and alarms where it does. A figure belongs nowhere in here.
REASONS: dict[str, str] = {
    **{id: why for one in ROUNDS for id, why in (*one.missed.items(), *one.alarmed.items())},
    "contact2b-hyperbolic-boundary": "What makes the gradient vanish is told first, a tanh at its ends.",
    "transformer-attention-only": "The positions *of one sample* become alike, and samples still differ; how "
    "much rows differ is taken over samples and positions together.",
    "mlp-rectified-output": "One sample of the run still fires, so the gradient is not zero in every step.",
    "rnn-rate-too-high": "The loss leaps in the first steps and then comes down: one leap is not a pattern.",
    "transformer-adam-rate-of-a-half": "The loss rises to a small multiple of its start, where cross entropy "
    "has little room; the attention that the steps drive to its ends is told.",
    "graph-mean-over-no-neighbours": "The task is solved within the run, and once the loss is next to zero a "
    "single wrong sample is a hundred times the gradient that the run is used to.",
}


@dataclass(frozen=True)
class Row:
    """How one tool did on one build of one case."""

    id: str
    tool: str
    build: str  # sick, repaired, healthy
    width: int
    dtype: str
    found: bool
    cause: bool
    spurious: bool
    alarm: bool
    told: str
    error: str
    seconds: float

    @property
    def case(self) -> Case:
        """The case."""
        return CASES[self.id]

    @property
    def usual(self) -> bool:
        """Whether it is at the case's usual width, in float32."""
        return self.width == self.case.width and self.dtype == "float32"

    @property
    def right(self) -> bool:
        """Whether there is nothing to add: found, named and nothing besides, or rightly left alone."""
        return (self.found and self.cause and not self.spurious) if self.build == "sick" else not self.alarm


def under(layer: str, prefix: str) -> bool:
    """Whether a layer is the prefix, below it, or a further call of it."""
    return prefix == "*" or layer == prefix or layer.startswith((prefix + ".", prefix + "@"))


def is_pair(finding: Finding | None, pair: tuple[str, str]) -> bool:
    """Whether a verdict is an expected (type, layer) pair."""
    return finding is not None and pair[0] in finding.types and under(finding.layer, pair[1])


def judged(case: Case, tool: str, build: str, width: int, dtype: torch.dtype, steps: int) -> Row:
    """Build, ask the tool, and compare what it says with the label."""
    start, answer, error = time.perf_counter(), Answer((), None), ""
    try:
        answer = seeded_answer(tool, case.build(sick=build == "sick", width=width, dtype=dtype), steps)
    except Exception as problem:  # a crash is a miss or an alarm, and is shown
        error = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
    is_sick = build == "sick"
    right = {kind for kind, _ in case.expect} | set(case.allow)
    told = "; ".join(str(f) for f in answer.findings[:4])
    told += f" (+{len(answer.findings) - 4})" if len(answer.findings) > 4 else ""
    told += f" | cause {answer.cause}" if answer.cause else ""
    return Row(
        case.id,
        tool,
        build,
        width,
        str(dtype).removeprefix("torch."),
        found=is_sick and all(any(is_pair(f, pair) for f in answer.findings) for pair in case.expect),
        cause=is_sick and any(is_pair(answer.cause, pair) for pair in case.expect),
        spurious=is_sick and any(not right & set(f.types) for f in answer.findings),
        alarm=not is_sick and bool(answer.findings or error),
        told=told or "nothing",
        error=error,
        seconds=time.perf_counter() - start,
    )


def rows_of(id: str, tools: Sequence[str], widths: bool, steps: int) -> list[Row]:
    """Return the rows of one case; a process of its own can run this."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    case = CASES[id]
    builds = ["healthy"] if case.healthy else ["sick", "repaired"]
    rows = [judged(case, t, b, case.width, FLOAT32, steps) for t in tools for b in builds]
    if widths and "gradflow" in tools:
        others = [(w, d) for w in case.widths for d in case.dtypes if (w, d) != (case.width, FLOAT32)]
        rows += [judged(case, "gradflow", b, w, d, steps) for b in builds for w, d in others]
    return rows


def all_rows(args: argparse.Namespace, tools: Sequence[str]) -> list[Row]:
    """Return the rows of the chosen cases, and print what is worth a line as it comes."""
    chosen = [c.id for c in CASES.values() if args.only in c.id and args.family in ("", c.family)]
    rows: list[Row] = []

    def keep(new: Iterable[Row]) -> None:
        for row in new:
            rows.append(row)
            if args.verbose or (row.tool == "gradflow" and not row.right):
                print(line_of(row), flush=True)

    if args.jobs <= 1:
        for id in chosen:
            keep(rows_of(id, tools, args.widths, args.steps))
        return rows
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        for new in pool.map(rows_of, chosen, *([x] * len(chosen) for x in (tools, args.widths, args.steps))):
            keep(new)
    return rows


def line_of(row: Row) -> str:
    """Return one line that tells how a tool did on a build."""
    if row.build == "sick":
        mark = "MISS " if not row.found else "SPUR " if row.spurious else "ok   " if row.cause else "CAUSE"
        want = " want " + ",".join(f"{kind}:{prefix}" for kind, prefix in row.case.expect)
    else:
        mark, want = ("ALARM" if row.alarm else "ok   "), ""
    where = "" if row.usual else f" width {row.width} {row.dtype}"
    tool = "" if row.tool == "gradflow" else f" [{row.tool}]"
    return f"{mark} {row.build:8} {row.case.id}{where}{tool}{want} | got {row.error or row.told}"


def share(rows: Sequence[Row], what: str) -> str:
    """Return how many of the rows have a property."""
    return f"{sum(bool(getattr(row, what)) for row in rows)}/{len(rows)}"


def summary(rows: Sequence[Row]) -> str:
    """Return one line of figures for one tool's rows."""
    sick = [r for r in rows if r.build == "sick"]
    healthy, repaired = ([r for r in rows if r.build == build] for build in ("healthy", "repaired"))
    return (
        f"found {share(sick, 'found')} · cause named {share(sick, 'cause')} · "
        f"spurious {share(sick, 'spurious')} · false alarms: healthy {share(healthy, 'alarm')}, "
        f"repaired {share(repaired, 'alarm')} · crashes {share(rows, 'error')} · "
        f"{sum(r.seconds for r in rows):.0f} s"
    )


def print_figures(rows: Sequence[Row], tools: Sequence[str]) -> None:
    """Print the figures of every tool by type, and in all."""
    for tool in tools:
        mine = [r for r in rows if r.tool == tool and r.usual]
        print(f"\n{tool}")
        for kind in TYPES:
            some = [r for r in mine if any(k == kind for k, _ in r.case.expect)]
            if some:
                print(f"  {kind:10} {summary(some)}")
        print(f"  {'all':10} {summary(mine)}")
    others = [r for r in rows if not r.usual]
    if others:
        print("\ngradflow at other widths and in other dtypes")
        for dtype in dict.fromkeys(r.dtype for r in others):
            print(f"  {dtype:10} {summary([r for r in others if r.dtype == dtype])}")


def main() -> int:
    """Run the tools on the chosen cases, print how they did, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the ids to run")
    parser.add_argument("--family", default="", help="the family to run")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), help="whom to ask")
    parser.add_argument("--widths", action="store_true", help="gradflow at all widths and in all dtypes")
    parser.add_argument("--steps", type=int, default=20, help="steps of training that a tool may look at")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--verbose", action="store_true", help="a line for every build and tool")
    parser.add_argument("--labelled", type=Path, help="JSON of a run on other labelled cases")
    parser.add_argument("--moments", type=Path, help="JSON of a run of moments.py")
    parser.add_argument("--write", nargs="?", type=Path, const=ROOT / "docs" / "verdicts.md")
    args = parser.parse_args()
    missing = {tool: why for tool in args.tools if (why := why_not(tool))}
    tools = [tool for tool in args.tools if tool not in missing]
    rows = all_rows(args, tools)
    print_figures(rows, tools)
    for why in missing.values():
        print(f"left out: {why}")
    if args.write:
        labelled = json.loads(args.labelled.read_text()) if args.labelled else []
        looks = json.loads(args.moments.read_text()) if args.moments else []
        text = page(rows, tools, missing, Others(REASONS, args.steps, labelled, looks))
        args.write.write_text(text, encoding="utf-8")
        print(f"wrote {args.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
