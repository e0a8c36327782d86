"""The outputs shown in the README and in docs/ are what the code prints today; every block of code runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
# Pages whose blocks other tests run, and blocks that go on from names that the page does not make.
ELSEWHERE = {"docs/training.md": "tests/integrations/test_page.py", "README.md": "tests/test_readme.py"}
GIVEN = {
    "docs/index.md": "model, batches, loss_fn, _ = given()",
    "docs/detectors.md": "model, batches, loss_fn, optimizer = given()",
    "docs/remedies.md": "model, batches, loss_fn, optimizer = given()",
    "docs/policy.md": "import gradflow as gf\nppo = trained()",
    "docs/distributed.md": "import gradflow as gf\nmodel, loader, loss_fn, optimizer = given()\n"
    "import torch\nfrom torch import distributed as dist, nn\n"
    "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
    "from torch.distributed.device_mesh import init_device_mesh\n"
    "from torch.distributed.pipelining import PipelineStage, ScheduleGPipe\n"
    "module, index, number, device = model, 0, 1, 'cpu'\n"
    "mesh = init_device_mesh('cpu', (1,), mesh_dim_names=('pp',))",
    "docs/reference/index.md": "",
}


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paste_outputs = _script("paste_outputs")
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
EXAMPLES = "examples/"  # as programs of their own: tests/test_examples.py compares their outputs
RUNS = [
    pytest.param(page, run, id=f"{page}:{' '.join(run.arguments)[:50].splitlines()[0]}")
    for page in paste_outputs.pages()
    for run in paste_outputs.runs(TEXTS[page])
    if not run.arguments[0].startswith(EXAMPLES)
]


@pytest.fixture
def as_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a function that runs code of a page as a program of its own, and returns what it printed.

    It is run here, since every process would import torch again.
    """
    monkeypatch.setattr(sys, "path", ["", *sys.path])

    def run(page: str, code: str, **names: Any) -> str:
        folder = paste_outputs.folder_of(TEXTS[page], tmp_path)
        monkeypatch.chdir(folder)
        for own in folder.glob("*.py"):  # not a module of that name from another folder
            monkeypatch.delitem(sys.modules, own.stem, raising=False)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page, "exec"), {"__name__": "__main__", **names})
        return printed.getvalue()

    with torch.random.fork_rng():
        yield run
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


def _is_near(shown: str, printed: str) -> bool:
    """Whether a number with a fraction is off by one percent, or one in its last digit, at most."""
    digits = shown.partition("e")[0].partition(".")[2]
    last = 1.01 * 10.0 ** -len(digits) * 10.0 ** int(shown.partition("e")[2] or 0)
    return math.isclose(float(shown), float(printed), rel_tol=0.01, abs_tol=last)


def difference(shown: str, printed: str) -> str:
    """Return the first line that differs, or nothing.

    Words and whole numbers must be equal. Another processor sums in another order, so a number with a
    fraction may be off by one percent, or by one in the last digit shown.
    """
    for a, b in zip([*shown.splitlines(), ""], [*printed.splitlines(), ""], strict=False):
        numbers = list(zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=False))
        alike = all(x == y or (x.count(".") == y.count(".") == 1 and _is_near(x, y)) for x, y in numbers)
        if _NUMBER.sub("#", a) != _NUMBER.sub("#", b) or not alike:
            return f"{a!r} is shown, {b!r} is printed; run python docs/paste_outputs.py"
    return "" if shown.count("\n") == printed.count("\n") else "more lines on one side"


@pytest.mark.parametrize(("page", "run"), RUNS)
def test_what_is_shown_is_what_is_printed(page: str, run: Any, as_program: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    kind, *rest = run.arguments
    if kind == "-c":
        printed = as_program(page, *rest)
    else:
        printed = paste_outputs.fresh_output(run, paste_outputs.folder_of(TEXTS[page], tmp_path))
    for place, output in zip(run.places, paste_outputs.outputs(run, printed), strict=True):
        assert difference(place.output, output) == ""


@pytest.mark.parametrize("page", GIVEN)
def test_blocks_without_an_output_run(
    page: str, as_program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr(paste_outputs, "ROOT", tmp_path)  # for what they write
    try:
        as_program(page, "\n".join([GIVEN[page], *left_over(page)]), given=_given, trained=_trained)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("file", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda file: file.name)
def test_notebooks_run_and_show_what_they_have_stored(file: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    script = _script("run_notebooks")
    stored, today = ([_shown(cell) for cell in script.read(file).cells], script.executed(file).cells)
    assert sum("<svg" in str(cell) for cell in today) == 1  # the record's lines
    for before, cell in zip(stored, today, strict=True):
        assert difference(before, _shown(cell)) == ""


def _shown(cell: Any) -> str:
    """Return what one sees of a cell's outputs, without its markup."""
    outputs = [o.get("text") or o["data"]["text/html"] for o in cell.get("outputs", ())]
    return re.sub(r"<[^>]*>", "\n", "\n".join(outputs))


def test_every_block_of_code_is_run_by_a_test() -> None:
    assert [page for page in TEXTS if left_over(page) and page not in (*ELSEWHERE, *GIVEN)] == []
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


def left_over(page: str) -> list[str]:
    """Return the blocks of a page that are run for no output on it."""
    run = "\n".join(argument for run in paste_outputs.runs(TEXTS[page]) for argument in run.arguments)
    return [
        block for block in re.findall(r"```python\n(.*?)```\n", TEXTS[page], re.DOTALL) if block not in run
    ]


def _given() -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.constant_(model[0].bias, -9.0)
    optimizer = torch.optim.Adam(model.parameters())
    return model, [(x, x[:, :1]) for x in torch.randn(5, 16, 4)], nn.MSELoss(), optimizer


def _trained() -> Any:
    from stable_baselines3 import PPO

    ppo = PPO("MlpPolicy", "CartPole-v1", n_steps=256, device="cpu", seed=0)
    return ppo.learn(256)


def test_pages_have_the_outputs_they_should() -> None:
    runs = {page: paste_outputs.runs(text) for page, text in TEXTS.items()}
    (job,) = runs["README.md"]
    assert "['diagnose', '--try', 'examples/vanishing_sigmoid.py']" in job.arguments[1]
    (measured,) = runs["docs/measurements.md"]
    definition, use = measured.arguments[1].split("\n\ntorch.manual_seed(0)\n")
    assert definition.count("\n") < 60, "a measurement of one's own takes less than 60 lines"
    assert "from_json" in use
    (mended,) = runs["docs/remedies.md"]
    assert mended.arguments[1].count("\n") < 25, "a remedy of one's own takes few lines"
    detectors = runs["docs/how_to/write_a_detector.md"]
    assert len(runs["docs/ten_minutes.md"]) == 2, "the page's code, and its commands"
    for page in detectors:
        assert page.arguments[1].count("\n") < 35, "a detector of one's own takes few lines"
        assert "gf.Issue(" in page.arguments[1]
    _, causes = detectors
    assert causes.places[0].output.splitlines() == [
        "VANISHING in 0 explains ['2']",
        "CLOSED_GATE in 4 explains ['0', '2']",
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("loss 2.303 -> 2.30\n", "loss 2.304 -> 2.31\n", True),
        ("norm 4.85e-04\n", "norm 4.86e-04\n", True),
        ("norm 4.85e-04\n", "norm 4.85e-05\n", False),
        ("12 nodes\n", "13 nodes\n", False),
        ("fc2.weight\n", "fc3.weight\n", False),
        ("a\n", "a\nb\n", False),
        ("a\nb\n", "a\n", False),
    ],
)
def test_difference_forgives_the_last_digit_only(shown: str, printed: str, same: bool) -> None:
    assert (difference(shown, printed) == "") is same


def test_places_are_found_and_read() -> None:
    text = (
        "```python\nprint(1)\n```\n"
        "<!-- output of: the block above -->\n```text\n1\n```\n"
        "<!-- output of: gradflow diagnose 'a b.py' -->\n```text\n```\n"
        "```python\nprint(2)\n```\n"
        "<!-- output of: the blocks above -->\n```text\n```\n"
    )
    first, third, second = paste_outputs.runs(text)
    assert third.arguments == ("-c", "print(1)\n\nprint(2)\n")
    assert (first.arguments, first.places[0].output) == (("-c", "print(1)\n"), "1\n")
    assert "['diagnose', 'a b.py']" in second.arguments[1]
    assert [place.output for place in second.places] == [""]


def test_a_page_goes_on_from_block_to_block_and_has_its_files() -> None:
    so_far = "<!-- output of: the page so far -->\n```text\n?\n```\n"
    text = (
        '```python title="own.py"\nx = 1\n```\n```python\nfrom own import x\nprint(x)\n```\n' + so_far
        + "```python\nx += 1\n```\n```python\nprint(x)\n```\n" + so_far
    )  # fmt: skip
    assert paste_outputs.rewritten(text) == text.replace("?", "1", 1).replace("?", "2")
