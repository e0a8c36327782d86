"""A file of builders for the tests of the command, and how these run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradflow.cli import main

FILE = '''
import torch
from torch import nn

def build():
    """A small healthy model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    data = [(torch.randn(32, 8), torch.randint(0, 4, (32,))) for _ in range(8)]
    return model, data, nn.CrossEntropyLoss()

def trained():
    model, data, loss = build()
    return model, data, loss, torch.optim.SGD(model.parameters(), lr=0.25)

def dead():
    model, data, loss = build()
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, -1.0)
    return model, data, loss

def broken():
    return nn.Linear(3, 4), [torch.randn(2, 8)], lambda y: y.sum()

def two():
    return nn.Linear(3, 4), []

def nothing():
    return None

def raises():
    raise OverflowError("too\\nmuch")

def leaves():
    raise SystemExit("bye")

def bad_loss():
    model, data, loss = build()
    return model, data, lambda y, target: 1 / 0

def scheduled():
    model, data, loss, optimizer = trained()
    rates = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1)
    return model, data, loss, optimizer, {"scheduler": rates, "accumulate": 2}

def strange():
    return *trained(), {"clipp": 1}

def sized(width: int = 8, depth=2, *, norm=False, rate=1e-3, name="x", **more):
    print("sized", width, depth, norm, rate, name, more)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])
    return model, [torch.randn(4, width)] * 3, lambda y: y.square().mean()

def needs(width, depth=1):
    return sized(width)

threshold = 3
'''


def write(folder: Path) -> Path:
    """Write the file of builders to a folder, and return its path."""
    path = folder / "net.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return the exit status, standard output and standard error of the command."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # how argparse ends
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]
