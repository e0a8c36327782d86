"""What importing gradflow loads: a guard for the figures of `benchmarks/import_time.py`, without a clock."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

NEEDED = {"gradflow", "attr", "attrs", "numpy"}


def loaded(first: str, then: str) -> set[str]:
    """Return the third-party packages that `then` loads beyond those of `first`."""
    code = (
        f"import sys\n{first}\nbefore = set(sys.modules)\n{then}\n"
        "import json; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    ours = {root for root in roots if root not in sys.stdlib_module_names}
    return {root for root in ours if not root.startswith("__editable__") and "cython" not in root}


def test_the_import_alone_loads_no_other_package() -> None:
    assert loaded("", "import gradflow") == {"gradflow"}


def test_the_command_starts_without_any_other_package() -> None:
    then = "from gradflow.cli.parser import make_parser as new; new().format_help(); "
    then += "new().parse_args(['diagnose', ''])"
    assert loaded("", then) == {"gradflow"}


RUN = "gradflow.diagnose(model, lambda: torch.ones(3, 2), lambda y: y.square().mean(), steps=2)"


@pytest.mark.parametrize("then", ["gradflow.diagnose", f"print({RUN})"])
def test_a_diagnosis_loads_no_other_package_than_those_it_needs(then: str) -> None:
    first = (
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))"
    )
    assert loaded(first, f"import gradflow\n{then}") - {"torch"} <= NEEDED


def test_the_guard_sees_what_is_loaded() -> None:
    graph = "gradflow.graph.LayerGraph.from_flows({'fc': 2.0, 'loss': 1.0}, {('fc', 'loss'): 2.0})"
    assert "networkx" not in loaded("import torch", f"import gradflow.graph\n{graph}")
    assert "networkx" in loaded("import torch", f"import gradflow.graph\n{graph}.nx")
