"""Cost of a step of gradflow over a plain forward, loss and backward pass, side by side in one run.

    python benchmarks/overhead.py [--steps 20] [--threads 1 2] [--only NAME ...] [--write]

gradflow draws a batch before each of its steps; at that moment the plain step is timed, on a copy of the
model, so that every step has a plain one next to it. A *step* is the median ratio over the pairs, the steps
that are looked at closely (the first, powers of four, the last) left out; a *run* is all that a call of
so many steps takes, building the record included, over as many plain steps. The other tools are timed in the
same way, step by step in turn with plain ones. Memory is the peak resident size of a process of its own.
*Parts* tell where the time of a cheap step goes, in percent of the plain step next to it; *bare sums* is the
plain step followed by a dot product of every parameter's gradient with itself.
`--write` puts the tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy
import torch
from other_tools import OTHERS, installed
from workloads import DESCRIPTIONS, WORKLOADS, Workload, build

import gradflow as gf
from gradflow.functional.run import history as history_module
from gradflow.functional.run import reverse_pass as reverse_module
from gradflow.functional.run import step as step_module
from gradflow.functional.run.run import Plan

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


GRADFLOW: dict[str, dict[str, Any]] = {
    "cheap": {},
    "full": {"detail": "full"},
    "cheap, vjp": {"transform": "vjp"},
}


class Cost(NamedTuple):
    """Ratios to the plain step, and the plain step itself in seconds."""

    step: float
    run: float
    plain: float


def cost_of_gradflow(work: Workload, steps: int, options: dict[str, Any]) -> Cost:
    """Time a run of gradflow with a plain step before each of its own."""
    twin = Workload(copy.deepcopy(work.model), work.batch, work.loss_fn)
    plain, marks = [], []

    def draw() -> Any:
        start = time.perf_counter()
        twin.plain_step()
        marks.append(time.perf_counter())
        plain.append(marks[-1] - start)
        return work.batch

    ends: list[float] = []
    start = time.perf_counter()
    gf.analyze(
        work.model,
        draw,
        work.loss_fn,
        steps=steps,
        progress=lambda *_: ends.append(time.perf_counter()),
        **options,
    )
    total = time.perf_counter() - start
    took = [end - mark for mark, end in zip(marks, ends, strict=True)]
    ordinary = [step for step in range(steps) if not Plan(steps=steps).is_look(step)]
    return Cost(
        step=statistics.median(took[s] / plain[s] for s in ordinary),
        run=(total - sum(plain)) / sum(plain),
        plain=statistics.median(plain),
    )


def cost_of_other(work: Workload, pairs: int, tool: Callable[[Workload], Iterator[None]]) -> Cost:
    """Time another tool's steps in turn with plain ones."""
    twin = Workload(copy.deepcopy(work.model), work.batch, work.loss_fn)
    stepper = tool(Workload(copy.deepcopy(work.model), work.batch, work.loss_fn))
    next(stepper)
    twin.plain_step()
    plain, took = [], []
    for _ in range(pairs):
        start = time.perf_counter()
        twin.plain_step()
        middle = time.perf_counter()
        next(stepper)
        plain.append(middle - start)
        took.append(time.perf_counter() - middle)
    stepper.close()  # type: ignore[attr-defined]
    ratio = statistics.median(t / p for t, p in zip(took, plain, strict=True))
    return Cost(ratio, sum(took) / sum(plain), statistics.median(plain))


PARTS: dict[str, tuple[Any, str]] = {
    "forward pass and loss": (step_module, "evaluated"),
    "reverse pass": (reverse_module, "fused"),
    "sums over output gradients": (reverse_module, "_outputs"),
    "sums over parameter gradients": (history_module, "sizes_of"),
    "transfer": (history_module, "to_host"),
}


@contextlib.contextmanager
def clocked(spent: dict[str, float]) -> Iterator[None]:
    """Add to `spent` how long the parts of a step take, for the length of the context."""

    def clock(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] = spent.get(part, 0.0) + time.perf_counter() - start

        return timed

    with contextlib.ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, clock(part, getattr(owner, name))))
        yield


def parts_of_a_step(work: Workload, steps: int) -> dict[str, float]:
    """Return how much longer each part of a cheap step takes than in the plain step next to it, over it."""
    twin = Workload(copy.deepcopy(work.model), work.batch, work.loss_fn)
    rows: list[dict[str, float]] = []
    spent: dict[str, float] = {}
    mark = 0.0

    def draw() -> Any:
        nonlocal mark
        start = time.perf_counter()
        loss = twin.loss()
        middle = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        twin.model.zero_grad()
        mark = time.perf_counter()
        spent.clear()
        spent.update(
            {"plain": mark - start, "forward pass and loss": start - middle, "reverse pass": middle - end}
        )
        return work.batch

    def progress(*_: Any) -> None:
        rows.append({**spent, "step": time.perf_counter() - mark})

    with clocked(spent):
        gf.analyze(work.model, draw, work.loss_fn, steps=steps, progress=progress)
    rows = [row for step, row in enumerate(rows) if not Plan(steps=steps).is_look(step)]
    found = {part: statistics.median(row.get(part, 0.0) / row["plain"] for row in rows) for part in PARTS}
    whole = statistics.median(row["step"] / row["plain"] for row in rows) - 1
    return {**found, "the rest": whole - sum(found.values()), "together": whole}


def time_table(names: list[str], threads: int, steps: int) -> dict[str, dict[str, Cost]]:
    """Return the cost of every variant on every workload."""
    torch.set_num_threads(threads)
    found: dict[str, dict[str, Cost]] = {}
    for name in names:
        work = build(name)
        work.plain_step()
        row: dict[str, Cost] = {}
        for variant, options in GRADFLOW.items():
            row[variant] = cost_of_gradflow(work, steps, options)
        for tool, stepper in OTHERS.items():
            if installed(tool):
                row[tool] = cost_of_other(work, max(15, steps - 5), stepper)
        found[name] = row
        print(f"{name:10} {threads} thread(s): " + show_row(row), flush=True)
    return found


def show_row(row: dict[str, Cost]) -> str:
    plain = statistics.median(cost.plain for cost in row.values())
    ratios = [f"{variant} {cost.step:.2f} (run {cost.run:.2f})" for variant, cost in row.items()]
    return f"plain {plain * 1e3:.1f} ms; " + ", ".join(ratios)


def peak_memory(name: str, variant: str, steps: int) -> float:
    """Return the peak resident size of a process of its own that does so many steps, in MiB."""
    command = [sys.executable, __file__, "--only", name, "--steps", str(steps), "--peak-of", variant]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def print_peak(name: str, variant: str, steps: int) -> None:
    """Do the steps, and print this process's peak resident size in MiB."""
    # All imports are done in every process, the plain one too.
    work, analyze, _ = build(name), gf.analyze, numpy.random.get_state()
    if variant == "plain":
        for _ in range(steps):
            work.plain_step()
    elif variant in GRADFLOW:
        analyze(work.model, lambda: work.batch, work.loss_fn, steps=steps, **GRADFLOW[variant])
    else:
        for _ in itertools.islice(OTHERS[variant](work), steps):
            pass
    status = Path("/proc/self/status").read_text()  # `ru_maxrss` would count the process that forked this one
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]


def memory_table(names: list[str], steps: int) -> dict[str, dict[str, float]]:
    """Return peak MiB by workload and variant; `cheap, long` is a run of three times as many steps."""
    found: dict[str, dict[str, float]] = {}
    tools = [tool for tool in OTHERS if tool != "bare sums" and installed(tool)]
    for name in names:
        row = {v: peak_memory(name, v, steps) for v in ("plain", "cheap", "full")}
        row["cheap, long"] = peak_memory(name, "cheap", 3 * steps)
        row |= {tool: peak_memory(name, tool, steps) for tool in tools}
        found[name] = row
        print(f"{name:10} peak MiB: " + ", ".join(f"{v} {mib:.0f}" for v, mib in row.items()), flush=True)
    return found


_INTRO = """# Performance

What measuring costs, as a ratio to the same plain steps without it: forward pass, loss and backward pass. All
figures are from one run of

```
python benchmarks/overhead.py --write
```

on {machine}. {how}

{workloads}
"""


_MEMORY = """Peak resident size of a process of its own that makes {steps} steps, in MiB, PyTorch's own
included (one thread). gradflow works on copies of the parameters, since a model may write to them; they take
memory only when they are written to. In full detail the graph of a step is kept until it has been walked.
*Long* is a run of three times as many steps: nothing grows with them but the record.
"""


_PARTS = """How much longer each part of a cheap step takes than in the plain step, in percent of the whole
plain step ({threads} thread{s}). The sums read every gradient once more, which no tool that knows the norms
can do without (*bare sums* above); where a batch has few samples for its parameters that is much beside the
pass itself. The rest is Python: some ten microseconds for every layer call, run with cold caches.
"""


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def page(
    times: dict[int, dict[str, dict[str, Cost]]],
    parts: dict[str, dict[str, float]],
    memory: dict[str, dict[str, float]],
    steps: int,
) -> str:
    machine = f"{os.cpu_count()} CPU cores, PyTorch {torch.__version__}"
    texts = [
        _INTRO.format(
            machine=machine,
            how=" ".join((__doc__ or "").split("\n\n")[2].split()).rpartition(" `--write`")[0],
            workloads="\n".join(f"- {name}: {text}" for name, text in DESCRIPTIONS.items() if name in memory),
        )
    ]
    for threads, table in times.items():
        variants = list(next(iter(table.values())))
        texts.append(f"## Time, {threads} thread{'s' if threads > 1 else ''}")
        head = ["", "plain step, ms", *(f"{v} step" for v in variants), *(f"{v} run" for v in GRADFLOW)]
        rows = [
            [
                name,
                f"{statistics.median(c.plain for c in row.values()) * 1e3:.1f}",
                *(f"{row[v].step:.2f}" if v in row else "" for v in variants),
                *(f"{row[v].run:.2f}" for v in GRADFLOW),
            ]
            for name, row in table.items()
        ]
        medians = [statistics.median(row[v].step for row in table.values()) for v in variants]
        runs = [statistics.median(row[v].run for row in table.values()) for v in GRADFLOW]
        rows.append(["median", "", *(f"{m:.2f}" for m in medians), *(f"{m:.2f}" for m in runs)])
        texts.append(markdown(head, rows))
    threads = next(iter(times))
    texts += ["## Where the time goes", _PARTS.format(threads=threads, s="" if threads == 1 else "s")]
    shares = [[name, *(f"{100 * share:.1f}" for share in row.values())] for name, row in parts.items()]
    texts.append(markdown(["", *next(iter(parts.values()))], shares))
    if memory:
        variants = list(next(iter(memory.values())))
        texts += ["## Memory", _MEMORY.format(steps=steps)]
        ratios = [
            [name, f"{row['plain']:.0f}", *(f"{row[v] / row['plain']:.2f}" for v in variants[1:])]
            for name, row in memory.items()
        ]
        texts.append(markdown(["", "plain, MiB", *variants[1:]], ratios))
    return "\n\n".join(part.strip("\n") for part in texts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args.only[0], args.peak_of, args.steps)
        return
    times = {threads: time_table(args.only, threads, args.steps) for threads in args.threads}
    torch.set_num_threads(args.threads[0])
    parts = {name: parts_of_a_step(build(name), 2 * args.steps) for name in args.only}
    for name, row in parts.items():
        print(f"{name:10} " + ", ".join(f"{part} {share:.1%}" for part, share in row.items()), flush=True)
    memory = {} if args.no_memory else memory_table(args.only, args.steps)
    text = page(times, parts, memory, args.steps)
    if args.write:
        written = re.search("<!-- recurrent -->.*", PAGE.read_text(encoding="utf-8"), flags=re.S)
        PAGE.write_text(f"{text}\n{written[0]}" if written else text, encoding="utf-8")


if __name__ == "__main__":
    main()
