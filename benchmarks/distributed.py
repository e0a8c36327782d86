"""What an analysis costs on several processes, and what it exchanges between them.

    python benchmarks/distributed.py [--sizes 1,2,4] [--layers 4,8,16,32] [--memory]

Processes are of this machine, with gloo, one thread each; times are those that a process computes
(`time.process_time`), the fastest of some rounds in which both kinds of steps take turns.

With `--memory` it is measured instead how much memory a process takes at most (resident, on Linux) while it
trains a model that is sharded over two, and while it analyses that: with few activations, and with many.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradflow as gf
from gradflow.functional.run.together.merging import merged

WIDTH, SAMPLES, STEPS, ROUNDS = 256, 512, 8, 4
BLOCKS, WIDE = 12, 1024  # of a model with 48 MiB of parameters
LATENCY, BANDWIDTH = 20e-6, 10e9  # of one hop between machines, seconds; bytes a second


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


def model_of(layers: int, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(width) for _ in range(layers)), nn.Linear(width, 10))


def batches_of(rank: int, number: int = STEPS, samples: int = SAMPLES, width: int = WIDTH) -> list[Any]:
    random = torch.Generator().manual_seed(rank)
    return [
        (
            torch.randn(samples, width, generator=random),
            torch.randint(0, 10, (samples,), generator=random),
        )
        for _ in range(number)
    ]


def plain_seconds(model: nn.Module, batches: list[Any]) -> float:
    """Return what a step of training costs, without the optimizer, as the analysis makes none."""
    began = time.process_time()
    for x, y in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
    return (time.process_time() - began) / len(batches)


def measured_seconds(model: nn.Module, batches: list[Any]) -> float:
    began = time.process_time()
    gf.analyze(model, batches, nn.CrossEntropyLoss(), steps=len(batches))
    return (time.process_time() - began) / len(batches)


def process(rank: int, size: int, folder: str, layers: list[int]) -> None:
    """Measure in one process, and have the first write what it found."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    model = DistributedDataParallel(model_of(8))
    batches = batches_of(rank)
    plain, measured = [], []
    for _ in range(ROUNDS):
        plain.append(plain_seconds(model, batches))
        measured.append(measured_seconds(model, batches))
    exchanged = {}
    for number in layers if size > 1 else []:
        record = gf.analyze(
            DistributedDataParallel(model_of(number)), batches_of(rank, 5), nn.CrossEntropyLoss(), steps=5
        )
        assert record.processes is not None
        exchanged[number] = record.processes.exchanged
    if rank == 0:
        torch.save((min(plain), min(measured), exchanged), f"{folder}/found.pt")
    dist.destroy_process_group()


def found(size: int, layers: list[int]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (size, folder, layers), nprocs=size)
        return torch.load(Path(folder) / "found.pt", weights_only=False)


def resident(key: str) -> int:
    """Return a figure of this process's memory in bytes: `VmRSS`, what is resident, or its peak, `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def memory_process(rank: int, size: int, folder: str, kind: str, samples: int) -> None:
    """Have the first process write how much memory one takes at most: what it holds, and what comes on top.

    What is held are slices of parameters and what the optimizer keeps of them.
    """
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    model, mesh = model_of(BLOCKS, WIDE), init_device_mesh("cpu", (size,))
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh)
    batches = batches_of(rank, 3, samples, WIDE)
    moves = "AdamW" in kind
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3) if moves else None

    def train() -> None:
        for x, y in batches:
            nn.functional.cross_entropy(model(x), y).backward()
            if optimizer is not None:
                optimizer.step()
            model.zero_grad()

    def analyse() -> None:
        detail: Any = "full" if "full" in kind else "cheap"
        gf.analyze(model, batches, nn.CrossEntropyLoss(), steps=3, optimizer=optimizer, detail=detail)

    gf.analyze(nn.Linear(2, 2), [torch.ones(2, 2)], lambda y: y.mean(), steps=1, processes="alone")
    train()  # what is made once is there
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    (train if kind.startswith("plain") else analyse)()
    if rank == 0:
        own = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
        torch.save((3 if moves else 1) * own + resident("VmHWM") - before, f"{folder}/found.pt")
    dist.destroy_process_group()


def memory() -> None:
    """Print the peak of a process, in every way of analysing, and how many times that of training it is."""
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # frees at once
    for samples in (64, 1024):
        print(f"{BLOCKS} blocks of width {WIDE} sharded over 2 processes, {samples} samples each: MiB of one")
        plain: dict[bool, float] = {}
        for kind in ("plain", "analyze", "analyze, full", "plain, AdamW", "analyze, AdamW"):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(memory_process, (2, folder, kind, samples), nprocs=2)
                peak = float(torch.load(Path(folder) / "found.pt"))
            times = peak / plain.setdefault("AdamW" in kind, peak)
            print(f"  {kind:15} {peak / 2**20:6.1f}, {times:.2f} times", flush=True)


def joining_seconds(layers: int) -> float:
    """Return what it costs a process to read the record of another, and to join it with its own."""
    record = gf.analyze(model_of(layers), batches_of(0, 5), nn.CrossEntropyLoss(), steps=5)
    parts = pickle.dumps(attrs.evolve(record, layers=(), parameters=(), activations=(), graph_record=None))
    began = time.process_time()
    every = [pickle.loads(parts) for _ in range(64)]
    merged([(r.parts, r.knowledge, r.provenance) for r in every])
    return (time.process_time() - began) / 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1,2,4")
    parser.add_argument("--layers", default="4,8,16,32")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        memory()
        return
    sizes, layers = ([int(n) for n in text.split(",")] for text in (options.sizes, options.layers))
    print(f"a step of 8 blocks of width {WIDTH}, {SAMPLES} samples a process, milliseconds of one process")
    exchanged: dict[int, Any] = {}
    for size in sizes:
        plain, measured, told = found(size, layers)
        print(f"  {size} processes: {1e3 * plain:6.1f} plain, {1e3 * measured:6.1f} measured, ", end="")
        print(f"{measured / plain:.2f} times")
        exchanged[size] = told
    largest = max(sizes)
    print(f"exchanged in a run of 5 steps on {largest} processes, by number of blocks")
    for number, counts in exchanged[largest].items():
        print(
            f"  {number:3} blocks: {counts.gradients} of gradients, {counts.gradient_bytes / 2**20:.1f} MiB; "
            f"{counts.others} others, {counts.other_bytes / 2**10:.0f} KiB, "
            f"of which {counts.gathered_bytes / 2**10:.0f} gathered"
        )
    counts = exchanged[largest][max(layers)]
    processes = 1024
    hops = 2 * math.log2(processes)
    waiting = counts.others * hops * LATENCY
    reduced = counts.other_bytes - counts.gathered_bytes
    sending = (2 * reduced + processes * counts.gathered_bytes) / BANDWIDTH
    joining = processes * joining_seconds(max(layers))
    print(
        f"on paper, {processes} processes and {max(layers)} blocks, {1e6 * LATENCY:.0f} us a hop, "
        f"{BANDWIDTH / 1e9:.0f} GB/s: beside the gradients, {1e3 * waiting:.0f} ms for {counts.others} "
        f"exchanges in {hops:.0f} hops each, {1e3 * sending:.0f} ms to send, {joining:.1f} s to join what is "
        "gathered, once a run"
    )


if __name__ == "__main__":
    main()
