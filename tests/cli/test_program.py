"""The user's file as a program of its own: arguments, imports, packages, notebooks, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradflow.cli.building import RETURNS
from gradflow.cli.faults import CommandError
from gradflow.cli.program import own_output, program
from gradflow.cli.target import Target, split_target
from tests.cli.running import python, run, write


def loaded(target: Target, *arguments: str, name: str = "seen") -> object:
    """Return what a name of a program holds."""
    with program(target, arguments) as module:
        return getattr(module, name)


def file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_arguments_folder_and_name_are_as_python_has_them_and_are_put_back(tmp_path: Path) -> None:
    file(tmp_path / "neighbour_of_it.py", "word = 'beside'")
    path = file(
        tmp_path / "ran.py",
        "import sys, argparse\nfrom neighbour_of_it import word\n"
        "parser = argparse.ArgumentParser()\nparser.add_argument('--rate', type=float)\n"
        "seen = (sys.argv, sys.path[0], parser.parse_args().rate, word, __name__, __file__)\n"
        "import ran as again\nsame = again.seen is seen\n"
        "if __name__ == '__main__':\n    raise RuntimeError\n",
    )
    before = (list(sys.path), sys.argv)
    target = Target("build", file=path)
    seen = ([str(path), "--rate", "0.5"], str(tmp_path), 0.5, "beside", "ran", str(path))
    assert loaded(target, "--rate", "0.5") == seen
    assert loaded(target, "--rate", "0.5", name="same") is True
    assert (list(sys.path), sys.argv) == before
    assert "ran" not in sys.modules


def test_a_name_that_another_module_has_is_left_to_it(tmp_path: Path) -> None:
    path = file(tmp_path / "json.py", "import json\nseen = (__name__, json.dumps(1))\n")
    assert loaded(Target("build", file=path)) == ("_gradflow_target_json", "1")
    assert sys.modules["json"] is json


def test_what_its_parser_refuses_says_where_arguments_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(
        tmp_path / "asks.py",
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--rate', required=True)\n"
        "p.parse_args()\n",
    )
    status, out, err = run(capsys, "diagnose", path, "--steps", 2)
    assert (status, out) == (2, "")
    assert "SystemExit: 2 (line 4 of " in err
    assert err.endswith("give them behind --, as in `gradflow diagnose FILE.py -- --lr 1`\n")
    err = run(capsys, "diagnose", path, "--", "--rate", "1")[2]
    assert "there is no function 'build' in " in err
    assert err.endswith(f"; write one that returns {RETURNS}\n")


PACKAGE = {
    "bundle/__init__.py": "made = []",
    "bundle/parts.py": "part = 'part'",
    "bundle/inner/__init__.py": "",
    "bundle/inner/train.py": "from ..parts import part\nfrom .. import made\nimport sys\nmade.append(1)\n"
    "seen = (__name__, part, len(made), sys.argv[1:])",
    "bundle/inner/beside.py": "import os\nseen = __name__",
    "bare/one.py": "from .two import seen",
    "bare/two.py": "seen = __name__",
}


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in PACKAGE.items():
        file(tmp_path / name, text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", ["bundle.inner.train:build", "bundle/inner/train.py"])
def test_relative_imports_work_from_files_and_modules_again_and_again(bundle: Path, target: str) -> None:
    for _ in range(2):
        assert loaded(split_target(target), "x") == ("bundle.inner.train", "part", 1, ["x"])
    assert not [name for name in sys.modules if name.startswith("bundle")]


def test_only_what_imports_relatively_is_made_a_part_of_its_package(bundle: Path) -> None:
    assert loaded(split_target("bundle/inner/beside.py")) == "beside"
    assert loaded(split_target("bare/one.py")) == "bare.two"  # a folder without an __init__.py
    with pytest.raises(CommandError, match=r"bundle/__init__.py cannot be imported: ZeroDivisionError"):
        loaded(Target("build", file=file(bundle / "bundle" / "__init__.py", "from . import parts\n1 / 0")))


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("bundle.inner.trian", "there is no module 'bundle.inner.trian', seen from "),
        ("bundel", "there is no module 'bundel', seen from "),
        ("bundle.broken", "bundle.broken cannot be imported: ModuleNotFoundError: No module named 'absent'"),
        ("alone.py.x", "there is no module 'alone.py.x'"),
    ],
)
def test_modules_that_are_not_there(bundle: Path, module: str, told: str) -> None:
    file(bundle / "bundle" / "broken.py", "import absent")
    with pytest.raises(CommandError) as raised:
        loaded(Target("build", module=module))
    assert told in str(raised.value)


def notebook(path: Path, *cells: str, language: str = "python") -> Path:
    kinds = [{"cell_type": "markdown", "source": ["# Title"]}]
    kinds += [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    data = {"cells": kinds, "metadata": {"kernelspec": {"language": language}}, "nbformat": 4}
    return file(path, json.dumps(data))


def test_code_cells_of_a_notebook_are_run_and_ipython_s_own_lines_left_out(tmp_path: Path) -> None:
    path = notebook(
        tmp_path / "n.ipynb",
        "%matplotlib inline\nimport math\n!pip install x\nfiles = !ls\nmath.pi?",
        "%%time\ndef area(r):\n    %timeit 1\n    return math.pi * r\n",
        "%%bash\nexit 1",
        "seen = (area(1) == math.pi, '''\n%not a magic\n''')",
    )
    assert loaded(Target("build", file=path)) == (True, "\n%not a magic\n")


def test_errors_in_notebooks_tell_the_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = notebook(tmp_path / "n.ipynb", "x = 1\n", "def build():\n    raise OverflowError('much')\n")
    _, _, err = run(capsys, "diagnose", path, "--traceback")
    assert f"OverflowError: much (line 2 of {path}, cell 3)" in err
    assert "    raise OverflowError('much')" in err  # the traceback shows the line
    with pytest.raises(CommandError, match=r"SyntaxError: .* cell 2, line 1"):
        loaded(Target("build", file=notebook(tmp_path / "s.ipynb", "x = (\n")))


def test_what_is_no_notebook_of_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is a notebook of R, not of Python"):
        loaded(Target("build", file=notebook(tmp_path / "r.ipynb", "x <- 1", language="R")))
    for text in ("{", "[]", '{"cells": [{}]}', '{"worksheets": []}'):
        with pytest.raises(CommandError, match="is no notebook of the format 4"):
            loaded(Target("build", file=file(tmp_path / "bad.ipynb", text)))


def test_what_the_file_prints_goes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "diagnose", f"{write(tmp_path)}:sized", "--format", "json")
    assert status == 0
    assert json.loads(out)["ok"] is True
    assert err == "sized 8 2 False 0.001 x {}\n"


NOISY = (
    "import atexit, os, subprocess, sys\nprint('{from Python')\nos.system('echo {from a shell')\n"
    "os.write(1, b'{raw\\n')\natexit.register(print, '{on the way out')\nos.chdir('/')\n"
    "sys.stdout.write('{left in the buffer')\n"
)


def test_json_stays_json_whatever_is_printed_and_wherever_the_file_goes(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(NOISY + path.read_text())
    arguments = [
        "-m",
        "gradflow",
        "diagnose",
        "net.py",
        "--steps",
        "2",
        "--format",
        "json",
        "--json",
        "flow.json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = python(*arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "flow.json").read_text() + "\n"
    for word in ("from Python", "from a shell", "raw", "on the way out", "left in the buffer"):
        assert "{" + word in done.stderr


def test_a_full_disk_is_an_error_of_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    code = (
        "from gradflow.cli import main, saved; import sys; saved._report = print\n"
        "saved.deliver = lambda *a: sys.stdout.write('x\\n'); sys.exit(main())"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, "show", "-"], stdout=full, stderr=subprocess.PIPE,
                              text=True, check=False, env=environment)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("gradflow: error: cannot write what is to be printed: [Errno 28]")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("for_good", [False, True])
def test_standard_output_is_put_back_unless_the_process_is_the_command_s(for_good: bool) -> None:
    code = (
        "import os\nfrom gradflow.cli.program import own_output\n"
        f"with own_output(for_good={for_good}) as out:\n"
        "    print('own'); out.write('report\\n'); os.write(1, b'raw\\n')\n"
        "print('after', flush=True)\n"
    )
    done = python("-c", code, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    assert done.stdout == ("report\n" if for_good else "report\nafter\n")
    assert sorted(done.stderr.split()) == (["after", "own", "raw"] if for_good else ["own", "raw"])


def test_a_stream_in_memory_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with own_output(for_good=True) as out:
        print("own")  # noqa: T201
        out.write("report")
    assert capsys.readouterr() == ("report", "own\n")


@pytest.mark.parametrize(("closed", "seen"), [(1, ("", "own\n")), (2, ("report\n", ""))])
def test_a_stream_that_is_closed_is_borne(closed: int, seen: tuple[str, str]) -> None:
    if os.name != "posix":
        pytest.skip("descriptors are closed as POSIX has it")
    code = (
        "import sys\nfrom gradflow.cli import main, saved\nfrom gradflow.cli.program import own_output\n"
        "def show(options):\n"
        "    with own_output(for_good=True) as out:\n"
        "        print('own'); out.write('report\\n')\n"
        "    return 0\n"
        "from gradflow.cli import parser\nparser.show_command = show\nsys.exit(main())\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" show x {closed}>&-', sys.executable, code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, *seen)
