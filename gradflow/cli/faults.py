"""Exit statuses of the command, and whatever goes wrong as one line that says what, why and where."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from gradflow.errors import GradflowError

# 128 + the number of the signal is what a shell reports of a program that a signal ends.
OK, SICK, FAILED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


class CommandError(Exception):
    """The command cannot go on; its text is the one line that the user sees."""


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever is raised into a `CommandError` of one line that says what failed, why and where."""
    try:
        yield
    except (BrokenPipeError, CommandError):
        raise
    except GradflowError as error:
        raise CommandError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        notes += _hint(error)
        raise CommandError(f"{what}: {type(error).__name__}: {error}{_place(error)}{notes}") from error


def _hint(error: BaseException) -> str:
    """Return what to do about an exit of the user's own parser of arguments."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SystemExit) and any(Path(f.filename).stem == "argparse" for f in frames):
        return "; the file reads arguments: give them behind --, as in `gradflow diagnose FILE.py -- --lr 1`"
    return ""


def _place(error: BaseException) -> str:
    """Return the innermost line of the user's own code that the exception came through, if there is one.

    Without one, it is a line of a library; but of none that is gradflow's, PyTorch's or Python's.
    """
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    for owner in ("user", "library"):
        for frame in frames:
            if _owner(frame.filename) == owner:
                return f" (line {frame.lineno} of {frame.filename})"
    return ""


def _owner(file: str) -> str:
    """Return whose code a file is: the user's, a library's, or such as tells nobody anything."""
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    known = [str(Path(__file__).parent.parent), *([str(Path(torch).parent)] if torch else [])]
    paths = sysconfig.get_paths()
    if file.startswith(("<", *known)):
        return "nobody"
    if file.startswith((paths["purelib"], paths["platlib"])):  # which may lie below Python's own
        return "library"
    return "nobody" if file.startswith(paths["stdlib"]) else "user"
