"""Every example runs by itself, and finds the illness it was given and none in its repair."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import TEXTS, difference, paste_outputs

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWN = [run for text in TEXTS.values() for run in paste_outputs.runs(text)]  # the pages tell their outputs

SICK = {
    "vanishing_sigmoid": "CRITICAL VANISHING in layers.0",
    "exploding_linear": "EXPLODING in fc2",
    "dead_relu": "DEAD in fc2",
    "forgetful_lstm": "cause: VANISHING in lstm",
    "greedy_policy": "SATURATION in actor",
    "collapsed_attention": "SATURATION in blocks.1.attention",
}
NUMBERS = (
    "forgetful_lstm",
    "greedy_policy",
    "collapsed_attention",
)  # tells more than its verdicts; a test of its own looks at that
CAUSES = {
    "exploding_linear": "EXPLODING in fc2",
    "dead_relu": "DEAD in fc2",
    "forgetful_lstm": "VANISHING in lstm",
    "greedy_policy": "SATURATION in actor",
    "collapsed_attention": "SATURATION in blocks.0.attention",
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SICK, "digits"}


@pytest.mark.parametrize("name", SICK)
def test_example_runs_by_itself(name: str) -> None:
    pytest.importorskip("sklearn")
    # Older releases of PyTorch make a folder with the first optimizer, and leave it to the end of it.
    warnings = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    command = [sys.executable, *warnings, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    sick, _, repaired = done.stdout.partition("repaired: ")
    assert sick.startswith("sick: sick\n")
    assert SICK[name] in sick
    verdict, _, more = repaired.partition("\n")
    assert verdict == "no illness found"
    assert not more or name in NUMBERS
    for run in SHOWN:
        if run.arguments == (f"examples/{name}.py",):
            assert difference(run.places[0].output, done.stdout) == ""
    causes = [line for line in sick.splitlines() if line.startswith("  cause: ")]
    assert causes[0].startswith(f"  cause: {CAUSES.get(name, 'VANISHING in layers.')}")
