"""`Report`: one run's record, the issues seen in it, their causes, and the ways to show or save them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from gradflow.errors import RecordFormatError, RecordInputError
from gradflow.records import (
    FORMAT_VERSION,
    Cause,
    FlowRecord,
    Issue,
    IssueSeverity,
    TrialsRecord,
    TrialVerdict,
    check_causes,
    check_issues,
    check_record,
    every_scalar,
    few_scalars,
    from_plain,
    read,
    text_lines,
    to_plain,
    write,
)
from gradflow.records.showing import Shown
from gradflow.report.html.page import report_html
from gradflow.report.text.annotations import annotations_text
from gradflow.report.text.full import full_text
from gradflow.report.text.markdown import markdown_text
from gradflow.report.text.short import WIDTH, short_text
from gradflow.report.wording import serious_issues

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _to_lines(value: Any) -> tuple[str, ...]:
    lines = text_lines(value)
    if lines is None:
        raise RecordInputError(f"Report: expected lines of text, got {value!r}.")
    return lines


def _check_trials(call: str, value: Any) -> None:
    if value is not None and not isinstance(value, TrialsRecord):
        raise RecordInputError(
            f"{call}: expected a TrialsRecord, got {type(value).__name__}: try_remedies(report, model, ...) "
            "returns one."
        )


# How sure a cause is once remedies were tried. A remedy that cures took away what was measured and let the
# model learn; that is as near to certain as runs on other seeds and batches allow.
_CURED, _HELPED, _USELESS, _MENDED_IN_VAIN = 0.97, 0.85, 0.4, 0.15


@attrs.frozen(kw_only=True, repr=False)
class Report(Shown):
    """The answer of `gradflow.diagnose`. `print(report)` tells it in short, `report.text("full")` whole.

    Args:
        record: what was measured.
        issues: the verdicts, most severe first.
        causes: what explains them, the one that explains most first.
        lines: what the pipeline's summaries tell of the record.
        trials: what became of the model when fixes were tried; None where none were: see `with_trials`.

    Raises:
        RecordInputError: if any of these is something else.
    """

    record: FlowRecord = attrs.field(validator=lambda report, field, value: check_record("Report", value))
    issues: tuple[Issue, ...] = attrs.field(default=(), converter=lambda v: check_issues("Report", v))
    causes: tuple[Cause, ...] = attrs.field(default=(), converter=lambda v: check_causes("Report", v))
    lines: tuple[str, ...] = attrs.field(default=(), converter=_to_lines)
    trials: TrialsRecord | None = attrs.field(
        default=None, validator=lambda report, field, value: _check_trials("Report", value)
    )

    @property
    def ok(self) -> bool:
        """Whether something was measured, and no issue is of severity MEDIUM or above."""
        return not serious_issues(self.issues) and not self.record.failed

    def scalars(self, which: Literal["few", "all"] = "few") -> dict[str, float]:
        """Return the report in plain numbers by name: what a tracker of experiments plots.

        These are the numbers of the record's last step, and of each severity how many issues have it
        (`issues/high`).

        Args:
            which: `few`, as many as the model has kinds of layers, see `gradflow.records.few_scalars`; or
                `all`, see `gradflow.records.every_scalar`.

        Raises:
            ValueError: if `which` is neither.

        >>> from gradflow.records import FlowRecord
        >>> report = Report(record=FlowRecord(steps=1, losses=[0.5], layers=(), parameters=()))
        >>> numbers = report.scalars()
        >>> numbers["loss"], numbers["issues/critical"]
        (0.5, 0.0)
        """
        if which not in ("few", "all"):
            raise ValueError(f"which must be few or all, got {which!r}.")
        numbers = few_scalars(self.record) if which == "few" else every_scalar(self.record)
        severities = [issue.severity for issue in self.issues]
        return numbers | {f"issues/{s.value.lower()}": float(severities.count(s)) for s in IssueSeverity}

    def text(self, which: Literal["short", "full"] = "short", *, width: int = WIDTH) -> str:
        """Return the report in words.

        Args:
            which: `short`, which `print(report)` shows: 25 lines with the verdict, and of each cause where it
                is, what was measured and what to change; or `full`, with all evidence and every issue.
            width: letters in a line of the short text; the full text is not wrapped.

        Raises:
            ValueError: if `which` is neither.

        >>> from gradflow.records import FlowRecord
        >>> report = Report(record=FlowRecord(steps=1, losses=[0.5], layers=(), parameters=()))
        >>> report.text().splitlines()[0]
        'gradflow: no illness found'
        """
        if which not in ("short", "full"):
            raise ValueError(f"which must be short or full, got {which!r}.")
        parts = (self.record, self.issues, self.causes, self.lines, self.trials)
        return short_text(*parts, width=width) if which == "short" else full_text(*parts)

    def markdown(self) -> str:
        """Return the report as Markdown that fits a comment on a pull request.

        It opens with the verdict; each cause has its evidence and what to change; every issue stands in a
        part that opens on a click. It has at most 60 000 letters, and tells what was left out.

        >>> from gradflow.records import FlowRecord
        >>> report = Report(record=FlowRecord(steps=1, losses=[0.5], layers=(), parameters=()))
        >>> report.markdown().splitlines()[0]
        '### gradflow: no illness found'
        """
        return markdown_text(self.record, self.issues, self.causes, self.lines, self.trials)

    def annotations(self, file: str | os.PathLike[str] = "", *, line: int | None = None) -> str:
        """Return the report as annotations of a run of GitHub Actions, one line for each issue.

        Printed in a step, they are shown at the file in the pull request: CRITICAL and HIGH as errors,
        MEDIUM as a warning, what is below as a notice. Without issues it is one notice that says so.

        Args:
            file: where to put them: the path of a file from the root of the repository; "" puts them nowhere.
            line: of that file.

        >>> from gradflow.records import FlowRecord
        >>> report = Report(record=FlowRecord(steps=1, losses=[0.5], layers=(), parameters=()))
        >>> report.annotations("net.py").partition(",title=")[0]
        '::notice file=net.py'

        GitHub, "Workflow commands for GitHub Actions".
        """
        return annotations_text(self.record, self.issues, self.causes, file=os.fspath(file), line=line)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        model = self.record.provenance.model or "model"
        return (
            f"Report({model}: {'ok' if self.ok else 'sick'}, "
            f"{len(self.issues)} issues, {len(self.causes)} causes)"
        )

    def with_trials(self, trials: TrialsRecord) -> Report:
        """Return the report with what became of the model when fixes were tried.

        The confidence of a cause is what trials say, where they were made: one that a remedy cures or helps
        is confirmed; one whose mending changes nothing is not.

        Args:
            trials: what `gradflow.try_remedies` returned for this report.

        Raises:
            RecordInputError: if it is something else.
        """
        _check_trials("Report.with_trials", trials or "nothing")
        return attrs.evolve(self, causes=[_weighed(cause, trials) for cause in self.causes], trials=trials)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as strict JSON, and write it to `path` where one is given.

        The object has the keys `format`, `ok`, `issues`, `causes`, `lines`, `trials` and `record`; the last
        one is what `FlowRecord.from_json` reads.
        """
        return write({"format": FORMAT_VERSION, "ok": self.ok, **to_plain(self)}, path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Report:
        """Return the report from JSON text, or from a file of it.

        Args:
            source: JSON text, or the path of a file of it.

        Raises:
            RecordFormatError: if it is no report of this format; the message tells the field.
            FileNotFoundError: if it is a `Path` to no file.
        """
        data = read(source)
        if not isinstance(data, dict) or "ok" not in data:
            raise RecordFormatError.at(
                "expected a report, an object with the keys ok, record, issues, causes"
            )
        if type(data.get("format")) is not int or data["format"] != FORMAT_VERSION:
            raise RecordFormatError.at(f"expected format {FORMAT_VERSION}, got {data.get('format')!r}")
        report = from_plain(cls, {key: value for key, value in data.items() if key not in ("format", "ok")})
        if data["ok"] is not report.ok:
            raise RecordFormatError.at(f"ok: expected {report.ok}, as the issues have it, got {data['ok']!r}")
        return report

    def plot(self, path: str | Path | None = None) -> Figure:
        """Return a matplotlib figure of the report at a glance; one question each: `gradflow.report.plots`.

        Args:
            path: where to save it, as PNG, SVG or PDF by its ending; None to save nothing.

        Returns:
            The figure: the flow with its issues, the gradient of layers × steps, loss and gradient norm, and
            what else was measured. `figure.axes` are its panels, to be restyled.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from gradflow.report.plots import plot_report  # a reader of JSON needs none of it

        return plot_report(self, path)

    def html(self) -> str:
        """Return the report as one HTML page that needs nothing else."""
        return report_html(self.record, self.issues, self.causes, self.lines, self.trials)

    def to_html(self, path: str | Path) -> None:
        """Write the report to `path` as one HTML file that needs nothing else."""
        Path(path).write_text(self.html(), encoding="utf-8")


def _weighed(cause: Cause, trials: TrialsRecord) -> Cause:
    """Return a cause as sure as trials make it."""
    best = trials.best(cause)
    if best is None:
        return cause
    tried = sum(trial.verdict is not TrialVerdict.NOT_APPLICABLE for trial in trials.of(cause))
    if best.verdict is TrialVerdict.CURES:
        sure, reason = _CURED, f"confirmed by trial: {best.remedy} cures it"
    elif best.verdict is TrialVerdict.HELPS:
        sure, reason = max(cause.confidence, _HELPED), f"confirmed by trial: {best.remedy} helps"
    elif any(trial.gone == 1.0 for trial in trials.of(cause)):
        sure = min(cause.confidence, _MENDED_IN_VAIN)
        reason = "not confirmed: with the issue gone the model trains as before"
    else:
        sure = min(cause.confidence, _USELESS)
        reason = f"not confirmed: of {tried} remedies tried, none mends it and lowers the loss"
    return attrs.evolve(cause, confidence=sure, reason=reason)
