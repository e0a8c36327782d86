"""Settings that a measurement runs under, and what torch loads for it."""

from __future__ import annotations

import subprocess
import sys


def test_forward_mode_is_loaded_without_a_word() -> None:
    """What torch says of its own TorchScript meanwhile is no warning of the user's."""
    code = "from gradflow.functional.model.setting import load_forward_mode as load; load()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
