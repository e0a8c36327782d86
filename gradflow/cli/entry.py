"""`main`: the command as a whole, with its exit statuses and what it says where it cannot go on."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

from gradflow.cli.completing import complete
from gradflow.cli.faults import BROKEN_PIPE, FAILED, INTERRUPTED, CommandError
from gradflow.cli.parser import make_parser, parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 sick, 2 failed, 130 interrupted, 141 not read.

    An error is one line on standard error, `--traceback` shows all.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parted = given[:1] in (["diagnose"], ["graph"]) and "--" in given
    end = given.index("--") if parted else len(given)
    parser = make_parser()
    complete(parser)
    options = parsed(given[:end], parser)
    options.arguments, options.owns_process = given[end + 1 :], arguments is None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter shows `?` rather than failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status
    except CommandError as error:
        if options.traceback and error.__cause__ is not None:
            traceback.print_exception(error.__cause__, file=sys.stderr)
        print(f"gradflow: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _silence()
        return BROKEN_PIPE
    except OSError as error:  # a full disk; what else may fail is explained where it does
        _silence()
        print(f"gradflow: error: cannot write what is to be printed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("gradflow: interrupted", file=sys.stderr)
        return INTERRUPTED


def _silence() -> None:
    """Let Python, as it ends, not fail once more over what could not be printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
