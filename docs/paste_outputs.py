"""Rewrites the outputs shown in the README and in docs/ by running what they are the outputs of.

    python docs/paste_outputs.py

A place for an output is a marker with a fenced block behind it. The marker names a `gradflow` or `python`
command, or the Python block above it:

    <!-- output of: gradflow diagnose examples/dead_relu.py -->
    <!-- output of: the block above -->

or all Python blocks above it, run one after another:

    <!-- output of: the blocks above -->

Pages in `SESSIONS` have `gradflow` commands alone, which are run one after another in one folder: later ones
read what earlier ones wrote.

A test runs the same functions and compares, so the pages cannot drift from the code.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "docs/pipelines.md",
    "docs/graph.md",
    "docs/jacobians.md",
    "docs/recurrent.md",
    "docs/policy.md",
    "docs/transformer.md",
    "docs/reach.md",
    "docs/inside.md",
    "docs/precision.md",
    "docs/updates.md",
    "docs/training.md",
    "docs/remedies.md",
    "docs/measurements.md",
)
SESSIONS = ("docs/command.md",)
_SESSION = """
import contextlib, io, json, sys
from gradflow.cli import main
outputs = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments)
    outputs.append(out.getvalue())
print(json.dumps(outputs))
"""
ABOVE, ALL_ABOVE = "the block above", "the blocks above"

_PLACE = re.compile(r"<!-- output of: (?P<what>.*?) -->\n```text\n(?P<output>.*?)```\n", re.DOTALL)
_CODE = re.compile(r"```python\n(?P<code>.*?)```\n", re.DOTALL)


class Place(NamedTuple):
    """A place for an output: the arguments for Python that make it, what stands there, and where."""

    arguments: tuple[str, ...]
    output: str
    start: int
    end: int


def places(text: str) -> list[Place]:
    """Return the places for outputs in a page."""
    found = []
    for match in _PLACE.finditer(text):
        what = match["what"]
        blocks = [code["code"] for code in _CODE.finditer(text[: match.start()])]
        if what in (ABOVE, ALL_ABOVE):
            arguments = ("-c", blocks[-1] if what == ABOVE else "\n".join(blocks))
        else:
            program, *rest = shlex.split(what)
            arguments = ({"gradflow": ("-m", "gradflow"), "python": ()}[program]) + tuple(rest)
        found.append(Place(arguments, match["output"], match.start("output"), match.end("output")))
    return found


def fresh_output(place: Place) -> str:
    """Return what the command prints now; raises if it fails."""
    command = [sys.executable, *place.arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def session_outputs(found: Sequence[Place]) -> list[str]:
    """Return what the commands of a page print now, run in their order in a folder with the examples."""
    commands = json.dumps([place.arguments[2:] for place in found])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples", Path(folder) / "examples")
        done = subprocess.run(
            [sys.executable, "-c", _SESSION, commands],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def main() -> None:
    """Rewrite every page."""
    for page in PAGES + SESSIONS:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        found = places(text)
        outputs = session_outputs(found) if page in SESSIONS else list(map(fresh_output, found))
        for place, output in reversed(list(zip(found, outputs, strict=True))):
            text = text[: place.start] + output + text[place.end :]
        path.write_text(text, encoding="utf-8")
        print(f"{page}: {len(places(text))} outputs")


if __name__ == "__main__":
    main()
