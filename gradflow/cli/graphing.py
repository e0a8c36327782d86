"""`gradflow graph`: questions to the layer graph of what a file builds, or of a saved record."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradflow.cli.building import built
from gradflow.cli.faults import CommandError, explained
from gradflow.cli.output import check_writable
from gradflow.cli.program import own_output, program
from gradflow.cli.saved import saved
from gradflow.cli.target import split_target

if TYPE_CHECKING:  # importing it for real imports numpy
    from gradflow.graph import LayerGraph

ENDINGS = (".graphml", ".dot", ".json")
NUM_BOTTLENECKS = 5


def graph_command(options: Any) -> int:
    """Run the command and return its exit status."""
    (export,) = check_writable(options.export)
    if export is not None and export.suffix not in ENDINGS:
        raise CommandError(
            f"cannot export to {options.export}: expected a name that ends in {', '.join(ENDINGS)}"
        )
    with own_output(for_good=options.owns_process) as out:
        graph = _graph(options)
        with explained("cannot answer that"):
            text = _answers(_at(graph, options.at), options, export)
        out.write(f"{text}\n")
        out.flush()
    return 0


def _graph(options: Any) -> LayerGraph:
    if options.target == "-" or options.target.endswith((".json", ".npz")):
        found = saved(options.target)
        with explained(f"{options.target} has no layer graph"):
            return getattr(found, "record", found).graph
    target = split_target(options.target)
    from gradflow.functional.analyze import analyze

    with program(target, options.arguments) as module:
        given = built(module, target, options)
        with explained(f"the graph of {target}() cannot be measured"):
            return analyze(
                given.model, given.batches, given.loss_fn,
                steps=options.steps, seed=options.seed, mode=options.mode, detail="full",
            ).graph  # fmt: skip


def _at(graph: LayerGraph, level: str | None) -> LayerGraph:
    """Return the graph at the level asked for: layers alone, modules to a depth, or those of a pattern."""
    if level is None:
        return graph
    if level == "layers":
        return graph.layers()
    return graph.at(depth=int(level)) if level.isdecimal() else graph.at(level)


def _answers(graph: LayerGraph, options: Any, export: Path | None) -> str:
    """Return in words what was asked; without a question, what the graph shows at a glance."""
    from gradflow.report.text.graph import bottlenecks_text, cut_text, graph_text, path_text

    told = []
    if options.bottlenecks or options.begin is not None or options.end is not None:
        most = options.bottlenecks or NUM_BOTTLENECKS
        told.append(bottlenecks_text(graph.bottlenecks(most, source=options.begin, target=options.end)))
    if options.path is not None:
        told.append(path_text(graph.path(*options.path)))
    if options.weakest is not None:
        told.append(f"Weakest path {path_text(graph.weakest_path(*options.weakest))}")
    if options.cut is not None:
        told.append(cut_text(graph.minimum_cut(*options.cut)))
    if export is not None:
        _export(graph, export)
        told.append(f"{graph!r} written to {options.export}")
    return "\n\n".join(told or [graph_text(graph)])


def _export(graph: LayerGraph, path: Path) -> None:
    if path.suffix == ".graphml":
        graph.to_graphml(path)
        return
    is_dot = path.suffix == ".dot"
    text = graph.to_dot() if is_dot else json.dumps(graph.to_node_link(), allow_nan=False)
    with contextlib.closing(path.open("w", encoding="utf-8")) as file:
        file.write(text + "\n")
