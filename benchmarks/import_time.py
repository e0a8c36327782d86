"""Import time of gradflow beyond torch's own, and of the command's start beyond Python's own.

    python benchmarks/import_time.py [--runs 15]

Each line is a pair of programs that differ in gradflow alone. Both run in fresh processes, in turn, with
their compiled bytecode at hand, and the medians of their wall clock are compared. The aim is at most 0.15 s
beyond. `import gradflow` loads its parts on first use (see NOTE [Names loaded on first use] in
`gradflow/__init__.py`), so a second pair also asks for `diagnose`, which loads all that a diagnosis needs.
The third makes one, and is told for comparison: it is no import.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

LIMIT = 0.15

_MODEL = "import torch; model, x = torch.nn.Linear(2, 1), torch.ones(3, 2); model(x).mean().backward()"
PAIRS: dict[str, tuple[list[str], list[str]]] = {
    "import gradflow, beyond torch": (["-c", "import torch"], ["-c", "import torch, gradflow"]),
    "gradflow.diagnose, beyond torch": (
        ["-c", "import torch"],
        ["-c", "import torch, gradflow; gradflow.diagnose"],
    ),
    "a first diagnosis, beyond a first step": (
        ["-c", _MODEL],
        [
            "-c",
            f"{_MODEL}; import gradflow; gradflow.diagnose(model, lambda: x, lambda y: y.mean(), steps=1)",
        ],
    ),
    "import gradflow, beyond python": (["-c", "pass"], ["-c", "import gradflow"]),
    "gradflow --version, beyond python": (["-c", "pass"], ["-m", "gradflow", "--version"]),
    "gradflow --help, beyond python": (["-c", "pass"], ["-m", "gradflow", "--help"]),
}


def seconds(arguments: list[str], environment: dict[str, str]) -> float:
    """Return the wall clock of one fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


def main() -> None:
    """Print one line for each pair."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        title = f"medians of {options.runs} runs, in seconds"
        print(f"{title:42}{'without':>9}{'with':>9}{'beyond':>9}")
        for name, pair in PAIRS.items():
            times: tuple[list[float], list[float]] = ([], [])
            for arguments in pair:
                seconds(arguments, environment)  # compiles what is not yet
            for _ in range(options.runs):
                for column, arguments in zip(times, pair, strict=True):
                    column.append(seconds(arguments, environment))
            without, with_it = map(statistics.median, times)
            within = with_it - without <= LIMIT or name.startswith("a first")
            over = "" if within else f"  above {LIMIT}"
            print(f"{name:42}{without:9.3f}{with_it:9.3f}{with_it - without:9.3f}{over}", flush=True)


if __name__ == "__main__":
    main()
