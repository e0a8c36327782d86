"""The progress bar: plain where there is no terminal or no `rich`, and always ended."""

from __future__ import annotations

import importlib.util
import io

import pytest

from gradflow.report.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_bar_is_one_line_drawn_over() -> None:
    stream = io.StringIO()
    with progress_bar(stream) as move:
        move(1, 4)
        move(4, 4)
    first, second = "#" * 7 + "." * 23, "#" * 30
    assert stream.getvalue() == f"\rmeasuring [{first}] 1/4\rmeasuring [{second}] 4/4\n"


def test_plain_bar_that_never_moved_draws_nothing() -> None:
    stream = io.StringIO()
    with progress_bar(stream):
        pass
    assert stream.getvalue() == ""


def test_plain_bar_ends_its_line_when_the_block_raises() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError, match="gone"), progress_bar(stream) as move:  # noqa: PT012
        move(1, 2)
        raise KeyError("gone")
    assert stream.getvalue().endswith("1/2\n")


def test_a_terminal_gets_the_rich_bar() -> None:
    pytest.importorskip("rich")
    stream = Terminal()
    with progress_bar(stream, label="measuring") as move:
        move(3, 4)
    assert "3/4" in stream.getvalue()
    assert "[#" not in stream.getvalue()


def test_a_terminal_without_rich_gets_the_plain_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    stream = Terminal()
    with progress_bar(stream) as move:
        move(2, 2)
    assert "[##############################] 2/2" in stream.getvalue()


def test_without_a_stream_it_is_standard_error_where_there_is_no_notebook(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar(label="trying") as move:
        move(1, 1)
    assert capsys.readouterr() == ("", f"\rtrying [{'#' * 30}] 1/1\n")
