"""Text, JSON and page of a run carry the same facts: what, where, how grave, and what to do first."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import gradflow as gf


def sigmoids() -> nn.Module:
    layers = [part for _ in range(9) for part in (nn.Linear(16, 16), nn.Sigmoid())]
    return nn.Sequential(*layers, nn.Linear(16, 4))


def dead() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    nn.init.constant_(model[2].bias, -100.0)
    return model


def loud() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    nn.init.normal_(model[1].weight, std=9.0)
    return model


def unheld() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def report_of(build: Callable[[], nn.Module]) -> gf.Report:
    torch.manual_seed(0)
    model = build()
    batch = lambda: (torch.randn(32, 16), torch.randint(0, 4, (32,)))  # noqa: E731
    held = model[0].parameters() if build is unheld else model.parameters()
    optimizer = torch.optim.SGD(held, 0.01)
    return gf.diagnose(model, batch, nn.CrossEntropyLoss(), optimizer=optimizer, steps=6, seed=0)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("build", [sigmoids, dead, loud, unheld])
def test_every_rendering_carries_the_same_facts(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    report = report_of(build)
    assert report.issues
    text, short = squeezed(report.text("full")), squeezed(report.text())
    saved = json.loads(report.to_json())["issues"]
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    cards = [squeezed(html.unescape(re.sub(r"<[^>]*>", "", card)))
             for card in re.findall(r"<article.*?</article>", page, re.DOTALL)]  # fmt: skip
    assert len(saved) == len(cards) == len(report.issues)
    for issue, data, card in zip(report.issues, saved, cards, strict=True):
        kind, grave, name = issue.issue_type.value, issue.severity.value, issue.layer or "(model)"
        first = issue.recommended_actions[0]
        assert f"[{grave}] {kind} in {name} ({issue.layer_type})" in text
        assert first in text
        assert (data["issue_type"], data["severity"], data["layer"]) == (kind, grave, issue.layer)
        assert data["recommended_actions"][0] == first
        assert card.startswith(f"{grave} {kind} in {name}")
        assert first in card
    cause = report.causes[0]
    head = f"{cause.issue_type.value} in {cause.layer or '(model)'}"
    for told in (text, short, squeezed(html.unescape(page))):
        assert head in told
        assert cause.mechanism in told
        assert cause.issues[0].recommended_actions[0] in told
    assert len(report.text().splitlines()) <= 25
