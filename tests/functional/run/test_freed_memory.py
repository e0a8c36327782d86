"""What steps let go of is kept by the process, and not handed back to the system page by page."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
import gradflow as gf

torch.set_num_threads(1)
if "measured" in sys.argv:
    gf.analyze(torch.nn.Linear(2, 1), [torch.ones(1, 2)], lambda y: y.sum())

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(int(sys.argv[1]))][-1])
"""


def faults_of_block(number: int, *args: str) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(number), *args],
        capture_output=True,
        text=True,
        check=True,
        env=kept,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other bounds")
def test_memory_that_is_free_is_used_again() -> None:
    pages = 10 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults_of_block(2) > pages / 2
    # Where blocks come to lie is a matter of chance: at times what is behind them goes back once more.
    assert min(faults_of_block(4, "measured") for _ in range(3)) < pages / 10
