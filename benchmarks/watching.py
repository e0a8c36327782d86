"""Cost of a monitor in a training loop over the same loop without it, side by side in one run.

    python benchmarks/watching.py [--every 100] [--only NAME ...] [--write]

Two copies of a model are trained by Adam, a step of the one and a step of the other by turns, on one
thread. A *look* is what a call takes that looks, in plain steps (median of those behind the first two,
which load code); *between* is what one takes that does not, beyond a call of a function that does nothing in
its place: behind a step that has emptied the processor's caches even that takes some microseconds, which the
column *empty call* tells, the timer's own included. *Long run* is the ratio for a training without end, one
look every so many steps, with all that a call takes; *first thousand* counts the looks at the beginning too,
and the first one with all it loads. Memory is the peak resident size of a process of its own that trains for
some steps, over that of the plain training: with the call behind `optimizer.zero_grad()`, and (*gradients
kept*) with the call before it, where the training's own gradients stand beside those of the look. `--write`
puts the table into docs/watching.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from overhead import markdown
from workloads import DESCRIPTIONS, WORKLOADS, Workload, build

import gradflow as gf

PAGE = Path(__file__).parent.parent / "docs" / "watching.md"
THOUSAND = 1000


class Cost(NamedTuple):
    """Seconds of a plain step, of the first look, of a later one, of a call between looks, of a call of a
    function that does nothing in the place of that; the number of looks."""

    plain: float
    first: float
    look: float
    between: float
    empty: float
    looks: int

    def ratio(self, every: int) -> float:
        """Return the cost of a training without end over the plain one."""
        return 1 + (self.look / every + self.between) / self.plain

    def thousand(self) -> float:
        """Return the same for the first thousand steps."""
        spent = self.first + self.look * (self.looks - 1) + self.between * (THOUSAND - self.looks)
        return 1 + spent / (THOUSAND * self.plain)


def stepping(work: Workload) -> Callable[[], torch.Tensor]:
    """Return a training step of a workload."""
    optimizer = torch.optim.Adam(work.model.parameters(), lr=1e-4)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = work.loss()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def cost(name: str, every: int, looks: int) -> Cost:
    """Return what watching a workload costs.

    Args:
        name: of the workload.
        every: as for the monitor; fewer steps are run from one look to the next than that, to save time.
        looks: how many looks to time.
    """
    work = build(name)
    plain = stepping(work._replace(model=copy.deepcopy(work.model)))
    watched = stepping(work)
    monitor = gf.Monitor(work.model, work.loss_fn, every=8)
    plains, calls, quiet, empty = [], [], [], []
    while len(calls) < looks + 2:
        start = time.perf_counter()
        loss = plain()
        middle = time.perf_counter()
        nothing(work.batch, loss=loss)
        empty.append(time.perf_counter() - middle)
        loss = watched()
        before = time.perf_counter()
        report = monitor(work.batch, loss=loss)
        after = time.perf_counter()
        plains.append(middle - start)
        (quiet if report is None else calls).append(after - before)
    schedule = gf.Monitor(work.model, work.loss_fn, every=every)
    number, step = 0, 0
    while step < THOUSAND:
        step, number = next_step(step, every), number + 1
    del schedule
    return Cost(
        plain=statistics.median(plains),
        first=calls[0],
        look=statistics.median(calls[2:]),
        between=statistics.median(quiet),
        empty=statistics.median(empty),
        looks=number,
    )


def nothing(batch: Any, *, loss: Any = None, step: int | None = None) -> None:
    """Do nothing, with the arguments of a monitor's call."""


def next_step(step: int, every: int) -> int:
    from gradflow.watching.schedule import next_look

    return next_look(step, every)


def peak_memory(name: str, variant: str) -> float:
    """Return the peak resident size of a process of its own that trains, in MiB."""
    command = [sys.executable, __file__, "--only", name, "--peak-of", variant]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def print_peak(name: str, variant: str) -> None:
    """Train for eight steps, with three looks or none, and print this process's peak resident size in MiB."""
    work = build(name)
    step, monitor = stepping(work), gf.Monitor(work.model, work.loss_fn, every=4)
    for _ in range(8):
        loss = step()
        if variant != "kept":
            work.model.zero_grad()
        if variant != "plain":
            monitor(work.batch, loss=loss)
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--looks", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args.only[0], args.peak_of)
        return
    torch.set_num_threads(1)
    rows = []
    for name in args.only:
        found = cost(name, args.every, args.looks)
        memory, kept = float("nan"), float("nan")
        if not args.no_memory:
            plain = peak_memory(name, "plain")
            memory, kept = peak_memory(name, "watched") / plain, peak_memory(name, "kept") / plain
        rows.append([
            name, f"{found.plain * 1e3:.1f}", f"{found.look / found.plain:.2f}",
            f"{1 + (found.between - found.empty) / found.plain:.4f}", f"{found.empty * 1e6:.1f}",
            f"{found.ratio(args.every):.3f}", f"{found.thousand():.3f}", f"{memory:.2f}",
            f"{kept:.2f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = [
        "", "plain step, ms", "look, plain steps", "between", "empty call, µs", "long run", "first thousand",
        "memory", "gradients kept",
    ]  # fmt: skip
    table = markdown(head, rows)
    print(table)
    if args.write:
        texts = [
            "# What watching costs",
            " ".join(__doc__.split("\n\n")[2].split()).rpartition(" `--write`")[0],
            f"From one run of `python benchmarks/watching.py --every {args.every} --write` on "
            f"{os.cpu_count()} CPU cores, PyTorch {torch.__version__}:",
            table,
            "\n".join(f"- {name}: {DESCRIPTIONS[name]}" for name in args.only),
        ]
        PAGE.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
