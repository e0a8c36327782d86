"""The README: its two commands are what it says they are, its code runs, its links lead somewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Return the lines of the README that set up an environment."""
    return [line for line in README.splitlines() if "venv .venv &&" in line]


def test_two_commands_do_all_the_set_up() -> None:
    job, tests = commands()
    assert job.endswith("'.[examples]' && .venv/bin/gradflow diagnose --try examples/vanishing_sigmoid.py")
    assert tests.endswith("-e '.[dev]' && .venv/bin/python -m pytest -n auto --dist loadfile")
    for command in (job, tests):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
        assert README.count(f"```sh\n{command}\n```\n") == 1


def test_the_check_runs_the_readme_s_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    pattern = re.search(r'grep -m 1 -e "(.*?)" README\.md', script.read_text(encoding="utf-8"))
    assert pattern is not None
    matching = [line for line in README.splitlines() if re.search(pattern[1].replace("'.", r"'\."), line)]
    assert matching == [commands()[1]]


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = nn.Module()
    model.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model.forward = lambda x: model.layers(x)  # type: ignore[method-assign]
    names = {
        "model": model,
        "batches": lambda: (torch.randn(16, 8), torch.randint(0, 4, (16,))),
        "loss_fn": nn.CrossEntropyLoss(),
    }
    exec(code, names)
    assert (tmp_path / "flow.html").stat().st_size > 1000
    assert (tmp_path / "flow.json").stat().st_size > 1000


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) >= 4
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_issue_type_and_severity_is_told() -> None:
    import gradflow as gf

    for member in (*gf.IssueType, *gf.IssueSeverity):
        assert f"`{member.value}`" in README
