"""The page as a whole: its sections in their order, and the tools for searching it.

Every text that comes from the model (names, types, messages) is escaped on its way in; the page is
well-formed XML besides, so that a test can parse it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gradflow.records import Cause, FlowRecord, Issue, TrialsRecord
from gradflow.report.html.curves import curves_section, heat_section
from gradflow.report.html.drawing import boxes_of_layers, picture_section
from gradflow.report.html.findings import causes_section, headline, issues_section
from gradflow.report.html.folding import picture
from gradflow.report.html.pieces import Places, section
from gradflow.report.html.special import special_section
from gradflow.report.html.style import script, style
from gradflow.report.html.tables import (
    layers_section,
    numerics_section,
    parameters_section,
    profile_section,
    provenance_section,
)
from gradflow.report.wording import severity_counts


def report_html(
    record: FlowRecord,
    issues: Sequence[Issue],
    causes: Sequence[Cause],
    lines: Sequence[str] = (),
    trials: TrialsRecord | None = None,
) -> str:
    """Return the report as the text of one self-contained HTML page.

    Args:
        record: what was measured.
        issues: in the order to be shown.
        causes: what explains them.
        lines: what the pipeline's summaries tell of the record.
        trials: what became of the model when fixes were tried.
    """
    drawn = picture(record)
    places = Places.of(record, issues, boxes_of_layers(drawn.boxes))
    text = escape("\n".join(lines))
    findings = causes_section(causes, places, trials) + issues_section(issues, places, causes)
    body = "".join(
        [
            headline(record, issues, causes, places),
            _tools(issues),
            '<div class="sides"><div class="pane">',
            section("The model", picture_section(drawn, places), "picture"),
            f'</div><div class="found">{findings}</div></div>' if findings else "</div></div>",
            curves_section(record),
            profile_section(record.layers, places),
            heat_section(record),
            special_section(record),
            section(
                "Besides",
                f'<div class="card"><pre class="mono">{text}</pre></div>' if text else "",
                "besides",
            ),
            layers_section(record, places),
            numerics_section(record),
            parameters_section(record),
            provenance_section(record),
        ]
    )
    title = f"gradflow: {record.provenance.model or 'model'}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{style()}</style></head>"
        f"<body><main>{body}</main><script>{script()}</script></body></html>\n"
    )


def _tools(issues: Sequence[Issue]) -> str:
    """Return the search field and the filters by kind and severity; they are shown where the script runs."""
    kinds = dict.fromkeys(issue.issue_type.value for issue in issues)
    severities = [severity.value for severity, _ in severity_counts(issues)]
    choices = "".join(
        f'<select id="{name}" aria-label="only issues of this {name}"><option value="">any {name}</option>'
        f"{''.join(f'<option>{escape(value)}</option>' for value in values)}</select>"
        for name, values in (("kind", kinds), ("severity", severities))
        if values
    )
    return (
        '<nav class="tools tool" aria-label="search and filter"><input id="search" type="search" '
        f'placeholder="layer, type or words  ( / )" aria-label="search"/>{choices}'
        '<output id="count" aria-live="polite"></output>'
        '<button type="button" id="back" disabled="disabled">back</button></nav>'
    )
