"""What a report tells of trials: in text, JSON and HTML, and how sure its causes become; and the command."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from torch import nn

import gradflow as gf
from gradflow.cli import main
from gradflow.errors import RecordFormatError, RecordInputError
from gradflow.records import TrialRecord, TrialsRecord, TrialVerdict
from tests.remedies.models import dead_net, drawn


def report() -> gf.Report:
    return gf.diagnose(dead_net(), drawn(), nn.MSELoss(), steps=3)


def trial(verdict: TrialVerdict, remedy: str = "a < b", gone: float = 1.0) -> TrialRecord:
    return TrialRecord(
        remedy=remedy, words="Words.", code="x < y", layer="0", issue_type=gf.IssueType.DEAD, verdict=verdict,
        why="loss after 5 steps 0.31 instead of 2.3 (2 seeds); the issue is gone", steps=5, gone=gone,
        losses_without=np.full((5, 2), 2.3), losses_with=[[2.0, np.nan]] * 4 + [[0.31, np.inf]],
        gain=0.9, gain_spread=0.1, present=1.0, new_issues=("EXPLODING in out",), seconds=0.5,
    )  # fmt: skip


def told(*trials: TrialRecord) -> gf.Report:
    return report().with_trials(
        TrialsRecord(trials=trials, steps=5, seeds=2, optimizer="Adam", num_batches=5)
    )


@pytest.mark.parametrize(
    ("trials", "low", "high", "reason"),
    [
        ([trial(TrialVerdict.CURES)], 0.95, 1.0, "confirmed by trial: a < b cures it"),
        (
            [trial(TrialVerdict.HELPS), trial(TrialVerdict.HARMS)],
            0.85,
            0.95,
            "confirmed by trial: a < b helps",
        ),
        ([trial(TrialVerdict.NO_EFFECT)], 0.0, 0.2, "not confirmed: with the issue gone"),
        (
            [trial(TrialVerdict.NO_EFFECT, gone=0.0)],
            0.3,
            0.5,
            "of 1 remedies tried, none mends it and lowers the loss",
        ),
    ],
)
def test_confidence_is_what_trials_say(trials: Any, low: float, high: float, reason: str) -> None:
    cause = told(*trials).causes[0]
    assert low <= cause.confidence <= high
    assert reason in cause.reason


def test_text_and_page_show_the_best_first() -> None:
    found = told(trial(TrialVerdict.NO_EFFECT, "useless"), trial(TrialVerdict.CURES))
    assert "Tried     [cures] a < b: loss after 5 steps 0.31 instead of 2.3" in str(found)
    text = found.text("full")
    assert text.index("[cures] a < b: loss after 5 steps 0.31 instead of 2.3") < text.index(
        "[no effect] useless"
    )
    assert "trials   2 fix(es) tried on copies, 5 steps of Adam, up to 2 seed(s), on 5 batches." in text


def test_the_page_holds_both_curves_and_the_code(tmp_path: Path) -> None:
    path = tmp_path / "flow.html"
    told(trial(TrialVerdict.CURES), trial(TrialVerdict.NOT_APPLICABLE, "bad")).to_html(path)
    page = path.read_text(encoding="utf-8")
    ET.fromstring(page.removeprefix("<!DOCTYPE html>\n"))  # everything is escaped
    assert "x &lt; y" in page
    assert "without it</span>" in page
    assert "Loss over steps, mean over seeds" in page
    assert "not applicable: bad" in page
    alone = tmp_path / "alone.html"
    told(trial(TrialVerdict.NOT_APPLICABLE, "bad")).to_html(alone)
    assert "mean over seeds" not in alone.read_text(encoding="utf-8")


def test_json_brings_trials_back() -> None:
    found = told(trial(TrialVerdict.CURES), trial(TrialVerdict.HARMS, "b"))
    back = gf.Report.from_json(found.to_json())
    assert back == found
    assert back.trials is not None
    assert back.trials.best(back.causes[0]) == found.trials.best(found.causes[0])  # type: ignore[union-attr]
    assert gf.Report.from_json(report().to_json()).trials is None
    broken = found.to_json().replace('"verdict": "cures"', '"verdict": "mends"')
    with pytest.raises(RecordFormatError, match=r"verdict.*expected one of cures"):
        gf.Report.from_json(broken)


def test_what_is_no_trials_record_is_refused() -> None:
    with pytest.raises(RecordInputError, match=r"with_trials: expected a TrialsRecord, got list"):
        report().with_trials([1])  # type: ignore[arg-type]
    with pytest.raises(RecordInputError, match="with_trials: expected a TrialsRecord"):
        report().with_trials(None)  # type: ignore[arg-type]
    with pytest.raises(RecordInputError, match="Report: expected a TrialsRecord, got dict"):
        attrs.evolve(report(), trials={})


def test_the_best_is_the_one_that_does_most() -> None:
    weak = attrs.evolve(trial(TrialVerdict.HELPS, "weak"), losses_with=np.full((5, 2), 1.0))
    strong = attrs.evolve(trial(TrialVerdict.HELPS, "strong"), losses_with=np.full((5, 2), 0.5))
    trials = TrialsRecord(trials=[trial(TrialVerdict.HARMS), weak, strong])
    cause = report().causes[0]
    assert [t.remedy for t in trials.of(cause)] == ["strong", "weak", "a < b"]
    once = attrs.evolve(
        strong, remedy="once", losses_without=np.full((5, 1), 2.3), losses_with=np.zeros((5, 1))
    )
    assert TrialsRecord(trials=[once, strong]).best(cause) is strong  # more seeds, more weight
    assert np.isnan(trial(TrialVerdict.HELPS).loss_with)  # with one seed it was not finite
    assert strong.loss_without == 2.3


def test_the_command_tries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))\n"
        "    nn.init.constant_(net[0].bias, -9.0)\n"
        "    x = torch.randn(64, 8)\n    optimizer = torch.optim.Adam(net.parameters(), 0.01)\n"
        "    return net, [(x, x[:, :1])] * 5, nn.MSELoss(), optimizer\n",
        encoding="utf-8",
    )
    assert main(["diagnose", str(file), "--steps", "5", "--try", "--budget", "60", "--no-progress"]) == 0
    text = capsys.readouterr().out
    assert "Tried     [cures] kaiming_normal_ on 0, bias 0: loss after 50 steps" in text
