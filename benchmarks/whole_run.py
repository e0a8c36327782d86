"""Where the time of a whole run goes: its parts, each over a plain step.

    python benchmarks/whole_run.py [--only mlp] [--runs 7] [--write]

Twenty steps by `diagnose` with the default pipeline, a plain step of a copy of the model next to each, on one
thread. Every part is timed by itself, what it calls of other parts left out; steps are over what the plain
ones next to them take. *First* is the first run of a process, which loads the code too; *later* is the median
of those behind it.
`--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from workloads import DESCRIPTIONS, Workload, build

import gradflow as gf
from gradflow import diagnosis
from gradflow.functional.reach.findings import ReachFindings
from gradflow.functional.run import again, loop, record
from gradflow.functional.run.graph.findings import GraphFindings
from gradflow.functional.run.history import History
from gradflow.functional.run.run import Plan

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
STEPS = 20

ORDINARY, FIRST, LOOKS = "ordinary steps", "first step", "closer steps"
REACH, GRAPH, PARTS = "reach", "layer graph", "sessions of measurements"
GUESSES, RECORD, JUDGING, ENDS = "eval pass and guesses", "record", "detectors", "beginning and end"
ROWS = (ENDS, FIRST, ORDINARY, LOOKS, "numbers to the host", REACH, GRAPH, PARTS, GUESSES, RECORD, JUDGING)

PLACES: dict[str, list[tuple[Any, str]]] = {
    FIRST: [(loop, "_first_step")],
    "numbers to the host": [(History, "read")],
    REACH: [
        (loop, "learn_reach"), (loop, "follow_reach"), (loop, "looked_again"), (again.Closer, "look"),
        (ReachFindings, "account"),
    ],
    GRAPH: [(GraphFindings, name) for name in ("learn", "add", "conclude", "record")],
    PARTS: [(loop, "_end"), (record, "measured")],
    GUESSES: [(loop, "heard_in_eval"), (loop, "knowledge")],
    RECORD: [(loop, "assembled"), (loop, "conclude")],
    JUDGING: [(diagnosis, "detect"), (diagnosis, "judged")],
}  # fmt: skip


class Clock:
    """Adds up how long parts take, each without those that it calls."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(ROWS, 0.0)
        self._running: list[str] = []
        self._mark = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the length of the context for a part, and not for the one around it."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        now = time.thread_time()
        if self._running and self._running[-1] in self.spent:
            self.spent[self._running[-1]] += now - self._mark
        self._mark = now

    def wrapped(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that counts for the part that its arguments name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name(*args)):
                return function(*args, **kwargs)

        return timed


def of_step(_run: Any, request: Any) -> str:
    return LOOKS if request.look else ORDINARY


def parts_of_a_run(work: Workload) -> dict[str, float]:
    """Return how long the parts of a run take, over the plain step; those of steps, over the plain ones."""
    twin, clock = Workload(copy.deepcopy(work.model), work.batch, work.loss_fn), Clock()
    plain: list[float] = []

    def draw() -> Any:
        with clock.part("plain"):
            start = time.thread_time()
            twin.plain_step()
            plain.append(time.thread_time() - start)
        return work.batch

    with contextlib.ExitStack() as stack:
        places = [(part, *place) for part, places in PLACES.items() for place in places]
        for part, owner, name in places:
            timed = clock.wrapped(lambda *_, part=part: part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        stack.enter_context(mock.patch.object(loop, "_step", clock.wrapped(of_step, loop._step)))
        with clock.part(ENDS):
            gf.diagnose(work.model, draw, work.loss_fn, steps=STEPS)
    plan = Plan(steps=STEPS)
    for step, seconds in enumerate(plain):
        part = FIRST if step == 0 else LOOKS if plan.is_look(step) else ORDINARY
        clock.spent[part] -= seconds
    unit = sum(plain) / len(plain)
    return {part: seconds / unit for part, seconds in clock.spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="mlp", choices=list(DESCRIPTIONS))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work = build(args.only)
    for _ in range(5):
        work.plain_step()
    first, *later = [parts_of_a_run(work) for _ in range(args.runs + 1)]
    rows = [(part, first[part], statistics.median(run[part] for run in later)) for part in ROWS]
    rows.append(("together", sum(first.values()), statistics.median(sum(run.values()) for run in later)))
    lines = ["| plain steps | first | later |", "| --- | ---: | ---: |"]
    lines += [f"| {part} | {cold:.2f} | {warm:.2f} |" for part, cold, warm in rows]
    print("\n".join(lines))
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        table = "\n".join(lines)
        new = f"<!-- whole run -->\n{table}\n<!-- end of whole run -->"
        page = re.sub("<!-- whole run -->.*<!-- end of whole run -->", lambda _: new, page, flags=re.S)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
