"""Shell completion, by argcomplete where that is installed."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from typing import Any

from gradflow.cli.faults import CommandError

SHELLS = ("bash", "zsh", "fish")


def completion_command(options: Any) -> int:
    """Print what makes a shell complete the command."""
    if importlib.util.find_spec("argcomplete") is None:
        raise CommandError("completion needs argcomplete: pip install 'gradient-flow[completion]'")
    from argcomplete.shell_integration import shellcode

    sys.stdout.write(shellcode(["gradflow"], shell=options.shell) + "\n")
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks what may come next, and end the process; else do nothing."""
    if _is_asked():
        import argcomplete

        argcomplete.autocomplete(parser)


def completes_files(action: argparse.Action, *endings: str) -> None:
    """Let an argument complete to files of these endings."""
    if _is_asked():
        from argcomplete.completers import FilesCompleter

        vars(action)["completer"] = FilesCompleter(endings)


def _is_asked() -> bool:
    return "_ARGCOMPLETE" in os.environ and importlib.util.find_spec("argcomplete") is not None
