"""The report as annotations of a run on GitHub: one workflow command for each issue, a line each.

GitHub, "Workflow commands for GitHub Actions": `::error file=..,line=..,title=..::message`.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradflow.records import Cause, FlowRecord, Issue, IssueSeverity
from gradflow.report.wording import explaining, issue_facts, issue_title, loss_line, model_line, verdict

_COMMANDS = {
    IssueSeverity.CRITICAL: "error", IssueSeverity.HIGH: "error", IssueSeverity.MEDIUM: "warning",
    IssueSeverity.LOW: "notice", IssueSeverity.INFO: "notice",
}  # fmt: skip


def annotations_text(
    record: FlowRecord,
    issues: Sequence[Issue],
    causes: Sequence[Cause],
    *,
    file: str = "",
    line: int | None = None,
) -> str:
    """Return an annotation for each issue, in their order; for a report without issues one that says so.

    Args:
        record: what was measured.
        issues: in the order to be shown: GitHub shows the first ten of each level.
        causes: what explains them.
        file: path of the file that they are put at, from the root of the repository; "" for none.
        line: of that file.
    """
    place = {"file": file.replace("\\", "/")} if file else {}
    if file and line is not None:
        place["line"] = str(line)
    if not issues:
        level = "error" if record.failed else "notice"
        told = f"{model_line(record)}; loss {loss_line(record)}"
        return _command(level, {**place, "title": f"gradflow: {verdict(issues, causes, record)}"}, told)
    found = explaining(causes)
    return "\n".join(
        _command(
            _COMMANDS[issue.severity],
            {**place, "title": f"gradflow: {issue_title(issue)}"},
            "\n".join(
                text if label == "Seen" else f"{label}: {text}"
                for label, text in issue_facts(issue, found.get((issue.layer, issue.issue_type)))
            ),
        )
        for issue in issues
    )


def _command(level: str, properties: dict[str, str], message: str) -> str:
    told = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{level} {told}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
