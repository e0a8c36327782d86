"""How large files, classes and functions may grow: what is larger has more than one job.

    python tests/test_sizes.py [--count 10]

lists the largest of each kind.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import gradflow

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradflow"
FOLDERS = ("gradflow", "tests", "benchmarks", "examples", "docs")  # where no file may be long
LINES, FIELDS, PARAMETERS = 400, 20, 8
# What is public takes what its users want to say: the functions of `gradflow.__all__`, and the methods of the
# class interface. Records are built by name, so their constructors are measured by their fields.
PUBLIC_METHODS = ("analyzers.py", "watching/monitor.py")
# What is larger still, and waits for being taken apart. A name that needs no exception any more must go.
LARGER = {
    "lines": set[str](),
    "fields": set[str](),
    "parameters": set[str](),
}


class Size(NamedTuple):
    """How large something is: the file, the name in it ('' for the file itself), and the number."""

    file: str
    name: str
    number: int

    @property
    def where(self) -> str:
        """`file` or `file:name`."""
        return f"{self.file}:{self.name}" if self.name else self.file


def fields(node: ast.ClassDef) -> int:
    """Return how many fields a class has: annotated names in its body, and `self.x = ...` in `__init__`."""
    found = {
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and "ClassVar" not in ast.unparse(line.annotation)
    }
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            found |= {
                inner.attr
                for inner in ast.walk(method)
                if isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            }
    return len(found)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many parameters a function has, `self` and `cls` left out."""
    args = node.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    stars = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
    return len([name for name in names if name not in ("self", "cls")]) + len(stars)


def definitions(tree: ast.AST, above: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield the qualified name and the node of every class and function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{above}.{node.name}".lstrip(".")
            yield name, node
            yield from definitions(node, name)
        else:
            yield from definitions(node, above)


def lines(root: Path = ROOT, folders: Sequence[str] = FOLDERS) -> list[Size]:
    """Return how many lines every file of these folders has, the longest first."""
    found = [
        Size(str(path.relative_to(root)), "", len(path.read_text(encoding="utf-8").splitlines()))
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
    ]
    return sorted(found, key=lambda size: -size.number)


def sizes(package: Path = PACKAGE) -> dict[str, list[Size]]:
    """Return the sizes of classes and functions by kind, the largest first."""
    found: dict[str, list[Size]] = {kind: [] for kind in ("fields", "parameters", "length")}
    for path in sorted(package.rglob("*.py")):
        text, file = path.read_text(encoding="utf-8"), str(path.relative_to(package))
        for name, node in definitions(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                found["fields"].append(Size(file, name, fields(node)))
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found["parameters"].append(Size(file, name, parameters(node)))
                found["length"].append(Size(file, name, (node.end_lineno or 0) - node.lineno + 1))
    return {kind: sorted(some, key=lambda size: -size.number) for kind, some in found.items()}


def is_public(size: Size) -> bool:
    """Whether a function may have as many parameters as its users want."""
    is_private = any(part.startswith("_") and part != "__init__" for part in size.name.split("."))
    return not is_private and (size.file in PUBLIC_METHODS or size.name in gradflow.__all__)


SIZES = {"lines": lines(), **sizes()}
LIMITS = {"lines": LINES, "fields": FIELDS, "parameters": PARAMETERS}


@pytest.mark.parametrize("kind", LIMITS)
def test_nothing_is_too_large(kind: str) -> None:
    large = [size for size in SIZES[kind] if size.number > LIMITS[kind]]
    if kind == "parameters":
        large = [size for size in large if not is_public(size)]
    assert {size.where for size in large} == LARGER[kind], [f"{size.where}: {size.number}" for size in large]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_files_of_every_folder_are_counted(folder: str) -> None:
    assert any(size.file.startswith(f"{folder}/") for size in SIZES["lines"])


def test_sizes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "class A:\n    a: int\n    kind: ClassVar[int] = 1\n"
        "    def __init__(self, b, *c, d=1, **e):\n        self.b = self.c = b\n        self.b.x = 1\n"
        "def f(a, /, b):\n    def g(c):\n        pass\n"
    )
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "z.py").write_text("a = 1\n" * 12)
    assert lines(tmp_path, ["."]) == [("y/z.py", "", 12), ("x.py", "", 9)]
    assert lines(tmp_path, ["y"]) == [("y/z.py", "", 12)]
    found = sizes(tmp_path)
    assert found["fields"] == [("x.py", "A", 3)]
    assert found["parameters"] == [("x.py", "A.__init__", 4), ("x.py", "f", 2), ("x.py", "f.g", 1)]
    assert found["length"] == [("x.py", "A.__init__", 3), ("x.py", "f", 3), ("x.py", "f.g", 2)]


def main() -> None:
    """Print the largest of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="how many of each kind")
    count = parser.parse_args().count
    titles = {
        "lines": "files, lines",
        "fields": "classes, fields",
        "parameters": "functions, parameters",
        "length": "functions, lines",
    }
    for kind, title in titles.items():
        rows = [f"  {size.number:4}  {size.where}" for size in SIZES[kind][:count]]
        print(title, *rows, sep="\n")  # noqa: T201 - a list is what the script is for


if __name__ == "__main__":
    main()
