"""Runs the notebooks in docs/ and stores what their cells show.

    python docs/run_notebooks.py

A test runs them by the same function and compares. Needs nbclient and ipykernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent


def notebooks() -> list[Path]:
    """Return the files of all notebooks."""
    return sorted(DOCS.rglob("*.ipynb"))


def read(file: Path) -> Any:
    """Return a notebook as it is stored."""
    return nbformat.read(file, as_version=4)


def executed(file: Path) -> Any:
    """Return a notebook with the outputs of today; raises if a cell does."""
    notebook = read(file)
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> None:
    """Store the outputs of every notebook."""
    for file in notebooks():
        nbformat.write(executed(file), file)
        print(file.relative_to(DOCS))


if __name__ == "__main__":
    main()
