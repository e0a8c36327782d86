"""Rendering: console text, HTML, plots, progress. The only part of gradflow that renders."""

from gradflow.report.attention import attention_text
from gradflow.report.console import report_text, summary_text
from gradflow.report.html import report_html
from gradflow.report.policy import policy_text
from gradflow.report.recurrent import dynamics_text
from gradflow.report.report import Report
from gradflow.report.wording import healthy_layers

__all__ = [
    "Report",
    "attention_text",
    "dynamics_text",
    "healthy_layers",
    "policy_text",
    "report_html",
    "report_text",
    "summary_text",
]
