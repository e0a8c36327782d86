"""What subnormal numbers cost on this processor, and what measuring precision costs.

    python benchmarks/precision.py [--repeats 5] [--write]

*Operations*: the time of an operation on a quarter of a million subnormal numbers over that on as many usual
ones. *Reverse passes*: the time of a plain reverse pass in which a share of all numbers is subnormal, as it
is and under `torch.set_flush_denormal(True)`. *Measuring*: a run of 20 steps with `precision()` over the same
run without it, and what one of its five looks adds, in plain steps. What is compared is run in turn, and the
least time of each counts. `--write` puts the tables into docs/precision.md.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from workloads import DESCRIPTIONS, Workload, build

import gradflow as gf
from gradflow.functional import precision

PAGE = Path(__file__).parent.parent / "docs" / "precision.md"
MEASURED = ("mlp", "resnet18", "encoder", "lstm")
LOOKS = 5  # of 20 steps: 0, 1, 4, 16 and 19


@contextlib.contextmanager
def flushing(flushed: bool) -> Iterator[None]:
    """Have subnormal numbers taken for zero, or not, for the length of the context."""
    torch.set_flush_denormal(flushed)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def least(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the least time of each call, of so many in turn, in seconds."""
    found = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            found[i] = min(found[i], time.perf_counter() - start)
    return found


def operations(repeats: int) -> list[list[str]]:
    """Return rows of (operation, ratio, ratio where they are flushed)."""
    small, usual = torch.full((512, 512), 1e-40), torch.full((512, 512), 1e-4)
    asked: dict[str, Callable[[Tensor], Tensor]] = {
        "product": lambda x: x * 0.5,
        "sum": lambda x: x + x,
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
        "matrix product": lambda x: x @ usual,
    }
    rows = []
    for name, run in asked.items():
        ratios = []
        for flushed in (False, True):
            with flushing(flushed):
                slow, fast = least([lambda run=run: run(small), lambda run=run: run(usual)], 10 * repeats)
                ratios.append(slow / fast)
        rows.append([name, *(f"{ratio:.1f}" for ratio in ratios)])
    return rows


class Loop(nn.Module):
    """An LSTM cell in a loop, of which the last state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(32, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = self.cell(step, state)
        assert state is not None
        return self.head(state[0])


def dying() -> dict[str, tuple[nn.Module, Tensor]]:
    """Return models whose gradient decays until its format ends, and a batch for each."""
    torch.manual_seed(0)
    deep = [layer for _ in range(120) for layer in (nn.Linear(128, 128), nn.Sigmoid())]
    return {
        "LSTM cell over 256 steps": (Loop(), torch.randn(256, 32, 32)),
        "120 sigmoid layers": (nn.Sequential(*deep), torch.randn(64, 128)),
    }


def reverse_passes(repeats: int) -> list[list[str]]:
    """Return rows of (model, share of subnormal numbers, ms as it is, ms where they are flushed)."""
    rows = []
    for name, (model, x) in dying().items():
        known = gf.analyze(model, [x], _square, measurements=[precision()]).precision
        assert known is not None
        total = sum(part.num_elements for part in known.subnormals)
        share = sum(part.num_subnormal for part in known.subnormals) / max(total, 1)
        took: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repeats):
            for flushed, found in took.items():
                loss = _square(model(x))
                with flushing(flushed):
                    start = time.perf_counter()
                    loss.backward()
                    found.append(time.perf_counter() - start)
        times = [1e3 * min(found) for found in took.values()]
        rows.append([name, f"{share:.3f}", *(f"{ms:.1f}" for ms in times)])
    return rows


def _square(y: Tensor) -> Tensor:
    return y.square().mean()


def measuring(repeats: int) -> list[list[str]]:
    """Return rows of (network, ratio of the runs, plain steps that a look adds)."""
    rows = []
    for name in MEASURED:
        work = build(name)

        def measured(chosen: list[gf.Measurement], work: Workload = work) -> None:
            gf.analyze(work.model, lambda: work.batch, work.loss_fn, steps=20, measurements=chosen)

        runs = [work.plain_step, lambda run=measured: run([]), lambda run=measured: run([precision()])]
        plain, without, with_it = least(runs, repeats)
        look = (with_it - without) / LOOKS / plain
        rows.append([f"{name}: {DESCRIPTIONS[name]}", f"{with_it / without:.2f}", f"{look:.1f}"])
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return rows as a table of Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def processor() -> str:
    """Return the name of the processor, as the system tells it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def main() -> None:
    """Print the tables, and write them into the page where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {
        "operations": table(["operation", "subnormal over usual", "flushed"], operations(options.repeats)),
        "reverse passes": table(
            ["model", "share subnormal", "reverse pass, ms", "flushed, ms"], reverse_passes(options.repeats)
        ),
        "measuring": table(
            ["network", "run with it over run", "a look, plain steps"], measuring(options.repeats)
        ),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, found in kinds.items():
        said = f"Processor: {processor()}, 1 thread, PyTorch {torch.__version__}.\n\n{found}"
        print(f"{name}\n\n{said}\n")
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, said=said: f"{m[1]}\n{said}\n\n{m[2]}", text, flags=re.DOTALL)
    if options.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
