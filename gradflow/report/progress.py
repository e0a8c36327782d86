"""A progress bar for a terminal: with `rich` where it is installed, else plain text."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import TextIO

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def progress_bar(stream: TextIO, *, label: str = "measuring") -> Iterator[Progress]:
    """Show a bar on `stream` while the block runs; yields the function that moves it.

    Args:
        stream: where to draw. On a terminal the bar is drawn by `rich`, if that is installed, and is gone
            when the block ends; anywhere else it is one line of text that is drawn over.
        label: what the bar says is going on.

    Yields:
        `move(step, total)`: draw that `step` of `total` steps are done.
    """
    rich_bar = stream.isatty() and importlib.util.find_spec("rich") is not None
    with _rich_bar(stream, label) if rich_bar else _plain_bar(stream, label) as move:
        yield move


@contextlib.contextmanager
def _rich_bar(stream: TextIO, label: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda step, total: bar.update(task, completed=step, total=total)


@contextlib.contextmanager
def _plain_bar(stream: TextIO, label: str, width: int = 30) -> Iterator[Progress]:
    drawn = False

    def move(step: int, total: int) -> None:
        nonlocal drawn
        drawn = True
        full = width * step // max(total, 1)
        stream.write(f"\r{label} [{'#' * full}{'.' * (width - full)}] {step}/{total}")
        stream.flush()

    try:
        yield move
    finally:
        if drawn:
            stream.write("\n")
