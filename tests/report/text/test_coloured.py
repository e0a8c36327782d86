"""Text on a terminal: the same letters, in colours where rich is installed and the user wants them."""

from __future__ import annotations

import io
import re

import pytest

from gradflow.report import Report, write_text
from tests.samples import sick_chain

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def text() -> str:
    record, issues, causes = sick_chain()
    return Report(record=record, issues=issues, causes=causes).text() + "\n[b]:smile: " + "long " * 60 + "end"


def written(stream: io.StringIO) -> str:
    write_text(text(), stream)
    return stream.getvalue()


def test_elsewhere_it_is_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert written(io.StringIO()) == text() + "\n"


def test_on_a_terminal_it_is_the_same_in_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    found = written(Terminal())
    assert "\x1b[1;31m[CRITICAL]\x1b[0m" in found
    assert ESCAPES.sub("", found) == text() + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3\d", written(Terminal()))
    monkeypatch.setenv("TERM", "dumb")
    assert written(Terminal()) == text() + "\n"


def test_without_rich_a_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert written(Terminal()) == text() + "\n"
