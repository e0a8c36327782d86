"""The layout: data runs one way, so imports do too; and what needs no torch does not load it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parent.parent / "gradflow"

# Each part may import from itself and from those above it.
ORDER = [
    {"errors", "records"},
    {"functional"},
    {"graph"},
    {"detect"},
    {"pipelines"},
    {"report"},
    {"diagnosis", "results"},
    {"remedies"},
    {"watching", "comparing"},
    {"integrations"},
    {"analyzers"},
    {"cli"},
    {"__init__", "__main__"},
]
# The rooms of a part, likewise: each may import from itself and from those in the sets above its own. Files
# that stand beside the rooms have a rank too; those not named come last.
ROOMS: dict[str, list[set[str]]] = {
    "functional": [
        {"torch_private", "torch_sharded", "torch_pipelining"},
        {"processes"},
        {"model"},
        {"tap"},
        {"reverse"},
        {"measurement"},
        {"extras"},
        {"reach", "updates"},
        {"run", "jacobian", "attention", "recurrent", "policy", "parts", "precision"},
        {"inside"},
        {"analyze", "outline", "scale", "weights"},
        {"__init__"},
    ],
    "graph": [
        {"table"},
        {"flow"},
        {"algebra"},
        {"data"},
        {"values", "coarse"},
        {"queries", "export", "readers"},
        {"layer_graph"},
        {"__init__"},
    ],
    "cli": [
        {"faults"},
        {"target", "notebook", "output", "completing"},
        {"program", "building"},
        {"saved"},
        {"diagnosing", "graphing"},
        {"parser"},
        {"entry"},
        {"__init__"},
    ],
    "remedies": [
        {"remedy"},
        {"surgery"},
        {"kinds"},
        {"choosing"},
        {"trials"},
        {"__init__"},
    ],
    "report": [
        {"wording"},
        {"svg", "progress", "layout", "series"},
        {"text", "html", "plots"},
        {"report"},
        {"notebook"},
        {"__init__"},
    ],
    "detect": [
        {"wiring"},
        {"view"},
        {"evidence"},
        {"knowledge"},
        {"actions"},
        {"squashed"},
        {"reach", "updates"},
        {"flow", "causes"},
        {"attention", "recurrent", "policy", "parts", "precision", "time", "processes"},
        {"defaults"},
        {"compose"},
        {"__init__"},
    ],
}
# Methods that are there for convenience, `record.graph`, `record.compare` and `graph.draw`; and the one by
# which notebooks ask an object how it looks.
EXCEPTIONS = {
    ("records/flow.py", "FlowRecord.graph", "gradflow.graph"),
    ("records/flow.py", "FlowRecord.compare", "gradflow.comparing"),
    ("graph/layer_graph.py", "LayerGraph.draw", "gradflow.report.plots"),
    ("records/showing.py", "Shown._repr_html_", "gradflow.report.notebook"),
}
# Type hints alone, within a room: a listener is handed the recorder that tells it, which has a list of them;
# figures are drawn of reports, which draw themselves.
HINTS = {
    ("functional/tap/asked.py", "gradflow.functional.tap.recorder"),
    ("functional/tap/tapped.py", "gradflow.functional.tap.recorder"),
    ("report/plots/canvas.py", "gradflow.report.report"),
}


def rank(part: str) -> int:
    return next(i for i, parts in enumerate(ORDER) if part in parts)


def part_of(module: str) -> str:
    """Return the part that a module of ours belongs to: `gradflow.detect.flow.dead` → `detect`."""
    return [*module.split("."), "__init__"][1]


def name_of(path: Path) -> str:
    """Return the dotted name of a file of ours; a package's `__init__` has the package's."""
    parts = ("gradflow", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {name_of(path) for path in FILES}


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (where in the file, module of ours) for every import, deferred ones included, but for those
    under TYPE_CHECKING, which do not run."""

    def visit(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from visit(child, where)
            return
        if isinstance(node, ast.Import):
            yield from ((where, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["gradflow", *path.relative_to(PACKAGE).parent.parts]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{module}.{alias.name}" for alias in node.names}
            if module == "gradflow" or inner - MODULES:
                yield where, module
            yield from ((where, name) for name in sorted(inner & MODULES) if module != "gradflow")
            if module == "gradflow":  # `from gradflow import graph` imports a part by its name
                yield from ((where, f"gradflow.{alias.name}") for alias in node.names)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            where = f"{where}.{node.name}".lstrip(".")
        for child in ast.iter_child_nodes(node):
            yield from visit(child, where)

    for where, module in visit(ast.parse(path.read_text(encoding="utf-8")), ""):
        if module.split(".")[0] == "gradflow":
            yield where, module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    name = path.relative_to(PACKAGE)
    own = rank(name.parts[0].removesuffix(".py"))
    for where, module in imports_of(path):
        if (str(name), where, module) in EXCEPTIONS:
            continue
        if module == "gradflow":  # the package itself: only its version and such, from the very top
            assert own >= rank("cli"), f"{name} imports the package itself"
            continue
        if part_of(module) == "__version__":
            continue
        assert rank(part_of(module)) <= own, f"{name} ({where or 'top'}) imports {module}, which is below it"


IN_ROOMS = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in ROOMS]


@pytest.mark.parametrize("path", IN_ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_from_those_above_them(path: Path) -> None:
    part, room, *_ = (name.removesuffix(".py") for name in path.relative_to(PACKAGE).parts)
    order = ROOMS[part]
    own = next((i for i, rooms in enumerate(order) if room in rooms), None)
    assert own is not None, f"{part}/{room} has no place in ROOMS"
    for where, module in imports_of(path):
        _, found, *inner = [*module.split("."), ""]
        if found != part or inner[0] == room:
            continue
        other = next((i for i, rooms in enumerate(order) if inner[0] in rooms), len(order))
        assert other < own, f"{part}/{room} ({where or 'top'}) imports {module}, which is not above it"


@pytest.mark.parametrize("part", ROOMS)
def test_every_room_says_what_it_may_import_and_has_a_dozen_files_at_most(part: str) -> None:
    folders = [folder for folder in (PACKAGE / part).iterdir() if (folder / "__init__.py").exists()]
    assert {folder.name for folder in folders} <= set().union(*ROOMS[part])
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert text is not None, f"{folder.name} does not say what it is for"
        assert "May import" in text, f"{folder.name} does not say what it may import"
        files = [file for file in folder.glob("*.py") if file.stem != "__init__"]
        assert len(files) <= 12, f"{folder.name} has {len(files)} files"


def import_graph() -> nx.DiGraph:
    """Return who imports whom, file by file, without the exceptions.

    Importing a package runs what its `__init__` imports; a package above the file itself does not count, as
    it is being imported already.
    """
    graph = nx.DiGraph()
    for path in FILES:
        for where, module in imports_of(path):
            if (str(path.relative_to(PACKAGE)), where, module) not in EXCEPTIONS and module in MODULES:
                graph.add_edge(name_of(path), module)
    return graph


def test_no_imports_go_round() -> None:
    graph = import_graph()
    assert len(graph) > 100  # the names were found
    rounds = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert rounds == []
    assert not list(nx.selfloop_edges(graph))


def test_an_import_that_goes_round_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "EXCEPTIONS", set())
    assert any(len(found) > 1 for found in nx.strongly_connected_components(import_graph()))


def test_no_type_hint_points_down_but_the_exceptions() -> None:
    found = set()
    for path in FILES:
        own = rank(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                for inner in ast.walk(node):
                    module = inner.module if isinstance(inner, ast.ImportFrom) else None
                    if (module or "").startswith("gradflow."):
                        down = rank(part_of(str(module))) > own
                        same = part_of(str(module)) in ROOMS and rank(part_of(str(module))) == own
                        found |= {(str(path.relative_to(PACKAGE)), module)} if down or same else set()
    assert found == HINTS | {
        (file, module)
        for file, where, module in EXCEPTIONS
        if where in ("FlowRecord.graph", "FlowRecord.compare")
    }


def test_the_exceptions_are_still_needed() -> None:
    found = {(str(p.relative_to(PACKAGE)), where, module) for p in FILES for where, module in imports_of(p)}
    assert found >= EXCEPTIONS


def test_deferred_and_relative_imports_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "graph").mkdir()
    file = tmp_path / "graph" / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from gradflow.cli import main\n"
        "else:\n    import gradflow.report\n"
        "class A:\n    def f(self):\n        from ..detect import dead\n        from . import y\n"
        "        from gradflow import analyzers\n"
    )
    assert list(imports_of(file)) == [
        ("", "gradflow.report"),
        ("A.f", "gradflow.detect"),
        ("A.f", "gradflow.graph"),
        ("A.f", "gradflow"),
        ("A.f", "gradflow.analyzers"),
    ]


@pytest.mark.parametrize("module", ["gradflow", "gradflow.errors", "gradflow.records", "gradflow.report"])
def test_what_needs_no_torch_does_not_load_it(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_it_is_for_and_only_report_and_the_command_print(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} does not open with what it is for"
    prints = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    if path.name == "analyzers.py":
        assert len(prints) == 1  # print_summary
    elif path.relative_to(PACKAGE) != Path("cli/entry.py"):
        assert prints == []
