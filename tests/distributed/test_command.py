"""The command, started on two processes by a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gradflow.errors import ModelInputError
from gradflow.functional.processes.launched import launched

PLAIN = """
import os, torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, 4, generator=random) for _ in range(3)]
    batches = [(x, (x.sum(1) > 0).long()) for x in inputs]
    rank = int(os.environ["RANK"])
    return model, [tuple(t.chunk(2)[rank] for t in batch) for batch in batches], nn.CrossEntropyLoss()
"""


def test_two_processes_give_one_report(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PLAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "gradflow", "diagnose", "train.py:build", "--json", "report.json"]
    done = subprocess.run(
        [*launcher, *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gradflow: ") == 1
    assert "3 layer calls" in done.stdout
    record = json.loads((tmp_path / "report.json").read_text())["record"]
    assert record["processes"]["ranks"] == [0, 1]
    assert record["layers"][0]["num_elements"] == [64, 64, 64]
    assert record["processes"]["data"]["same"] == []


def test_without_a_launcher_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = SimpleNamespace(quiet=False, json="a", html=None, progress=None, tried=True)
    with launched(options, torch.nn.Linear(1, 1)) as processes:
        assert processes == "auto"
    assert options.json == "a"


def test_fixes_are_not_tried_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    options = SimpleNamespace(quiet=False, json=None, html=None, progress=None, tried=True)
    with (
        pytest.raises(ModelInputError, match="fixes are tried on copies in one process, and 2 were started"),
        launched(options, None),
    ):
        pass
