"""Every block of code on the page on training loops runs, and what it watches is looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gradflow as gf

PAGE = (Path(__file__).parent.parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^(?:##+ (?P<title>[^\n]*)|```python\n(?P<code>.*?)```)$", re.DOTALL | re.MULTILINE)
NEEDS = {
    "Lightning": "lightning", "Hugging Face Trainer": "accelerate", "accelerate": "accelerate",
    "stable-baselines3": "stable_baselines3", "Trackers": "tensorboard",
}  # fmt: skip


def blocks() -> list[tuple[str, str]]:
    """Return the blocks under the title of the section that each stands in, the first ones under ''."""
    found, title = [], ""
    for match in _BLOCK.finditer(PAGE):
        title = match["title"] or title
        if match["code"]:
            found.append((title, match["code"]))
    return found


(_, FIRST), (_, SHARED), *SECTIONS = blocks()


def test_the_page_has_every_loop() -> None:
    assert [title for title, _ in SECTIONS] == [
        "A loop of your own", "Accumulation, clipping, a gradient scaler", "LBFGS, compiled models",
        "Two networks, two optimizers", "Lightning", "Hugging Face Trainer", "accelerate",
        "stable-baselines3",
        "Trackers", "Alerts", "Killed, stopped, resumed",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.filterwarnings("ignore:The `srun` command is available")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("title", "code"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_block_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(SHARED + code, "training.md", "exec"), names)
    watched = [value for value in names.values() if isinstance(value, gf.Monitor)]
    if "callback" in names:
        watched += names["callback"].monitors.values()
    assert watched
    for monitor in watched:
        assert len(monitor.history) >= 4
        assert not any("could not be looked at" in note for note in monitor.history.notes)


def test_blocks_are_short() -> None:
    """Of a monitor's own there are few lines; the rest is the loop that one has."""
    own = re.compile(r"gradflow|Monitor\(|monitor|watch|callback|[Tt]racker|forward_fn")
    for title, code in SECTIONS:
        assert sum(bool(own.search(line)) for line in code.splitlines()) < 10, title
