"""Every rendering of a run carries the same facts of every issue; the short one has them on one screen.

The models are a part of the labelled ones in `benchmarks/verdicts/zoo`, all seven types of issue among them;
with GRADFLOW_WHOLE_ZOO=1 all that are sick.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import gradflow as gf
from benchmarks.verdicts.zoo import CASES
from gradflow.report.wording import cause_evidence, cause_title, explaining, issue_title, metrics_line

ZOO = (
    "mlp-insurance-claims",
    "mlp-default-init-too-deep",
    "mlp-epsilon-sign-forgotten",
    "mlp-timestamp-column",
    "rnn-summary-of-one-number",
    "rnn-gate-stuck-shut",
    "graph-mean-over-no-neighbours",
    "diffusion-time-from-zero-to-thousand",
    "contact2b-hyperbolic-boundary",
    "contact4a-diffusion-lora_zeroed",
)

WHOLE = bool(os.environ.get("GRADFLOW_WHOLE_ZOO"))
if WHOLE:
    ZOO = tuple(name for name, case in CASES.items() if case.expect)


@functools.cache
def report_of(name: str) -> gf.Report:
    """Return the report on a model of the zoo; or on one of which no optimizer holds the last layer."""
    if name != "unheld":
        with warnings.catch_warnings():
            warnings.simplefilter("default" if WHOLE else "error")  # of the models' own code
            setup = CASES[name].build()
            return gf.diagnose(
                setup.model, setup.make_batch, setup.loss_fn, optimizer=setup.optimizer(), steps=8, seed=0
            )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), 0.01)
    batch = torch.randn(32, 16), torch.randint(0, 4, (32,))
    return gf.diagnose(model, [batch] * 6, nn.CrossEntropyLoss(), optimizer=optimizer, seed=0)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def read(markup: str) -> str:
    """Return what a reader sees of HTML."""
    return squeezed(html.unescape(re.sub(r"<[^>]*>", " ", markup)))


# Each returns what a format tells of every issue, in their order, as one text per issue.


def of_text(report: gf.Report) -> list[str]:
    causes, _, issues = report.text("full").partition("Details:\n")
    blocks = [block for block in issues.split("\n\n") if block.startswith("[")]
    return [squeezed(causes + block) for block in blocks]  # causes are told once, each issue names its own


def of_json(report: gf.Report) -> list[str]:
    data = json.loads(report.to_json())
    again, found = gf.Report.from_json(json.dumps(data)), []
    for issue in data["issues"]:
        kind, name = issue["issue_type"], issue["layer"] or "(model)"
        told = [f"[{issue['severity']}] {kind} in {name} ({issue['layer_type']})", issue["description"]]
        told += issue["recommended_actions"]
        cause = next((c for c in data["causes"] if issue in c["issues"]), None)
        if cause is not None:
            at = f"{cause['issue_type']} in {cause['layer'] or '(model)'}"
            told += [f"{at}, confidence {cause['confidence']:.2f}", cause["mechanism"], *cause["evidence"]]
        found.append(squeezed("; ".join([*told, metrics_line(again.issues[len(found)])])))
    return found


def of_page(report: gf.Report) -> list[str]:
    page = report.html()
    (causes,) = re.findall(r'<section id="causes">.*?</section>', page, re.DOTALL) or [""]
    cards = re.findall(r"<article.*?</article>", page, re.DOTALL)
    told = []
    for issue, card in zip(report.issues, cards, strict=True):
        pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", card)
        metrics = ", ".join(f"{name} {value}" for name, value in pairs if value not in ("–", ""))
        seen = read(card)
        head = f"{issue.severity.value} {issue.issue_type.value} in {issue.layer or '(model)'}"
        assert seen.startswith(f"{head} {issue.layer_type},")
        told.append(f"{issue_title(issue)} {seen} {read(metrics)} {read(causes)}")
    return told


def of_markdown(report: gf.Report) -> list[str]:
    markdown_it = pytest.importorskip("markdown_it")
    page = markdown_it.MarkdownIt("commonmark").render(report.markdown())
    causes, _, issues = page.partition("<details><summary>All")
    blocks = re.split(r"<p>(?=<strong>\[)", issues)[1:]
    return [squeezed(f"{read(block)} {read(causes)}").replace(" (", " (") for block in blocks]


def of_annotations(report: gf.Report) -> list[str]:
    told = []
    for line in report.annotations("net.py", line=3).splitlines():
        match = re.fullmatch(r"::(error|warning|notice) file=net\.py,line=3,title=([^,:]*)::(.*)", line)
        assert match is not None, line
        level, title, message = match.groups()
        text = f"{title}\n{message}"
        for escape, letter in (("%3A", ":"), ("%2C", ","), ("%0A", "\n"), ("%0D", "\r"), ("%25", "%")):
            text = text.replace(escape, letter)
        grave = "error" if "[CRITICAL]" in title or "[HIGH]" in title else "warning"
        assert level == ("notice" if re.search(r"\[(LOW|INFO)\]", title) else grave)
        told.append(squeezed(text))
    return told


FORMATS = {
    "text": of_text,
    "json": of_json,
    "page": of_page,
    "markdown": of_markdown,
    "github": of_annotations,
}


@pytest.mark.parametrize("told_in", FORMATS)
@pytest.mark.parametrize("name", [*ZOO, "unheld"])
def test_every_issue_has_the_same_facts_in_every_format(name: str, told_in: str) -> None:
    report = report_of(name)
    if WHOLE and not report.issues:
        pytest.skip("no issue within eight steps")
    told = FORMATS[told_in](report)
    cut = told_in == "markdown" and len(report.issues) > 50  # a comment has 65,536 letters, and says so
    assert len(told) == len(report.issues) >= 1 or cut
    found = explaining(report.causes)
    for issue, text in zip(report.issues, told, strict=not cut):
        cause = found.get((issue.layer, issue.issue_type))
        facts = [issue_title(issue), issue.description, *issue.recommended_actions[:1], metrics_line(issue)]
        if cause is not None:
            facts += [cause_title(cause), cause.mechanism, cause_evidence(cause)]
        for fact in facts:
            assert squeezed(fact) in text, (told_in, fact, text)


def test_all_seven_types_are_among_them_and_causes_explain_most() -> None:
    issues = [issue for name in ZOO for issue in report_of(name).issues]
    assert {issue.issue_type for issue in issues} == set(gf.IssueType)
    explained = sum(len(cause.issues) for name in ZOO for cause in report_of(name).causes)
    assert explained > 0.9 * len(issues)


@pytest.mark.parametrize("width", [100, 80])
@pytest.mark.parametrize("name", [*ZOO, "unheld"])
def test_cause_evidence_and_fix_stand_on_one_screen(name: str, width: int) -> None:
    report = report_of(name)
    if WHOLE and not report.causes:
        pytest.skip("no cause within eight steps")
    short = report.text(width=width)
    lines = short.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= width
    cause = report.causes[0]
    text = squeezed(short)
    head = f"[{cause.issues[0].severity.value}] {cause.issue_type.value} in {cause.layer or '(model)'}"
    assert text.count(head) == 1
    for fact in (
        f"confidence {cause.confidence:.2f}",
        f"Cause {cause.mechanism}",
        f"Measured {cause_evidence(cause)}",
        *cause.issues[0].recommended_actions[:1],
    ):
        assert squeezed(fact) in text, fact


@pytest.mark.parametrize("name", ZOO[:4])
def test_a_report_comes_back_from_json_as_it_was(name: str, tmp_path: Path) -> None:
    report = report_of(name)
    report.to_json(tmp_path / "flow.json")
    again = gf.Report.from_json(tmp_path / "flow.json")
    assert again == report
    renderings: list[Callable[[gf.Report], str]] = [
        gf.Report.text, gf.Report.markdown, gf.Report.annotations, gf.Report.html, gf.Report.to_json,
    ]  # fmt: skip
    assert [tell(again) for tell in renderings] == [tell(report) for tell in renderings]
