"""Rewrites the outputs shown in the README and in docs/ by running what they are the outputs of.

    python docs/paste_outputs.py [PAGE ...]

A place for an output is a marker with a fenced block behind it. The marker names a `gradflow` or `python`
command, or the Python block above it:

    <!-- output of: gradflow diagnose examples/dead_relu.py -->
    <!-- output of: the block above -->

or all Python blocks above it, run one after another:

    <!-- output of: the blocks above -->

or, on a page that goes on from block to block, what they print from the last such place to this one:

    <!-- output of: the page so far -->

A block with a title (```python title="net.py") is a file: it is there when the page's code and commands run.
The `gradflow` commands of a page run one after another in one folder, with the examples in it: later ones
read what earlier ones wrote.
A test runs the same and compares, so the pages cannot drift from the code.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ABOVE, ALL_ABOVE, SO_FAR = "the block above", "the blocks above", "the page so far"

_PLACE = re.compile(r"<!-- output of: (?P<what>.*?) -->\n```text\n(?P<output>.*?)```\n", re.DOTALL)
_CODE = re.compile(r"```python\n(?P<code>.*?)```\n", re.DOTALL)
_FILE = re.compile(r'```\w+ title="(?P<name>[^"]+)"\n(?P<text>.*?)```\n', re.DOTALL)
_NEXT = "\x1f"  # printed between the outputs of one run
_COMMANDS = """
from gradflow.cli import main

for arguments in {commands!r}:
    assert main(arguments) in (0, 1), arguments
    print({end!r}, end="")
"""


class Place(NamedTuple):
    """A place for an output: what stands there, and where."""

    output: str
    start: int
    end: int


class Run(NamedTuple):
    """What is run once: the arguments for Python that make the outputs, and their places, in order."""

    arguments: tuple[str, ...]
    places: tuple[Place, ...]


def pages() -> list[str]:
    """Return the pages that have places for outputs, by their paths in the repository."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [p.relative_to(ROOT).as_posix() for p in found if _PLACE.search(p.read_text(encoding="utf-8"))]


def runs(text: str) -> list[Run]:
    """Return what must be run for the places for outputs in a page."""
    found, story, told, place = [], [], [], 0
    commands, answered = [], []
    for match in _PLACE.finditer(text):
        what, here = match["what"], Place(match["output"], match.start("output"), match.end("output"))
        blocks = [code["code"] for code in _CODE.finditer(text[: match.start()])]
        if what == SO_FAR:
            story += [*blocks[place:], f"print({_NEXT!r}, end='')"]
            place = len(blocks)
            told.append(here)
        elif what in (ABOVE, ALL_ABOVE):
            found.append(Run(("-c", blocks[-1] if what == ABOVE else "\n".join(blocks)), (here,)))
        else:
            program, *rest = shlex.split(what)
            if program == "gradflow":
                commands.append(rest)
                answered.append(here)
            else:
                found.append(Run(tuple(rest), (here,)))
    if told:
        found.append(Run(("-c", "\n".join(story)), tuple(told)))
    if commands:
        found.append(Run(("-c", _COMMANDS.format(commands=commands, end=_NEXT)), tuple(answered)))
    return found


def folder_of(text: str, new: Path) -> Path:
    """Return where a page's runs take place: here, or in a new folder, with the files that it has written.

    A page that goes on from block to block, has commands, or has its reader write files, gets a new one.
    """
    own = list(_FILE.finditer(text))
    for match in own:
        (new / match["name"]).write_text(match["text"], encoding="utf-8")
    commands = "<!-- output of: gradflow " in text
    if commands:
        shutil.copytree(ROOT / "examples", new / "examples", dirs_exist_ok=True)
    return new if own or commands or f"<!-- output of: {SO_FAR} -->" in text else ROOT


def outputs(run: Run, printed: str) -> list[str]:
    """Return what a run printed, place by place."""
    return printed.split(_NEXT)[: len(run.places)]


def fresh_output(run: Run, folder: Path = ROOT) -> str:
    """Return what a run prints now, in a folder; raises if it fails."""
    command = [sys.executable, *run.arguments]
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # one thread, as in the tests
    done = subprocess.run(command, cwd=folder, env=ours, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def rewritten(text: str) -> str:
    """Return a page with the outputs of today."""
    made = []
    with tempfile.TemporaryDirectory() as name:
        folder = folder_of(text, Path(name))
        for run in runs(text):
            made += zip(run.places, outputs(run, fresh_output(run, folder)), strict=True)
    for place, output in sorted(made, key=lambda pair: -pair[0].start):
        text = text[: place.start] + output + text[place.end :]
    return text


def main() -> None:
    """Rewrite every page, or those that are named."""
    for page in sys.argv[1:] or pages():
        path = ROOT / page
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
