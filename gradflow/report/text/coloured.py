"""A report's text on a terminal: the same letters, in colours, where `rich` is installed."""

from __future__ import annotations

import importlib.util
from typing import TextIO

_STYLES = {
    r"^gradflow: .*": "bold",
    r"^gradflow: no illness found.*": "bold green",
    r"\[CRITICAL\]|^CRITICAL(?=:)": "bold red",
    r"\[HIGH\]|^HIGH(?=:)": "bold dark_orange3",
    r"\[MEDIUM\]|^MEDIUM(?=:)": "bold yellow",
    r"\[(LOW|INFO)\]|^(LOW|INFO)(?=:)": "bold blue",
    r"\[(cures|helps)\]": "bold green",
    r"^   (Cause|Measured|Change|Tried|Explains)\b": "cyan",
    r"^  (Description|Magnitude|Recommended Actions|Cause|Evidence|Explains|Confidence|Tried):": "cyan",
}


def write_text(text: str, stream: TextIO) -> None:
    """Write a text and a line's end to a stream: coloured on a terminal, elsewhere as it is.

    What `rich` respects is respected: NO_COLOR, FORCE_COLOR, TERM.
    """
    if importlib.util.find_spec("rich") is not None and stream.isatty():
        from rich.console import Console
        from rich.text import Text

        coloured = Text(text)
        for pattern, style in _STYLES.items():
            coloured.highlight_regex(f"(?m){pattern}", style)
        Console(file=stream, soft_wrap=True, highlight=False).print(coloured)
    else:
        stream.write(f"{text}\n")
