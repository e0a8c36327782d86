"""What measuring costs on a GPU, in one run of less than eight minutes.

    python benchmarks/gpu.py [--device cuda] [--seconds 460] [--write]

The suite's GPU tests; steps of GPT-2 in bfloat16, of 124 million and 1.5 billion parameters, next to plain
ones, timed by CUDA events; the peak of memory; how often a step waits for the device; and a run of each
pipeline. What there is no time left for is left out, and said so. On a CPU the same code runs with tiny
models and a clock, and what is counted are the numbers that are read from tensors.
`--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from overhead import markdown
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradflow as gf
from gradflow import pipelines as pipelines_of
from gradflow.functional.run.run import Plan

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
TESTS = (
    "tests/functional/run/test_synchronisation.py",
    "tests/functional/reach",
    "tests/functional/jacobian",
)
PIPELINES = ("flow", "transformer", "recurrent", "policy", "precision")


@attrs.frozen
class Size:
    """The size of a GPT-2, and of its batch."""

    name: str
    width: int
    depth: int
    heads: int
    vocabulary: int
    batch: tuple[int, int]


SIZES = (Size("124 M", 768, 12, 12, 50257, (8, 512)), Size("1.5 B", 1600, 48, 25, 50257, (4, 512)))
TINY = (Size("tiny", 32, 2, 2, 61, (2, 16)), Size("small", 48, 3, 3, 61, (2, 16)))


class Block(nn.Module):
    """A block of GPT-2 (Radford et al., 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, steps, width = x.shape
        parts = self.c_attn(self.ln_1(x)).split(width, dim=-1)
        q, k, v = (part.view(rows, steps, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(self.act(self.up(self.ln_2(x))))


class GPT(nn.Module):
    """GPT-2 without dropout, its head tied to its embedding; gives the mean loss of the next tokens."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte, self.wpe = (
            nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.batch[1], size.width),
        )  # fmt: skip
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.ln_f, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scale = (2 * size.depth) ** -0.5 if name.endswith(("c_proj.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class Timer:
    """Marks in time: CUDA events on a GPU, which make nobody wait, a clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """Return a mark of now."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time from one mark to another, once both are there."""
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@attrs.frozen
class Bench:
    """A model with its batch on a device."""

    model: nn.Module
    batch: Tensor
    device: torch.device

    @classmethod
    def of(cls, size: Size, device: torch.device) -> Bench:
        """Return a GPT-2 in bfloat16, the same every time."""
        torch.manual_seed(0)
        with torch.device(device):
            model = GPT(size).to(torch.bfloat16)
            return cls(model, torch.randint(0, size.vocabulary, size.batch), device)

    def plain_step(self) -> None:
        """Run forward and backward, and let go of the gradients."""
        self.model(self.batch).backward()
        self.model.zero_grad()

    def peak(self, run: Callable[[], Any]) -> float:
        """Return the largest memory in use while something runs, in MiB; NaN on a CPU."""
        if self.device.type != "cuda":
            run()
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20

    def waits(self, run: Callable[[], Any]) -> int:
        """Return how often something waits for the device; on a CPU, how many numbers it reads."""
        if self.device.type != "cuda":
            with Reads() as reads:
                run()
            return reads.number
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def ratios(self, steps: int, **options: Any) -> tuple[float, float, float]:
        """Return a plain step in seconds, and a step that is no look and a whole run over plain ones."""
        timer = Timer(self.device)
        plain, ends = [], []

        def draw() -> Tensor:
            start = timer.mark()
            self.plain_step()
            plain.append((start, timer.mark()))
            return self.batch

        begin = timer.mark()
        gf.analyze(self.model, draw, steps=steps, progress=lambda *_: ends.append(timer.mark()), **options)
        whole = timer.seconds(begin, timer.mark())
        plains = [timer.seconds(*pair) for pair in plain]
        took = [timer.seconds(pair[1], end) for pair, end in zip(plain, ends, strict=True)]
        ordinary = [s for s in range(steps) if not Plan(steps=steps).is_look(s)]
        step = statistics.median(took[s] / plains[s] for s in ordinary)
        return statistics.median(plains), step, (whole - sum(plains)) / sum(plains)


Row = tuple[str, str, str]  # what was measured, of what, and what came out


def overhead(size: Size, device: torch.device) -> Iterator[Row]:
    """Yield the cost of steps and runs, memory, and waits."""
    bench, steps = Bench.of(size, device), 20
    for _ in range(3):
        bench.plain_step()
    for detail in ("cheap", "full"):
        plain, step, run = bench.ratios(steps, detail=detail)
        yield f"{detail} step, over plain", size.name, f"{step:.2f}"
        yield f"{detail} run of {steps}, over plain", size.name, f"{run:.2f}"
    yield "plain step, ms", size.name, f"{plain * 1e3:.1f}"
    if device.type == "cuda":  # working copies take memory where they are written to
        peak = bench.peak(bench.plain_step)
        yield "peak memory, plain, MiB", size.name, f"{peak:.0f}"
        for detail in ("cheap", "full"):
            own = bench.peak(lambda d=detail: gf.analyze(bench.model, lambda: bench.batch, steps=3, detail=d))
            yield f"peak memory, {detail}, over plain", size.name, f"{own / peak:.2f}"
    few, many = (
        bench.waits(lambda n=n: gf.analyze(bench.model, lambda: bench.batch, steps=n)) for n in (18, 22)
    )  # both with looks at 0, 1, 4, 16 and the last
    yield "waits in a step that is no look", size.name, f"{(many - few) / 4:.1f}"


def pipelines(size: Size, device: torch.device) -> Iterator[Row]:
    """Yield what a run of each pipeline takes."""
    bench = Bench.of(size, device)
    bench.plain_step()
    timer = Timer(device)
    start = timer.mark()
    for _ in range(4):
        bench.plain_step()
    plain = timer.seconds(start, timer.mark())
    for name in PIPELINES:
        start = timer.mark()
        pipeline = getattr(pipelines_of, name)()
        found: list[gf.Report] = []

        def run(pipeline: Any = pipeline, found: list[gf.Report] = found) -> None:
            found.append(gf.diagnose(bench.model, lambda: bench.batch, steps=4, pipeline=pipeline))

        peak = bench.peak(run)
        took = timer.seconds(start, timer.mark())
        told = [f"{took:.1f} s, {took / plain:.1f} of the plain steps", f"{len(found[0].issues)} issues"]
        told += [f"{peak:.0f} MiB"] if device.type == "cuda" else []
        yield f"{name}, 4 steps", size.name, ", ".join(told)


def tests(paths: Sequence[str], seconds: float) -> Row:
    """Return how the suite's tests that know of a GPU end."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "gpu or cuda",
        "-p",
        "no:cacheprovider",
        *paths,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        return "tests on the device", "suite", f"not over within {seconds:.0f} s"
    lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
    return "tests on the device", "suite", lines[-1].strip("= ")


def measured(
    device: torch.device, sizes: Sequence[Size], *, paths: Sequence[str], seconds: float
) -> Iterator[Row]:
    """Yield the rows of the table; what raises, or comes too late, is a row that says so."""
    end = time.monotonic() + seconds
    jobs: list[tuple[str, Callable[[], Iterator[Row]]]] = []
    for size in sizes:
        jobs += [
            (f"overhead, {size.name}", lambda size=size: overhead(size, device)),
            (f"pipelines, {size.name}", lambda size=size: pipelines(size, device)),
        ]
    if paths:
        jobs.insert(1, ("tests", lambda: iter([tests(paths, min(120.0, end - time.monotonic()))])))
    for name, job in jobs:
        if time.monotonic() > end:
            yield name, "", "left out: no time was left"
            continue
        try:
            for row in job():
                yield row
                if time.monotonic() > end:
                    yield f"the rest of {name}", "", "left out: no time was left"
                    break
        except Exception as error:  # out of memory, say: the rest is measured all the same
            yield name, "", f"{type(error).__name__}: {error}".splitlines()[0][:120]
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=460.0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    rows = []
    found = measured(device, SIZES if on_gpu else TINY, paths=TESTS if on_gpu else (), seconds=args.seconds)
    for row in found:
        rows.append(list(row))
        print(*row, sep=" | ", flush=True)
    name = torch.cuda.get_device_name(device) if on_gpu else "a CPU, with tiny models"
    table = markdown(["", "model", f"{name}, PyTorch {torch.__version__}"], rows)
    print(f"\n{table}")
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        new = f"<!-- gpu -->\n{table}\n<!-- end of gpu -->"
        PAGE.write_text(
            re.sub("<!-- gpu -->.*<!-- end of gpu -->", lambda _: new, page, flags=re.S), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
