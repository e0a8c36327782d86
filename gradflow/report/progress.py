"""A progress bar for a notebook, or a terminal: with `rich` where it is installed, else plain text."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from html import escape
from typing import TextIO

Progress = Callable[[int, int], None]


@contextlib.contextmanager
def progress_bar(stream: TextIO | None = None, *, label: str = "measuring") -> Iterator[Progress]:
    """Show a bar while the block runs; yields the function that moves it, for any `progress=`.

    Args:
        stream: where to draw. On a terminal the bar is drawn by `rich`, if that is installed, and is gone
            when the block ends; anywhere else it is one line of text that is drawn over. None is a bar of
            the notebook's own in a notebook, and standard error elsewhere.
        label: what the bar says is going on.

    Yields:
        `move(step, total)`: draw that `step` of `total` steps are done.

    >>> import io, torch, gradflow as gf
    >>> model, batches = torch.nn.Linear(2, 1), [torch.ones(3, 2)] * 4
    >>> with progress_bar(io.StringIO()) as progress:
    ...     report = gf.diagnose(model, batches, lambda y: y.mean(), steps=4, progress=progress)
    """
    drawn_on: TextIO = sys.stderr if stream is None else stream
    if stream is None and _in_a_notebook():
        bar = _notebook_bar(label)
    elif drawn_on.isatty() and importlib.util.find_spec("rich") is not None:
        bar = _rich_bar(drawn_on, label)
    else:
        bar = _plain_bar(drawn_on, label)
    with bar as move:
        yield move


def _in_a_notebook() -> bool:
    """Whether this process is the kernel of a notebook, and not a terminal's Python or IPython."""
    ipython = sys.modules.get("IPython")  # a kernel has it imported
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


@contextlib.contextmanager
def _notebook_bar(label: str) -> Iterator[Progress]:
    from IPython.display import HTML, display

    shown = None

    def move(step: int, total: int) -> None:
        nonlocal shown
        bar = HTML(f'{escape(label)} <progress value="{step}" max="{total}"></progress> {step}/{total}')
        if shown is None:
            shown = display(bar, display_id=True)
        else:
            shown.update(bar)

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
