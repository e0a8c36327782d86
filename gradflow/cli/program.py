"""The user's file, notebook or module, run as a program of its own.

NOTE [A program of its own]
A file is run as `python FILE.py ARGUMENTS` runs it: `sys.argv` is its name and what stands behind `--`, and
its folder is the first place that imports are looked for in. A module is run as `python -m` runs it, with the
present folder for that. Only `__name__` is another: what stands under `if __name__ == "__main__"` is a
training, which is not to be run. A file that imports relatively is imported as a part of its package, from
the folder above that. What it prints goes to standard error, as standard output is the report's: JSON stays
JSON whatever the file prints, from C or from a process of its own, and also on its way out.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from gradflow.cli.faults import CommandError, explained
from gradflow.cli.notebook import run_notebook
from gradflow.cli.target import Target


@contextlib.contextmanager
def own_output(*, for_good: bool) -> Iterator[TextIO]:
    """Yield standard output, and let everything else that is printed meanwhile go to standard error.

    Args:
        for_good: whether that stays so afterwards, for what the user's code prints as the process ends.
    """
    out = sys.stdout
    out.flush()
    try:
        is_real = out.fileno() == 1
    except (OSError, ValueError, AttributeError):  # a stream in memory
        is_real = False
    if not is_real:
        with contextlib.redirect_stdout(sys.stderr):
            yield out
        return
    kept = os.dup(1)
    with open(kept, "w", encoding=out.encoding, errors=out.errors, buffering=io.DEFAULT_BUFFER_SIZE) as own:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield own
            own.flush()
        finally:
            out.flush()
            if not for_good:
                os.dup2(kept, 1)


@contextlib.contextmanager
def program(target: Target, arguments: Sequence[str]) -> Iterator[Any]:
    """Run a file or module, and yield it; what imports and `sys.argv` look at is its own until the end.

    Args:
        target: what to run.
        arguments: the program's own.

    Raises:
        CommandError: if it cannot be found, or raises.
    """
    path, argv, names = list(sys.path), sys.argv, set(sys.modules)
    name = ""
    try:
        with explained(f"{target.place} cannot be imported"):
            name, module = _started(target, arguments)
        yield module
    finally:
        sys.path[:], sys.argv = path, argv
        top = name.partition(".")[0]
        for own in [n for n in sys.modules if n not in names and n.partition(".")[0] == top]:
            del sys.modules[own]


def _started(target: Target, arguments: Sequence[str]) -> tuple[str, Any]:
    """Return the name and the module of what is to be run, after it ran."""
    sys.argv = [target.place, *arguments]
    if target.file is None:
        sys.path.insert(0, os.getcwd())
        return target.module, _imported(target.module)
    file = target.file.resolve()
    sys.path.insert(0, str(file.parent))
    if file.suffix == ".ipynb":
        module = types.ModuleType(f"_gradflow_target_{file.stem}")
        module.__file__ = str(file)
        sys.modules[module.__name__] = module
        run_notebook(file, module)
        return module.__name__, module
    if (level := _relative_level(file)) and (package := _in_package(file, level)):
        return package, importlib.import_module(package)
    name = _free_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, "a path that ends in .py has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickle and dataclasses look a class's module up here
    spec.loader.exec_module(module)
    return name, module


def _imported(name: str) -> Any:
    """Return a module, with `sys.argv` as `python -m` has it."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not name.startswith(f"{error.name}.") and name != error.name:
            raise  # a package above it imports what is not there
        spec = None
    if spec is None:
        hint = f"; for a file, give {name}.py" if Path(f"{name}.py").exists() else ""
        raise CommandError(f"there is no module {name!r}, seen from {os.getcwd()}{hint}")
    sys.argv[0] = spec.origin or name
    return importlib.import_module(name)


def _free_name(file: Path) -> str:
    """Return the name of a file's module: its own, so that others which import it get this very one.

    Where that name would hide another module, it is one that nobody has.
    """
    stem = file.stem
    if stem.isidentifier() and stem not in sys.modules:
        spec = importlib.util.find_spec(stem)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file:
            return stem
    return f"_gradflow_target_{stem}"


def _relative_level(file: Path) -> int:
    """Return how many packages above itself a file's relative imports reach; 0 without any."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # which running it tells better
        return 0
    return max((node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), default=0)


def _in_package(file: Path, level: int) -> str:
    """Return a file's name within its package, and let the package be found; "" if it cannot be in one."""
    names, folder = [] if file.stem == "__init__" else [file.stem], file.parent
    while level > 0 or (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder, level = folder.parent, level - 1
    if not all(name.isidentifier() for name in names):
        return ""
    sys.path.insert(1, str(folder))
    return ".".join(names)
