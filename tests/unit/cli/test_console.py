"""What goes to which stream, and how."""

import json
import sys

import pytest

from treadle.cli import console
from treadle.cli.console import print_json, print_table, say, working


def test_json_has_no_nan_and_no_foreign_types(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": (1, float("inf")), None: {"c": True}, "d": frozenset({"x"})})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "base": {"c": True}, "d": ["x"]}


def test_text_from_outside_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("[red]kept[/red]")
    print_table("[b]title[/b]", ("name", "value"), [("[i]cell[/i]", 0.123456), ("other", None)])
    said = capsys.readouterr().out
    for text in ("[red]kept[/red]", "[b]title[/b]", "[i]cell[/i]", "0.1235", "–"):
        assert text in said


def test_what_libraries_print_during_work_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with working():
        print("chatter")
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "chatter" in seen.err


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    show = console._lines()
    show("early", 0, 2)
    show("later", 1, 2)
    show("soon after", 2, 2)
    assert capsys.readouterr().err == "[1 s] early (0/2)\n[11 s] later (1/2)\n"


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with working() as progress:
        progress("measuring [everything]", 1, 2)
        progress("nobody knows", 0, 0)
    assert "nobody knows" in terminal.getvalue()
