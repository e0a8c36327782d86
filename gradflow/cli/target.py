"""What is to be run: a file, a notebook or a module, and the name of a function in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from gradflow.cli.faults import CommandError

DEFAULT_NAME = "build"
FORMS = "FILE.py, NOTEBOOK.ipynb or package.module, with :NAME behind it or without"
_FILE = re.compile(r"(?P<place>.*\.(?:py|ipynb))(?::(?P<name>.*))?", re.DOTALL)
_MODULE = re.compile(r"(?P<place>[^:/\\]+)(?::(?P<name>.*))?", re.DOTALL)


class Target(NamedTuple):
    """A function to be called, and where it is.

    Args:
        name: of the function.
        file: the file or notebook; None for a module.
        module: the module's name; "" for a file.
    """

    name: str
    file: Path | None = None
    module: str = ""

    @property
    def place(self) -> str:
        """The file or module, as the user named it."""
        return str(self.file) if self.file is not None else self.module

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"


def split_target(text: str) -> Target:
    """Return what `FILE.py[:NAME]` or `package.module[:NAME]` means; a drive's colon is part of the file.

    Raises:
        CommandError: if there is no such file, or it is not of this form.
    """
    match = _FILE.fullmatch(text)
    if match is not None and (name := _name(match["name"])):
        file = Path(match["place"])
        if not file.is_file():
            raise CommandError(f"there is no file {str(file)!r}")
        return Target(name, file=file)
    match = None if match is not None else _MODULE.fullmatch(text)
    if match is not None and (name := _name(match["name"])) and _is_dotted(match["place"]):
        return Target(name, module=match["place"])
    raise CommandError(f"expected {FORMS}, got {text!r}")


def _name(text: str | None) -> str:
    """Return the name of the function; "" for what cannot be one."""
    if text is None:
        return DEFAULT_NAME
    return text if text.isidentifier() else ""


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
