"""State has one owner: nobody in `functional` sets a field of an object that is another's."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gradflow" / "functional"
FILES = sorted(PACKAGE.rglob("*.py"))
# Rooms in which a field is set by the object's own methods alone. In the others, the file of a class may.
STRICT = {"tap", "reverse", "run", "measurement", "analyze"}
TORCH = {
    "grad",
    "training",
}  # fields of tensors and modules, of whatever name a class of ours may have one too
OWN = {"self", "cls", "ctx"}  # `ctx`: on which an autograd function keeps what its backward needs


def fields_of(tree: ast.Module) -> set[str]:
    """Return the names of the fields of the classes of a file: those in their bodies, and `self.x = ...`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    found.add(line.target.id)
            found |= {field for _, owner, field, _ in settings(node) if owner == "self"}
    return found


def settings(tree: ast.AST) -> Iterator[tuple[int, str, str, bool]]:
    """Yield (line, object, field, whether an item of the field is set) of every assignment to a field.

    That is `object.field = ...`, `object.field += ...` and `object.field[item] = ...`.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            todo = list(node.targets)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            todo = [node.target]
        else:
            continue
        while todo:
            target, item = todo.pop(), False
            if isinstance(target, (ast.Tuple, ast.List)):
                todo += target.elts
                continue
            while isinstance(target, ast.Subscript):
                target, item = target.value, True
            if isinstance(target, ast.Attribute):
                yield node.lineno, ast.unparse(target.value), target.attr, item


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
DECLARED = {path: fields_of(tree) for path, tree in TREES.items()}
EVERY = set[str]().union(*DECLARED.values())


def trespasses(path: Path, tree: ast.Module) -> list[str]:
    """Return the assignments of a file to fields of others; those of torch and of the user are not ours."""
    strict = path.relative_to(PACKAGE).parts[0].removesuffix(".py") in STRICT
    return [
        f"line {line}: {owner}.{field}"
        for line, owner, field, item in settings(tree)
        if owner not in OWN
        and field in EVERY - TORCH
        and (field not in fields_of(tree) or (strict and not item))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_sets_the_fields_of_others(path: Path) -> None:
    assert trespasses(path, TREES[path]) == []


def test_trespasses_are_seen() -> None:
    text = (
        "class Mine:\n    calls: list\n    def f(self, other):\n        self.calls, other.calls = [], []\n"
        "def g(recorder, mine, x):\n    recorder.asked |= 1\n    recorder.state.buffers['a'] = 2\n"
        "    mine.calls['a'] = 3\n    x.grad = None\n"
    )
    tree = ast.parse(text)
    assert fields_of(tree) == {"calls"}
    found = ["line 4: other.calls", "line 6: recorder.asked", "line 7: recorder.state.buffers"]
    assert sorted(trespasses(PACKAGE / "run" / "x.py", tree)) == found
    assert sorted(trespasses(PACKAGE / "policy" / "x.py", tree)) == found[1:]
