"""The HTML page: well-formed, alone, escaped, and showing what the record holds."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import attrs
import numpy as np
import pytest

from gradflow.records import FlowRecord, IssueSeverity, IssueType, Provenance
from gradflow.report import report_html
from gradflow.report.html.findings import MAX_EVIDENCE, MAX_OPEN
from gradflow.report.html.tables import MAX_SPARKLINES
from tests.samples import chain_record, layer_record, make_issue, parameter_record, sick_chain


def parsed(page: str) -> ElementTree.Element:
    """Return the page as a tree; raises if it is not well-formed."""
    assert page.startswith("<!DOCTYPE html>\n<html ")
    return ElementTree.fromstring(page.partition("\n")[2])


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(parsed(page).itertext()))


def rows_of(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table that has a column of this name."""
    for table in parsed(page).iter("table"):
        if head in ["".join(th.itertext()) for th in table.iter("th")]:
            bodies = table.findall("tbody/tr")
            return [["".join(td.itertext()) for td in row.findall("td")] for row in bodies]
    raise AssertionError(f"no table with a column {head!r}")


def test_page_tells_verdict_causes_issues_layers_and_provenance() -> None:
    record, issues, causes = sick_chain()
    page = report_html(record, issues, causes)
    root = parsed(page)
    assert root.findtext(".//h1") == "VANISHING in fc1, which explains 1 of 2 other issues"
    assert [h.text for h in root.iter("h2")] == [
        "The model",
        "Causes",
        "Issues",
        "Over steps",
        "Gradient over depth",
        "Layers × steps",
        "Layers",
        "Where NaN and Inf were born",
        "Parameters",
        "What was measured, and how",
    ]
    text = text_of(page)
    for expected in (
        causes[0].mechanism,
        causes[0].reason,
        causes[0].evidence[1],
        issues[1].description,
        issues[0].recommended_actions[0],
        "2 of 5 layer calls have no issue",
        "train mode, cpu, float32, seed 0",
        "torch version 2.13.0",
        "1 CRITICAL",
    ):
        assert expected in text
    assert [row[1] for row in rows_of(page, "Layer")] == ["fc1", "fc2", "fc3", "fc4", "fc5"]
    assert [row[-1] for row in rows_of(page, "Layer")] == ["CRITICAL", "HIGH", "", "LOW", ""]
    assert rows_of(page, "Born in")[0][:5] == ["3", "inf", "fc4", "Linear", "exp"]
    assert len(rows_of(page, "Parameter")) == 5


def test_page_of_a_healthy_model_says_so() -> None:
    page = report_html(chain_record(), (), ())
    assert parsed(page).findtext(".//h1") == "No illness found"
    assert "HEALTHY" in text_of(page)
    assert [h.text for h in parsed(page).iter("h2")][:2] == ["The model", "Over steps"]


def test_page_loads_nothing_from_anywhere() -> None:
    page = report_html(*sick_chain())
    root = parsed(page)
    tags = {element.tag for element in root.iter()}
    assert not tags & {"link", "iframe", "object", "embed", "image", "use", "base"}
    attributes = {name for element in root.iter() for name in element.attrib}
    assert not attributes & {"srcset", "action", "data", "poster"}
    assert not any(name.startswith("on") for name in attributes)
    assert all(element.attrib["href"].startswith("#") for element in root.iter() if "href" in element.attrib)
    images = [element.attrib["src"] for element in root.iter() if "src" in element.attrib]
    assert len(images) == 2
    for image in images:
        assert image.startswith("data:image/png;base64,")
        page = page.replace(image, "")
    assert not re.search(r"url\(|@import|https?:|//", page)
    (code,) = root.iter("script")
    assert "fetch" not in str(code.text)
    assert "XMLHttpRequest" not in str(code.text)


def test_links_lead_to_what_is_on_the_page() -> None:
    root = parsed(report_html(*sick_chain()))
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    links = {element.attrib["href"][1:] for element in root.iter("a")}
    assert links >= {"layer-0", "layer-1", "layer-3", "issue-0", "issue-2"}
    assert links <= set(ids)


def test_every_text_from_outside_is_escaped() -> None:
    given: list[str] = []

    def hostile(tag: str) -> str:
        given.append(f"""<script>{tag}("x")</script>&'`""")
        return given[-1]

    record, _, causes = sick_chain()
    issue = make_issue(
        hostile("issue-layer"),
        layer_type=hostile("issue-type"),
        description=hostile("description"),
        recommended_actions=(hostile("action"),),
        metrics={hostile("metric"): hostile("metric-value")},
    )
    cause = attrs.evolve(
        causes[0],
        layer=hostile("cause-layer"),
        mechanism=hostile("mechanism"),
        reason=hostile("reason"),
        evidence=(hostile("evidence"),),
        issues=(issue,),
    )
    numeric = attrs.evolve(
        record.numerics[0],
        layer=hostile("birth-layer"),
        layer_type=hostile("birth-type"),
        op=hostile("op"),
        phase=hostile("phase"),
        value=hostile("value"),
        line=hostile("line"),
    )
    provenance = Provenance(
        model=hostile("model"),
        versions={hostile("library"): hostile("version")},
        notes=(hostile("note"),),
        device=hostile("device"),
        dtypes=(hostile("dtype"),),
        mode=hostile("mode"),
        transform=hostile("transform"),
        transform_reason=hostile("why"),
    )
    sick = FlowRecord(
        steps=2,
        losses=[1.0, 2.0],
        layers=[layer_record(hostile("layer"), [1.0, 2.0], type=hostile("type"))],
        parameters=[parameter_record(hostile("parameter"), [1.0, 2.0])],
        numerics=[numeric],
        never_called=(hostile("never"),),
        provenance=provenance,
    )
    page = report_html(sick, [issue], [cause])
    assert page.count("<script") == 1  # the page's own
    text = text_of(page)
    assert [entry for entry in given if entry not in text] == []


@pytest.mark.parametrize(
    "grads",
    [
        [0.0, 0.0],
        [np.nan, np.nan],
        [np.inf, 1.0],
        [1e-300, 1e300],
        [1.0],
        [],
    ],
)
def test_any_gradient_can_be_drawn(grads: list[float]) -> None:
    layers = [layer_record("", grads), layer_record("b", grads, shape=())]
    parameters = [parameter_record("b.weight", grads, norm=np.zeros(len(grads)))]
    record = FlowRecord(steps=len(grads), losses=grads, layers=layers, parameters=parameters)
    page = report_html(record, (), ())
    assert rows_of(page, "Layer")[0][1] == "(model)"
    assert not re.search(r'="(nan|-?inf)', page)


def test_an_empty_record_can_be_drawn() -> None:
    page = report_html(FlowRecord(steps=0, losses=[], layers=(), parameters=()), (), ())
    assert parsed(page).findtext(".//h1") == "No illness found"


def test_a_huge_model_shows_every_layer_and_folds_its_picture() -> None:
    depth = MAX_SPARKLINES + 50
    record = chain_record(depth=depth, steps=2, decay=1.0)
    issues = [make_issue(f"fc{depth}", IssueType.EXPLODING, IssueSeverity.HIGH)]
    page = report_html(record, issues, ())
    rows = rows_of(page, "Layer")
    assert len(rows) == len(rows_of(page, "Parameter")) == depth
    assert (rows[-1][1], rows[-1][-1]) == (f"fc{depth}", "HIGH")
    boxes = [e for e in parsed(page).iter("g") if e.attrib.get("class", "").startswith("box ")]
    assert 20 <= len(boxes) <= 32
    assert sum(int(box.attrib["data-rows"]) for box in boxes) == depth
    assert boxes[-1].attrib["data-issues"] == "0"


def test_many_issues_are_all_there_the_later_ones_folded_and_shorter() -> None:
    count = MAX_EVIDENCE + 5
    issues = [make_issue(f"fc{i + 1}", recommended_actions=("one", "two")) for i in range(count)]
    root = parsed(report_html(chain_record(depth=count, steps=2, decay=1.0), issues, ()))
    cards = list(root.iter("article"))
    assert [card.attrib["id"] for card in cards] == [f"issue-{i}" for i in range(count)]
    (rest,) = [e for e in root.iter("details") if e.attrib.get("class") == "rest"]
    assert rest.findtext("summary") == f"{count - MAX_OPEN} more"
    assert len(rest.findall("article")) == count - MAX_OPEN
    assert [len(list(card.iter("li"))) for card in (cards[0], cards[-1])] == [2, 1]


@pytest.mark.parametrize("loss", [0.0, 1.6e19, -1e308, 1.7e308, 5e-324, np.inf, np.nan])
def test_a_page_of_a_constant_loss_is_written(loss: float) -> None:
    record = chain_record(depth=2, steps=3, losses=[loss] * 3)
    assert "loss over 3 steps" in text_of(report_html(record, (), ()))
    one = chain_record(depth=2, steps=1, losses=[loss])
    assert "loss over 1 steps" in text_of(report_html(one, (), ()))


def test_a_confidence_that_is_no_number_draws_no_bar() -> None:
    record, issues, causes = sick_chain()
    page = report_html(record, issues, [attrs.evolve(causes[0], confidence=float("nan"))])
    assert 'style="width:0%"' in page
