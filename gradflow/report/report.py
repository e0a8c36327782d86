"""`Report`: one run's record, the issues seen in it, their causes, and the ways to show or save them."""

from __future__ import annotations

import json
from pathlib import Path

import attrs

from gradflow.records import FORMAT_VERSION, Cause, FlowRecord, Issue, to_plain
from gradflow.report.console import report_text
from gradflow.report.html import report_html
from gradflow.report.wording import serious_issues


@attrs.frozen(kw_only=True, repr=False)
class Report:
    """The answer of `gradflow.diagnose`. `print(report)` tells it in words.

    Args:
        record: what was measured.
        issues: the verdicts, most severe first.
        causes: what explains them, the one that explains most first.
    """

    record: FlowRecord
    issues: tuple[Issue, ...] = attrs.field(default=(), converter=tuple)
    causes: tuple[Cause, ...] = attrs.field(default=(), converter=tuple)

    @property
    def ok(self) -> bool:
        """Whether no issue is of severity MEDIUM or above."""
        return not serious_issues(self.issues)

    def __str__(self) -> str:
        return report_text(self.record, self.issues, self.causes)

    def __repr__(self) -> str:
        model = self.record.provenance.model or "model"
        return (
            f"Report({model}: {'ok' if self.ok else 'sick'}, "
            f"{len(self.issues)} issues, {len(self.causes)} causes)"
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as strict JSON, and write it to `path` where one is given.

        The object has the keys `format`, `ok`, `issues`, `causes` and `record`; the last one is what
        `FlowRecord.from_json` reads.
        """
        text = json.dumps({"format": FORMAT_VERSION, "ok": self.ok, **to_plain(self)}, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str | Path) -> None:
        """Write the report to `path` as one HTML file that needs nothing else."""
        Path(path).write_text(report_html(self.record, self.issues, self.causes), encoding="utf-8")
