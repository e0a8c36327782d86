"""What compiling the step with its probes in would gain, against the same step as it is.

    python benchmarks/compiled.py [--only mlp gpt] [--steps 40] [--write]

Plain steps, steps with a probe behind every layer and a sum over every gradient, and the same two compiled by
`torch.compile`, step by step in turn, in processor time of one thread. Probes are in the graph that is
compiled: a custom autograd function that gives the sum of squares of the gradient. *First call* is what
compiling takes, on a clock.
`--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu import GPT, Size
from overhead import markdown
from torch import Tensor, nn
from workloads import Workload, build

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
SMALL = Size("small", 256, 6, 4, 5000, (2, 128))
KINDS = ("plain", "probed", "plain, compiled", "probed, compiled")


class Probe(torch.autograd.Function):
    """The identity; the gradient of its slot is the sum of squares of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (g,) = grad_outputs
        flat = g.reshape(-1)
        return g, torch.dot(flat, flat)


def workload(name: str) -> Workload:
    """Return a workload, the same every time."""
    if name != "gpt":
        return build(name)
    torch.manual_seed(0)
    return Workload(GPT(SMALL), torch.randint(0, SMALL.vocabulary, SMALL.batch), lambda loss: loss)


def probed(model: nn.Module) -> list[Tensor]:
    """Put a probe behind every layer for good, and return the slots."""
    slots: list[Tensor] = []
    for module in model.modules():
        if next(module.children(), None) is None:
            slots.append(torch.zeros((), requires_grad=True))

            def forward(*args: Any, _plain: Any = module.forward, _slot: Tensor = slots[-1]) -> Any:
                return Probe.apply(_plain(*args), _slot)

            module.forward = forward
    return slots


def stepping(name: str, kind: str) -> Callable[[], Any]:
    """Return a step of one kind."""
    work = workload(name)
    slots = probed(work.model) if kind.startswith("probed") else []
    leaves = [*work.model.parameters(), *slots]
    loss: Callable[[], Tensor] = torch.compile(work.loss) if kind.endswith("compiled") else work.loss

    def step() -> Any:
        found = torch.autograd.grad(loss(), leaves, allow_unused=True)  # a module may be read, not called
        flat = [g.reshape(-1) for g in found[: len(leaves) - len(slots)]] if slots else []
        return [torch.dot(g, g) for g in flat], found[len(leaves) - len(slots) :]

    return step


def row(name: str, steps: int) -> list[str]:
    """Return the costs of every kind of step over the plain one, and how long the first calls take."""
    runs: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}
    for kind in KINDS:
        start = time.perf_counter()
        runs[kind] = stepping(name, kind)
        runs[kind]()
        first[kind] = time.perf_counter() - start
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(steps):
        for kind, step in runs.items():
            start = time.thread_time()
            step()
            took[kind].append(time.thread_time() - start)
    ratios = [statistics.median(a / b for a, b in zip(took[k], took["plain"], strict=True)) for k in KINDS]
    plain = statistics.median(took["plain"])
    return [
        name,
        f"{plain * 1e3:.1f}",
        *(f"{r:.2f}" for r in ratios[1:]),
        *(f"{first[k]:.0f}" for k in KINDS[2:]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["mlp", "gpt"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["", "plain step, ms", *KINDS[1:], *(f"{kind}: first call, s" for kind in KINDS[2:])]
    table = markdown(heads, [row(name, args.steps) for name in args.only])
    print(table)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        new = f"<!-- compiled -->\n{table}\n<!-- end of compiled -->"
        page = re.sub("<!-- compiled -->.*<!-- end of compiled -->", lambda _: new, page, flags=re.S)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
