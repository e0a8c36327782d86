"""Cost of a look inside a training step over the plain step, side by side in one run.

    python benchmarks/inside.py [--only NAME ...] [--looks 7] [--write]

Three copies of a model are trained by Adam, a step of each by turns, on one thread: a plain one, one in
`monitor.step()`, one with `monitor(batch)` behind it. Medians of the ratios to the plain step next to it, the
first two looks left out, which load code.
`--write` puts the table into docs/inside.md.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import markdown
from workloads import DESCRIPTIONS, WORKLOADS, Workload, build

import gradflow as gf
from gradflow.watching.inside import LookedStep

PAGE = Path(__file__).parent.parent / "docs" / "inside.md"


def stepping(work: Workload, context: Callable[[], Any]) -> Callable[[], Any]:
    """Return a training step of a workload in a context, which it returns."""
    optimizer = torch.optim.Adam(work.model.parameters(), lr=1e-4)

    def step() -> Any:
        with context() as inside:
            optimizer.zero_grad()
            work.loss().backward()
            optimizer.step()
        return inside

    return step


def row(name: str, looks: int) -> list[str]:
    """Return what looks at a workload cost, in plain steps."""
    plain_work, inside_work, beside_work = build(name), build(name), build(name)
    inside = gf.Monitor(inside_work.model, every=4)
    beside = gf.Monitor(beside_work.model, beside_work.loss_fn, every=4)
    steps = [
        stepping(plain_work, contextlib.nullcontext), stepping(inside_work, inside.step),
        stepping(beside_work, contextlib.nullcontext),
    ]  # fmt: skip
    plain, looked, idle, called = [], [], [], []
    while len(looked) < looks + 2:
        seconds = []
        for step in steps:
            start = time.perf_counter()
            found = step()
            seconds.append(time.perf_counter() - start)
            if step is steps[1]:
                (looked if isinstance(found, LookedStep) else idle).append(seconds[1] / seconds[0])
        plain.append(seconds[0])
        start = time.perf_counter()
        if beside(beside_work.batch) is not None:
            called.append((time.perf_counter() - start) / seconds[0])
    ratios = [statistics.median(found) for found in (looked[2:], idle, called[2:])]
    return [name, f"{statistics.median(plain) * 1e3:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--looks", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["", "plain step, ms", "step with a look inside", "step with none", "a look beside"]
    table = markdown(heads, [row(name, args.looks) for name in args.only])
    named = "\n".join(f"- {name}: {DESCRIPTIONS[name]}" for name in args.only)
    text = f"{table}\n\n{named}\n"
    print(text)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        new = f"<!-- costs -->\n{text}<!-- end of costs -->"
        page = re.sub("<!-- costs -->.*<!-- end of costs -->", lambda _: new, page, flags=re.S)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
