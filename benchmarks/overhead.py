"""Cost of a step of gradflow over a plain forward, loss and backward pass, side by side in one run.

    python benchmarks/overhead.py [--pairs 15] [--threads 1 2] [--only NAME]

For each workload the variants run in turn, step by step in one process, and the median of each is divided by
the median of the plain step. `cheap` is the default of `diagnose`, `full` measures the flow on every edge,
`vjp` takes the reverse pass by `torch.func.vjp`, and `hooks` is a monitor written by hand: a full backward
hook on every layer that reads a norm with `.item()`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf

Workload = tuple[nn.Module, Any, Callable[[Any], Tensor]]


def classification(num_classes: int, rows: int) -> Callable[[Tensor], Tensor]:
    target = torch.randint(0, num_classes, (rows,))
    return lambda output: F.cross_entropy(output.reshape(-1, num_classes), target)


def mlp() -> Workload:
    widths = [784, 512, 512, 512, 10]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(64, 784), classification(10, 64)


class Block(nn.Module):
    """A basic block of ResNet (He et al., 2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            self.skip = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.skip(x))


def resnet18() -> Workload:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    inner = 64
    for outer, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inner, outer, stride), Block(outer, outer, 1)]
        inner = outer
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(16, 3, 32, 32), classification(10, 16)


def encoder() -> Workload:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Linear(256, 10))
    return model, torch.randn(8, 64, 256), classification(10, 512)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(64, 256, 2, batch_first=True), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def lstm() -> Workload:
    return Tagger(), torch.randn(16, 64, 64), classification(10, 1024)


def gpt2() -> Workload:
    from transformers import GPT2Config, GPT2LMHeadModel  # type: ignore[import-not-found]

    tokens = torch.randint(0, 50257, (1, 256))
    return GPT2LMHeadModel(GPT2Config()), {"input_ids": tokens, "labels": tokens}, lambda output: output.loss


WORKLOADS = {"mlp": mlp, "resnet18": resnet18, "encoder": encoder, "lstm": lstm, "gpt2": gpt2}


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def plain(work: Workload) -> Iterator[None]:
    model, batch, loss_fn = work
    while True:
        model.zero_grad()
        loss_fn(call(model, batch)).backward()
        yield


def hooks(work: Workload) -> Iterator[None]:
    model, batch, loss_fn = work
    norms: dict[str, float] = {}
    while True:
        handles = [
            module.register_full_backward_hook(
                lambda m, gi, go, n=name: norms.__setitem__(
                    n, go[0].norm().item() if go[0] is not None else 0.0
                )
            )
            for name, module in model.named_modules()
            if not any(True for _ in module.children())
        ]
        model.zero_grad()
        loss_fn(call(model, batch)).backward()
        for handle in handles:
            handle.remove()
        yield


def seconds_per_step(work: Workload, steps: int, **options: Any) -> list[float]:
    """Return the seconds of each step of a run but the first, which also takes the graph."""
    model, batch, loss_fn = work
    marks = [time.perf_counter()]
    gf.analyze(
        model,
        lambda: batch,
        loss_fn,
        steps=steps + 1,
        progress=lambda *_: marks.append(time.perf_counter()),
        **options,
    )
    return [b - a for a, b in itertools.pairwise(marks)][1:]


def measure(work: Workload, pairs: int) -> dict[str, float]:
    """Return the median seconds per step of every variant."""
    times: dict[str, list[float]] = {name: [] for name in ("plain", "hooks", "cheap", "full", "vjp")}
    steppers = {"plain": plain(work), "hooks": hooks(work)}
    chunk = 5
    for _ in range(-(-pairs // chunk)):
        for name, stepper in steppers.items():
            for _ in range(chunk):
                start = time.perf_counter()
                next(stepper)
                times[name].append(time.perf_counter() - start)
        work[0].zero_grad()
        times["cheap"] += seconds_per_step(work, chunk)
        times["full"] += seconds_per_step(work, chunk, detail="full")
        times["vjp"] += seconds_per_step(work, chunk, transform="vjp")
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", choices=WORKLOADS)
    args = parser.parse_args()
    print(f"{'workload':10} {'threads':>7} {'plain ms':>9} {'hooks':>6} {'cheap':>6} {'full':>6} {'vjp':>6}")
    for name, make in WORKLOADS.items():
        if args.only not in (None, name):
            continue
        for threads in args.threads:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            try:
                work = make()
            except ImportError as error:
                print(f"{name:10} skipped: {error}")
                break
            found = measure(work, args.pairs)
            ratios = " ".join(f"{found[k] / found['plain']:6.2f}" for k in ("hooks", "cheap", "full", "vjp"))
            print(f"{name:10} {threads:7} {found['plain'] * 1e3:9.2f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
