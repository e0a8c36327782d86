"""The site builds without a warning, fetches nothing, and its reference has every public name."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradflow as gf

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parent.parent
# Those whose `__all__` is public, and those of which every class and function made there is.
LISTED = (
    "functional",
    "graph",
    "pipelines",
    "records",
    "remedies",
    "report",
    "watching",
    "detect",
    "detect.time",
)
MADE_THERE = (
    "errors", "results", "report.plots", "integrations.trackers", "integrations.lightning",
    "integrations.transformers", "integrations.stable_baselines3",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; a page without a place in `nav`, or a link that leads nowhere, is a warning."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""},
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert done.returncode == 0, "mkdocs build --strict:\n" + "\n".join(told)
    return folder


def names() -> dict[str, set[str]]:
    """Return every public name as its users write it, with all places where the reference may tell of it.

    What is known by several names needs one place.
    """
    parts = {"": gf, **{f"{part}.": importlib.import_module(f"gradflow.{part}") for part in LISTED}}
    listed = {
        f"{part}{name}": getattr(module, name)
        for part, module in parts.items()
        for name in module.__all__
        if name != "__version__"
    }
    places: dict[int, set[str]] = {}
    for name, value in listed.items():
        made = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        places.setdefault(id(value), {made}).add(f"gradflow.{name}")
    found = {name: places[id(value)] for name, value in listed.items()}
    for part in MADE_THERE:
        found |= {f"{part}.{name}": {f"gradflow.{part}.{name}"} for name in made_in(part)}
    return found


def made_in(part: str) -> list[str]:
    """Return what a file lists in `__all__`, or the functions and classes that it makes.

    It is read, since importing the libraries that it is for takes seconds.
    """
    path = ROOT / "gradflow" / part.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    made = [node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return [name for name in made if not name.startswith("_")]


def test_every_public_name_has_a_place_in_the_reference(site: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")]
    told = {name for page in pages for name in re.findall(r'id="(gradflow[\w.]*)"', page)}
    missing = [name for name, places in names().items() if not told & places]
    assert missing == [], "add `::: gradflow.NAME` to a page in docs/reference/"
    assert len(names()) > 300


def test_nothing_is_fetched_when_it_is_read(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = (
            r'<(?:script|img|iframe|link[^>]*rel="?(?:stylesheet|preconnect))[^>]*="?(?:https?:)?//[^>]*>'
        )
        assert re.findall(fetched, text) == []


def test_doctests_are_code_and_fields_of_records_have_their_types(site: Path) -> None:
    text = (site / "reference" / "issues.html").read_text(encoding="utf-8")
    assert "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)
    assert re.search(r">recommended_actions</span>.{0,90}>tuple<", text, re.DOTALL)
