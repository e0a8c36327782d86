"""How the cost of gradflow grows over layers, the batch and the steps: time, memory, size of the record.

    python benchmarks/scale.py [--layers 10 100 1000 5000] [--runs 5] [--threads 1] [--write]

The model is a chain of linear layers with orthogonal weights and layer norms in turn, which keeps the
gradient's size at any depth. Runs of 20 steps of plain forward, loss and backward and of gradflow's cheap
mode take turns in one process, and medians of their means are compared. `detect` and `graph` are the seconds
of all detectors and of all queries of the layer graph (those of `graph_scale.py`) on a finished record,
without a model. Memory is the peak of a process of its own for each number of steps. The last line of a table
is the exponent p by which a column grows from its first to its last row, ~ size^p: 1 is linear. `--write`
writes `docs/scale.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from graph_scale import questions
from torch import Tensor, nn

import gradflow as gf

ROOT = Path(__file__).resolve().parents[1]
Workload = tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]

WIDTH, ROWS = 32, 32
STEPS = 20


def chain(layers: int, rows: int = ROWS, width: int = WIDTH) -> Workload:
    """Return a chain of so many layers, a batch and a loss."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for i in range(layers):
        parts.append(nn.LayerNorm(width) if i % 2 else nn.Linear(width, width, bias=False))
        if i % 2 == 0:
            nn.init.orthogonal_(parts[-1].weight)  # type: ignore[arg-type]
    return nn.Sequential(*parts), torch.randn(rows, width), mean_square


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def medians(work: Workload, runs: int) -> tuple[float, float]:
    """Return the seconds of a plain step and of a step of gradflow: means over a run of 20, the length of
    `diagnose`'s own, whose first is left out; medians over runs taken in turn."""
    model, batch, loss_fn = work
    ours, theirs = [], []

    def plain() -> None:
        model.zero_grad()
        loss_fn(model(batch)).backward()

    for _ in range(runs):
        theirs.append(seconds(plain, STEPS - 1) / (STEPS - 1))
        model.zero_grad()
        ours.append(run_seconds(work) / (STEPS - 1))
    return statistics.median(theirs), statistics.median(ours)


def run_seconds(work: Workload) -> float:
    """Return the seconds of all steps of a run of gradflow but the first."""
    model, batch, loss_fn = work
    marks: list[float] = []
    gf.analyze(
        model, lambda: batch, loss_fn, steps=STEPS, progress=lambda *_: marks.append(time.perf_counter())
    )
    return marks[-1] - marks[0]


def seconds(function: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        function()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------ the tables

Table = tuple[list[str], list[list[float]]]


def over_layers(sizes: Sequence[int], runs: int) -> Table:
    head = ["layers", "plain ms", "gradflow ms", "ratio", "added us per layer", "first step ms", "detect s",
            "graph s"]  # fmt: skip
    rows = []
    graph = gf.layer_graph(*chain(4))
    for ask in questions(graph, graph).values():  # imports what is imported on first use
        ask()
    for size in sizes:
        work = chain(size)
        theirs, ours = medians(work, runs)
        first = seconds(lambda: gf.analyze(work[0], lambda: work[1], work[2], steps=1)) - ours  # noqa: B023
        record = gf.analyze(work[0], lambda: work[1], work[2], steps=3, detail="full")  # noqa: B023
        judged = seconds(lambda: gf.detect(record))  # noqa: B023
        graph = record.graph
        asked = sum(seconds(ask) for ask in questions(graph, graph).values())
        added = (ours - theirs) / size
        rows.append([size, theirs * 1e3, ours * 1e3, ours / theirs, added * 1e6, first * 1e3, judged, asked])
    return head, rows


def over_batch(sizes: Sequence[int], runs: int, layers: int = 20, width: int = 256) -> Table:
    head = ["rows", "plain ms", "gradflow ms", "ratio", "added us per layer"]
    rows = []
    for size in sizes:
        theirs, ours = medians(chain(layers, size, width), runs)
        rows.append([size, theirs * 1e3, ours * 1e3, ours / theirs, (ours - theirs) / layers * 1e6])
    return head, rows


def over_steps(sizes: Sequence[int], layers: int = 100) -> Table:
    head = ["steps", "peak memory MiB", "seconds", "ms per step", "record bytes",
            "bytes per layer", "bytes per layer and step"]  # fmt: skip
    rows = []
    for size in sizes:
        command = [sys.executable, __file__, "--child", str(size), str(layers)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peak, spent, length = found
        each = length / layers
        rows.append([size, peak, spent, spent / size * 1e3, length, each, each / size])
    return head, rows


def child(steps: int, layers: int) -> None:
    """Run so many steps and print the peak of this process in MiB, the seconds, and the record's bytes."""
    work = chain(layers)
    start = time.perf_counter()
    record = gf.analyze(work[0], lambda: work[1], work[2], steps=steps)
    spent = time.perf_counter() - start
    print(json.dumps([peak_memory(), spent, len(record.to_json().encode())]))


def peak_memory() -> float:
    """Return the peak of this process in MiB; Linux's `ru_maxrss` may be that of the parent it came from."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------ how they are shown


def growth(rows: Sequence[Sequence[float]], column: int) -> float:
    (a, *_), (b, *_) = rows[0], rows[-1]
    low, high = rows[0][column], rows[-1][column]
    return math.log(high / low) / math.log(b / a) if low > 0 and high > 0 else math.nan


def lines(table: Table) -> list[list[str]]:
    """Return the table as text, its exponents last."""
    head, rows = table
    text = [head, *([f"{v:,.0f}" if v == int(v) else f"{v:.4g}" for v in row] for row in rows)]
    return [*text, ["p", *(f"{growth(rows, i):.2f}" for i in range(1, len(head)))]]


def shown(table: Table) -> str:
    text = lines(table)
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in text)


def markdown(table: Table) -> str:
    head, *rest = lines(table)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---:"] * len(head), *rest])


def page(tables: Iterable[tuple[str, Table]], options: str) -> str:
    """Return `docs/scale.md`."""
    intro = (
        "# Scale\n\nHow the cost of gradflow's cheap mode, the default of `diagnose`, grows. The model is a "
        f"chain of linear layers and layer norms in turn, {WIDTH} wide on {ROWS} rows where nothing else is "
        "said. A step is the mean over a run of 20, `diagnose`'s own, without the first. *Ratio* is the "
        "step over a plain forward, loss and backward pass, *added* the difference for each layer, *first "
        "step* what a run costs beyond its steps (the graph is taken, the record made), *detect* all "
        "detectors and *graph* all queries of the layer graph on a finished record. Peak memory is that of a "
        "whole process, Python and torch included. The line *p* holds the exponents by which a column grows "
        "from the first row to the last, ~ size^p: 1 is linear, 0 is flat. All figures are from one run of"
        f"\n\n```\npython benchmarks/scale.py{options}\n```\n\nwith torch {torch.__version__} and Python "
        f"{platform.python_version()} on {platform.machine()}, {torch.get_num_threads()} thread(s)."
    )
    return "\n\n".join([intro, *(f"## {title}\n\n{markdown(table)}" for title, table in tables)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 30, 100, 300, 1000, 3000, 5000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/scale.md")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        child(*options.child)
        return
    parts: list[tuple[str, Callable[[], Table]]] = [
        ("Over the number of layers", lambda: over_layers(options.layers, options.runs)),
        ("Over the batch, 20 layers of width 256", lambda: over_batch(options.rows, options.runs)),
        ("Over the number of steps, 100 layers", lambda: over_steps(options.steps)),
    ]
    tables = []
    for title, make in parts:
        tables.append((title, make()))
        print(f"\n{title}\n{shown(tables[-1][1])}", flush=True)
    if options.write:
        asked = itertools.chain.from_iterable(
            (f" --{n}", *(f" {v}" for v in getattr(options, n)))
            for n in ("layers", "rows", "steps")
            if getattr(options, n) != parser.get_default(n)
        )
        (ROOT / "docs" / "scale.md").write_text(page(tables, "".join(asked) + " --write"))


if __name__ == "__main__":
    main()
