"""Rendering: console text, HTML, plots, progress. The only part of gradflow that renders."""

from gradflow.report.html.page import report_html
from gradflow.report.progress import progress_bar
from gradflow.report.report import Report
from gradflow.report.text.attention import attention_text
from gradflow.report.text.coloured import write_text
from gradflow.report.text.full import full_text, summary_text
from gradflow.report.text.policy import policy_text
from gradflow.report.text.recurrent import dynamics_text
from gradflow.report.text.short import short_text
from gradflow.report.wording import healthy_layers

__all__ = [
    "Report",
    "attention_text",
    "dynamics_text",
    "full_text",
    "healthy_layers",
    "policy_text",
    "progress_bar",
    "report_html",
    "short_text",
    "summary_text",
    "write_text",
]
