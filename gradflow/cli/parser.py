"""The arguments of every command, and their help with examples."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradflow import __version__
from gradflow.cli.building import RETURNS
from gradflow.cli.completing import SHELLS, completes_files, completion_command
from gradflow.cli.diagnosing import PIPELINES, diagnose_command
from gradflow.cli.graphing import NUM_BOTTLENECKS, graph_command
from gradflow.cli.output import FORMATS, SEVERITIES
from gradflow.cli.saved import compare_command, show_command
from gradflow.cli.target import DEFAULT_NAME

DTYPES = ("float32", "float64", "bfloat16", "float16")
_STATUS = (
    "Exit status: 0 done, 1 an issue at or above --fail-on, 2 bad usage, or a file, name or model that\n"
    "cannot be run, 130 interrupted, 141 whoever read the output has closed it."
)
_BUILDER = f"""\
NAME is a function in FILE.py (default: {DEFAULT_NAME}) that returns
{RETURNS}.
The file is run as a program of its own: what stands behind -- is its sys.argv, and what it prints goes to
standard error. What it has under `if __name__ == "__main__"` is not run."""
_NO_OPTIMIZER = """\
Without an optimizer the parameters are held fixed while the batches vary: that judges how the gradient
flows, and not what steps do. With one, copies of the parameters are stepped by a copy of it: that shows the
first steps of your training as well, rates that are too high or too low, and which zeros training itself
ends."""
_DIAGNOSE = """\
examples:
  gradflow diagnose net.py                                       the function build in net.py
  gradflow diagnose net.py:sick --set depth=12 --set act=relu    with arguments: sick(depth=12, act="relu")
  gradflow diagnose package.module:build                         as python -m finds it
  gradflow diagnose train.py --steps 5 -- --data ./mnist         a file that reads arguments of its own
  gradflow diagnose net.py --try --budget 60                     fixes, tried on copies
  gradflow diagnose net.py --html flow.html --json flow.json     the page, and what show and compare read
  gradflow diagnose net.py --format github --fail-on HIGH        a gate of continuous integration
"""
_SHOW = """\
examples:
  gradflow show flow.json                        in short
  gradflow show flow.json --verbose              with all evidence and every issue
  gradflow show flow.json --html flow.html --quiet
  gradflow show flow.json --format markdown >> "$GITHUB_STEP_SUMMARY"
"""
_COMPARE = """\
examples:
  gradflow compare before.json after.json
  gradflow compare main.json branch.json --fail-on HIGH    exit with 1 if the branch has begun one
"""
_GRAPH = """\
examples:
  gradflow graph net.py                                  size, bottlenecks, what is cut off
  gradflow graph net.py --bottlenecks 3
  gradflow graph net.py --from encoder.3 --to encoder.0  bottlenecks between the two
  gradflow graph net.py --path loss encoder.0            what carries most of the gradient there
  gradflow graph net.py --cut loss encoder.0             where least of it can cross, over all paths
  gradflow graph net.py --at layers --export net.dot     without the operations between layers
  gradflow graph flow.json --export net.graphml          of a saved record or report
"""
_COMPLETION = """\
examples:
  eval "$(gradflow completion bash)"                                    in ~/.bashrc; likewise for zsh
  gradflow completion fish > ~/.config/fish/completions/gradflow.fish
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments; `options.run` is what runs the command."""
    parser = argparse.ArgumentParser(
        prog="gradflow",
        description="Tells why a PyTorch model does not train: which layer, of what, and what to change.",
        epilog="gradflow COMMAND --help tells more, with examples.\n" + _STATUS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gradflow {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_diagnose(commands)
    _add_show(commands)
    _add_compare(commands)
    _add_graph(commands)
    completion = _command(
        commands, "completion", "print what makes a shell complete this command", _COMPLETION
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(run=completion_command)
    return parser


def parsed(arguments: Sequence[str], parser: argparse.ArgumentParser) -> Any:
    """Return the options of a command; one that is not known ends the process, with the nearest named."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command: Any = options.parser
        near = difflib.get_close_matches(unknown[0].partition("=")[0], command._option_string_actions, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return options


def _command(commands: Any, name: str, told: str, examples: str, description: str = "") -> Any:
    parser = commands.add_parser(
        name,
        help=told,
        description=f"{told[0].upper()}{told[1:]}.\n\n{description}".strip(),
        epilog=f"{examples}\n{_STATUS}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of what went wrong"
    )
    parser.set_defaults(parser=parser)
    return parser


def _add_diagnose(commands: Any) -> None:
    parser = _command(
        commands,
        "diagnose",
        "run a model on some batches and tell which layer is at fault, and of what",
        _DIAGNOSE,
        f"{_BUILDER}\n\n{_NO_OPTIMIZER}",
    )
    _add_building(parser, "FILE.py[:NAME]", steps=20)
    add = parser.add_argument_group("the run").add_argument
    add(
        "--detail",
        choices=("cheap", "full"),
        default="cheap",
        help="full measures the flow along every edge of the layer graph as well (default: cheap)",
    )
    _add_pipeline(
        add,
        "what the model turns out to need (automatic, the default), the base alone (flow), or also, in full, "
        "what attention, recurrent layers, an actor-critic or number formats show",
    )
    add(
        "--clip", type=_positive_number, metavar="NORM", help="clip gradients to this norm before each update"
    )
    add("--accumulate", type=_positive, metavar="N", help="make an update after every N batches")
    add(
        "--try",
        dest="tried",
        action="store_true",
        help="try fixes for what is found, on copies, and tell what they did",
    )
    add(
        "--budget",
        type=_positive_number,
        metavar="SECONDS",
        help="seconds after which no further fix is tried (default: no limit)",
    )
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show a progress bar on standard error (default: on a terminal)",
    )
    _add_report(parser)
    parser.set_defaults(run=diagnose_command)


def _add_show(commands: Any) -> None:
    parser = _command(
        commands,
        "show",
        "show a saved report, or judge a saved record",
        _SHOW,
        "Reads what --json, report.to_json(), record.to_json() or record.to_npz() wrote.",
    )
    completes_files(
        parser.add_argument("saved", metavar="FLOW.json", help="the file; - is standard input"), "json", "npz"
    )
    _add_pipeline(
        parser.add_argument, "judge by this pipeline, a report anew; the default judges only a record"
    )
    _add_report(parser)
    parser.set_defaults(run=show_command)


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        "tell what changed between two saved records or reports",
        _COMPARE,
        "Verdicts come first, then numbers, the largest change first, then the graph.",
    )
    for name in ("before", "after"):
        completes_files(parser.add_argument(name, metavar=f"{name.upper()}.json"), "json", "npz")
    _add_gate(parser.add_argument, "an issue that has begun")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=compare_command)


def _add_graph(commands: Any) -> None:
    parser = _command(
        commands,
        "graph",
        "ask the layer graph: where the gradient goes, and what stops it",
        _GRAPH,
        f"Of FILE.py the flow on every edge is measured; a saved record has the graph it has.\n{_BUILDER}",
    )
    _add_building(parser, "FILE.py[:NAME] or FLOW.json", steps=1)
    add = parser.add_argument_group(
        "questions (several may be asked; without one, a look at the whole)"
    ).add_argument
    add(
        "--bottlenecks",
        type=_positive,
        nargs="?",
        const=NUM_BOTTLENECKS,
        metavar="K",
        help=f"where the gradient must pass and is throttled, the K worst (default: {NUM_BOTTLENECKS})",
    )
    add("--from", dest="begin", metavar="NODE", help="bottlenecks for the gradient that comes from there")
    add("--to", dest="end", metavar="NODE", help="bottlenecks on its way to there")
    add(
        "--path",
        nargs=2,
        metavar=("FROM", "TO"),
        help="the path that carries most of the gradient, node by node",
    )
    add(
        "--weakest",
        nargs=2,
        metavar=("FROM", "TO"),
        help="the path that carries least of it, of those that carry any",
    )
    add(
        "--cut",
        nargs=2,
        metavar=("FROM", "TO"),
        help="the minimum cut: the edges that all of it must cross, where they carry least together",
    )
    add(
        "--at",
        metavar="LEVEL",
        help="contract first: to `layers`, modules of a depth such as 1, or of a pattern such as 'blocks.*'",
    )
    add(
        "--export",
        type=Path,
        metavar="PATH",
        help="write the graph: .graphml, .dot, or .json (node-link data)",
    )
    parser.set_defaults(run=graph_command)


def _add_building(parser: Any, metavar: str, *, steps: int) -> None:
    endings = ("py", "ipynb", "json", "npz") if ".json" in metavar else ("py", "ipynb")
    completes_files(parser.add_argument("target", metavar=metavar, help="what to run"), *endings)
    parser.usage = f"%(prog)s {metavar.partition(' ')[0]} [options] [-- arguments of the file]"
    add = parser.add_argument_group("the model").add_argument
    add(
        "--set",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=VALUE",
        help="an argument of the function, a Python literal or else a text; may be given again",
    )
    add(
        "--steps",
        type=_positive,
        default=steps,
        metavar="N",
        help=f"batches to run at most (default: {steps})",
    )
    add("--seed", type=int, metavar="N", help="make dropout and the like repeatable")
    add(
        "--mode",
        choices=("train", "eval", "keep"),
        default="train",
        help="of the model; keep leaves each module in its own (default: train)",
    )
    add("--device", metavar="DEVICE", help="put the model there, such as cuda:0; the batches follow")
    add("--dtype", choices=DTYPES, help="convert the model and what is floating-point in the batches")


def _add_report(parser: Any) -> None:
    add = parser.add_argument_group("the report").add_argument
    add(
        "--format",
        choices=FORMATS,
        default="text",
        help="of what is printed: text in at most 25 lines, the whole as JSON, Markdown for a comment on a "
        "pull request, or annotations of GitHub Actions",
    )
    add("--verbose", action="store_true", help="print all evidence and every issue, not what fits a screen")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", type=Path, metavar="PATH", help="write the report as JSON")
    add("--html", type=Path, metavar="PATH", help="write the report as one HTML file")
    _add_gate(add, "an issue")


def _add_gate(add: Any, what: str) -> None:
    add(
        "--fail-on",
        type=str.upper,
        choices=SEVERITIES,
        metavar="SEVERITY",
        help=f"exit with status 1 if {what} is as severe or more: {', '.join(SEVERITIES)}",
    )


def _add_pipeline(add: Any, told: str) -> None:
    add("--pipeline", choices=PIPELINES, help=told)


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _pair(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"\s*(?P<name>\w+)\s*=(?P<value>.*)", text, re.DOTALL)
    if match is None or not match["name"].isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return match["name"], match["value"]
