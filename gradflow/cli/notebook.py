"""Notebooks: their code cells, run one after another as one module."""

from __future__ import annotations

import ast
import json
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradflow.cli.faults import CommandError

# `%%time` and its like run the cell that they head; other cell magics make something else of it.
_TRANSPARENT = ("time", "timeit", "capture", "prun")
_MAGIC = re.compile(r"(?P<indent>\s*)(?:[%!?]|\w[\w.]*\?+\s*$|\w+\s*=\s*[%!])")


def run_notebook(file: Path, module: Any) -> None:
    """Run a notebook's code cells in a module; lines that are IPython's own, such as `%pip`, are left out.

    Each cell is compiled under a name of its own, which is what errors tell.

    Raises:
        CommandError: if the file is no notebook of Python.
        Exception: what a cell raises.
    """
    for number, source in _cells(file):
        name = f"{file}, cell {number}"
        code = _python(source)
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        exec(compile(code, name, "exec"), module.__dict__)


def _cells(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the place among all cells, from 1, and the source of every code cell."""
    try:
        data = json.loads(file.read_bytes())
        language = data.get("metadata", {}).get("kernelspec", {}).get("language", "python")
        cells = [(cell["cell_type"], cell["source"]) for cell in data["cells"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(
            f"{file} is no notebook of the format 4: {type(error).__name__}: {error}"
        ) from error
    if language != "python":
        raise CommandError(f"{file} is a notebook of {language}, not of Python")
    for number, (kind, source) in enumerate(cells, start=1):
        if kind == "code":
            yield number, source if isinstance(source, str) else "".join(source)


def _python(source: str) -> str:
    """Return a cell as Python, with as many lines as it has."""
    try:
        ast.parse(source)
    except SyntaxError:
        pass
    else:
        return source
    lines = source.splitlines(keepends=True)
    first = next((line for line in lines if line.strip()), "")
    if first.startswith("%%") and first[2:].split()[:1] not in [[name] for name in _TRANSPARENT]:
        return "\n" * len(lines)
    return "".join(_left_out(line) for line in lines)


def _left_out(line: str) -> str:
    match = _MAGIC.match(line)
    return line if match is None else f"{match['indent']}pass\n"
