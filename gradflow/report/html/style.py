"""The style sheet, the script and the names of colours of the HTML report; the page holds both."""

from __future__ import annotations

import functools
from importlib import resources

from gradflow.records import IssueSeverity

# The colours themselves are in report.css, for light and for dark; every one is told by a word besides.
NAMES: dict[IssueSeverity | None, str] = {s: s.value.lower() for s in IssueSeverity} | {None: "healthy"}


@functools.cache
def style() -> str:
    """Return the style sheet."""
    return _text("report.css")


@functools.cache
def script() -> str:
    """Return the script, so wrapped that the page is well-formed XML too."""
    return f"/*<![CDATA[*/\n{_text('report.js')}/*]]>*/"


def _text(name: str) -> str:
    return resources.files("gradflow.report.html").joinpath(name).read_text(encoding="utf-8")
