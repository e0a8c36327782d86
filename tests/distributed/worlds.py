"""Runs scenarios on several processes at once: one fork server, which has imported torch, for all of them."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "gradflow.diagnosis", "tests.distributed.scenarios", "tests.distributed.sharded"]
)


def _main(rank: int, size: int, folder: str, module: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    scenarios = sys.modules.get(module) or __import__(module, fromlist=["x"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", _port(folder, rank), size, is_master=rank == 0
    )
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    for name in names:
        try:
            found: Any = ("done", getattr(scenarios, name)(rank, size))
        except Exception as error:
            found = ("raised", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        Path(folder, f"{name}.{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def _port(folder: str, rank: int) -> int:
    """Return a free port, which the first process chooses."""
    file = Path(folder, "port")
    if rank == 0:
        import socket

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        Path(folder, "port.new").write_text(str(port))
        Path(folder, "port.new").rename(file)
    while not file.exists():
        pass
    return int(file.read_text())


@attrs.frozen
class World:
    """Processes that run scenarios, one after the other.

    Args:
        size: how many there are.
        folder: an empty one, for what they give.
        processes: they themselves.
    """

    size: int
    folder: Path
    processes: list[Any]

    @classmethod
    def started(
        cls, size: int, names: Iterable[str], folder: Path, module: str = "tests.distributed.scenarios"
    ) -> World:
        """Start processes on scenarios of a module."""
        processes = [
            _CONTEXT.Process(target=_main, args=(rank, size, str(folder), module, tuple(names)))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        return cls(size, folder, processes)

    def joined(self) -> World:
        """Wait until they have ended."""
        for process in self.processes:
            process.join(120)
            process.kill()
        return self

    def result(self, name: str, rank: int) -> Any:
        """Return what a scenario gave on one process."""
        file = self.folder / f"{name}.{rank}"
        assert file.exists(), f"process {rank} did not come to {name}"
        how, value = pickle.loads(file.read_bytes())
        assert how == "done", value
        return value

    def results(self, name: str) -> list[Any]:
        """Return what a scenario gave on all of them, by rank."""
        return [self.result(name, rank) for rank in range(self.size)]
