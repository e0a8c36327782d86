"""The page in headless Chromium; left out where there is no Chromium or no playwright.

apt-get install chromium-headless-shell; playwright is in the extra `dev`
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradflow.records import EdgeRecord, FlowRecord, GraphRecord, IssueSeverity, IssueType, NodeRecord
from gradflow.report import Report
from tests.samples import chain_record, layer_record, make_issue, sick_chain

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

WIDTHS = (375, 1280, 1920)
# What sticks out of the window without a box of its own to scroll in, and cards that lie on one another.
OVERFLOWING = """() => {
  const wide = document.documentElement.clientWidth;
  const inside = (e) => e.closest('.scroll, .stage, svg, .heat > input, pre');
  const out = [...document.querySelectorAll('body *')].filter((e) => {
    const r = e.getBoundingClientRect();
    return r.width && !inside(e) && (r.right > wide + 1 || r.left < -1);
  }).map((e) => e.tagName + '.' + e.className);
  if (document.documentElement.scrollWidth > wide) out.push('page');
  return out;
}"""
OVERLAPPING = """() => {
  const name = (e) => e.id || e.className.baseVal || e.className || e.textContent;
  const over = (a, b, low, high) => Math.min(a[high], b[high]) - Math.max(a[low], b[low]) > 1;
  const seen = (s) => [...document.querySelectorAll(s)].map((e) => [e, e.getBoundingClientRect()])
    .filter((p) => p[1].height);
  const pairs = (found) => found.flatMap(([e, a], i) => found.slice(i + 1)
    .filter(([f, b]) => !e.contains(f) && !f.contains(e))
    .filter(([f, b]) => over(a, b, 'left', 'right') && over(a, b, 'top', 'bottom'))
    .map(([f]) => `${name(e)} / ${name(f)}`));
  return [...pairs(seen('.card, h2')), ...pairs(seen('.tools > *')), ...pairs(seen('.buttons, .stage')),
          ...pairs(seen('.blocks .frame'))];
}"""


def deep(depth: int) -> Report:
    """Return the report of a deep model: a list of blocks of three layers, and skips round them."""
    names = [f"blocks.{i}.{part}" for i in range(depth) for part in ("norm", "attention.proj", "mlp")] + [
        "head"
    ]
    steps = 4
    layers = [layer_record(name, [0.5] * steps, order=i) for i, name in enumerate(names)]
    order, blank = [*names, "loss"], {"grad_norm": (), "input_grad_norm": (), "effective_rank": ()}
    kinds = [*["layer"] * len(names), "loss"]
    nodes = [
        NodeRecord(name=n, kind=k, layer="" if k == "loss" else n, type="Linear", order=i, **blank)
        for i, (n, k) in enumerate(zip(order, kinds, strict=True))
    ]
    edges = [EdgeRecord(source=u, target=v, flow=()) for u, v in zip(order, order[1:], strict=False)]
    edges += [EdgeRecord(source=u, target=v, flow=()) for u, v in zip(order[::3], order[3::3], strict=False)]
    record = FlowRecord(
        steps=steps, losses=[1.0] * steps, layers=layers, parameters=(),
        graph_record=GraphRecord(nodes=nodes, edges=edges),
    )  # fmt: skip
    issues = (
        make_issue(f"blocks.{depth // 2}.mlp", IssueType.VANISHING, IssueSeverity.CRITICAL),
        make_issue("blocks.0.norm", IssueType.DEAD, IssueSeverity.LOW),
    )
    return Report(record=record, issues=issues)


def sick() -> Report:
    record, issues, causes = sick_chain()
    return Report(record=record, issues=issues, causes=causes)


REPORTS = {
    "sick": sick,
    "deep": lambda: deep(16),
    "deeper": lambda: deep(48),
    "long": lambda: Report(record=chain_record(1000, 3, decay=0.9), issues=[make_issue("fc700")]),
    "healthy": lambda: Report(record=chain_record()),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


def opened(browser: Any, report: Report, folder: Path, width: int, **options: Any) -> tuple[Any, list[str]]:
    """Return the page of a report in the browser, and the list that its errors come into."""
    file, errors = folder / "report.html", []
    report.to_html(file)
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else errors.append(r.url))
    page.goto(file.as_uri())
    return page, errors


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("scripted", [True, False])
def test_nothing_overflows_or_overlaps(
    browser: Any, tmp_path: Path, name: str, width: int, scripted: bool
) -> None:
    page, errors = opened(browser, REPORTS[name](), tmp_path, width, java_script_enabled=scripted)
    assert page.evaluate(OVERFLOWING) == []
    assert page.evaluate(OVERLAPPING) == []
    assert errors == []
    assert page.locator(".tools").is_visible() is scripted
    assert (tmp_path / "report.html").stat().st_size < 3e6
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_from_search_to_node_to_issue_and_back(browser: Any, tmp_path: Path, width: int) -> None:
    page, errors = opened(browser, deep(16), tmp_path, width)
    box = page.locator('.box[data-name^="blocks.8 "]')
    page.keyboard.press("/")
    page.keyboard.type("blocks.8")
    assert page.locator(".box:not(.dim)").count() == 1
    assert page.locator("#count").inner_text() == "1 of 18 boxes"
    assert page.locator("#layers tbody tr:visible").count() == 3
    page.keyboard.press("Enter")  # to the node, which shows its issue
    page.wait_for_selector(".box.hit")
    assert page.evaluate("location.hash") == f"#{box.get_attribute('id')}"
    assert "hit" in str(box.get_attribute("class"))
    assert "hit" in str(page.locator("#issue-0").get_attribute("class"))
    assert page.locator("#issue-1").is_hidden()
    page.locator("#issue-0 .show").click()  # to the issue, whose box opens and shows the layer
    page.wait_for_selector(".row.hit")
    assert page.evaluate("location.hash") == "#issue-0"
    assert box.get_attribute("aria-expanded") == "true"
    assert page.locator(".row.hit .name").inner_html() == "blocks.8.mlp"
    stage, drawn = page.locator(".stage").bounding_box(), box.bounding_box()
    assert stage["y"] - 1 <= drawn["y"] < stage["y"] + stage["height"]
    page.locator("#back").click()
    page.wait_for_function(f"location.hash === '#{box.get_attribute('id')}'")
    page.fill("#search", "")
    assert page.locator(".box.dim").count() == 0
    assert errors == []
    page.close()


def test_filters_by_kind_and_severity(browser: Any, tmp_path: Path) -> None:
    page, errors = opened(browser, deep(16), tmp_path, 1280)
    page.select_option("#kind", "DEAD")
    assert page.locator(".issue:visible").count() == 1
    assert page.locator(".box:not(.dim)").get_attribute("data-name").startswith("blocks.0 ")
    page.select_option("#severity", "CRITICAL")
    assert page.locator(".issue:visible").count() == 0
    page.select_option("#kind", "")
    assert page.locator(".issue:visible").get_attribute("id") == "issue-0"
    assert errors == []
    page.close()


def test_boxes_open_by_pointer_and_keys_and_the_picture_moves(browser: Any, tmp_path: Path) -> None:
    page, errors = opened(browser, deep(16), tmp_path, 1280)
    first = page.locator('.box[data-name^="blocks.0 "]')
    page.locator('button[data-do="fit"]').click()
    page.mouse.click(*centre_of(first))
    assert first.get_attribute("aria-expanded") == "true"
    page.wait_for_selector("#issue-1.hit")  # a box leads to its issue
    assert first.locator(".row").first.is_visible()
    first.press("Enter")
    assert first.get_attribute("aria-expanded") == "false"
    before = page.locator("svg.blocks").get_attribute("viewBox").split()
    page.locator('button[data-do="in"]').click()
    after = page.locator("svg.blocks").get_attribute("viewBox").split()
    assert float(after[2]) == pytest.approx(0.8 * float(before[2]))
    x, y = centre_of(page.locator(".stage"))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 60, steps=4)
    page.mouse.up()
    moved = page.locator("svg.blocks").get_attribute("viewBox").split()
    assert float(moved[1]) > float(after[1])
    assert page.evaluate(OVERLAPPING) == []
    assert errors == []
    page.close()


def centre_of(element: Any) -> tuple[float, float]:
    box = element.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_the_table_sorts_by_the_head_that_is_clicked(browser: Any, tmp_path: Path) -> None:
    page, errors = opened(browser, sick(), tmp_path, 1280)
    names = (
        "() => [...document.querySelectorAll('#layers tbody tr td:nth-child(2)')].map((e) => e.textContent)"
    )
    head = page.locator("#layers th", has_text="Median")
    head.click()
    assert page.evaluate(names) == ["fc1", "fc2", "fc3", "fc4", "fc5"]
    head.press("Enter")
    assert page.evaluate(names) == ["fc5", "fc4", "fc3", "fc2", "fc1"]
    assert head.get_attribute("aria-sort") == "descending"
    page.locator("#layers th", has_text="Issue").click()
    assert page.evaluate(names)[-1] == "fc1"
    assert errors == []
    page.close()


def test_dark_is_dark_and_print_shows_all(browser: Any, tmp_path: Path) -> None:
    page, errors = opened(browser, sick(), tmp_path, 1280, color_scheme="dark")
    red, *_ = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert red < 40
    page.emulate_media(media="print")
    assert page.locator(".tools").is_hidden()
    assert page.pdf().startswith(b"%PDF")
    assert errors == []
    page.close()


def test_a_model_of_a_thousand_layers_with_as_many_issues_is_under_three_megabytes(tmp_path: Path) -> None:
    issues = [make_issue(f"fc{i + 1}") for i in range(1000)]
    Report(record=chain_record(1000, 20, decay=0.9), issues=issues).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6
