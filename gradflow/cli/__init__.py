"""The `gradflow` command: it diagnoses what a file builds, shows and compares what was saved, asks the graph.

From low to high, each importing only from those before it: `faults.py` (exit statuses, and errors as one
line), `target.py` (what is to be run), `program.py` (the user's file run as a program of its own),
`building.py` (what it returns), `output.py` (where a report goes), `diagnosing.py`, `saved.py`, `graphing.py`
and `completing.py` (the commands), `parser.py` (their arguments), `entry.py` (`main`). Nothing here loads
torch before it is needed, so that help, usage errors and completion need not wait for it. May import
everything.
"""

from gradflow.cli.entry import main

__all__ = ["main"]
