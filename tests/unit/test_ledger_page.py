"""The page on the ledger does what it says: its commands, its code and its messages."""

import os
import re
import shlex
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treadle.cli.app import app
from treadle.errors import TreadleError
from treadle.privacy.chain import START, Head, Row, checked, linked
from treadle.privacy.ledger import Ledger

PAGE = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    treadle (.*)$", PAGE, flags=re.MULTILINE)
MESSAGES = re.findall(r"^    treadle: (.*)$", PAGE, flags=re.MULTILINE)


def shown(line: str) -> str:
    result = CliRunner().invoke(app, shlex.split(line))
    assert result.exit_code == 0, f"{line}\n{result.stderr}"
    return result.stdout


def test_the_page_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text,label\na,1\n")
    made, rest = COMMANDS[0], COMMANDS[1:]
    shown(made)
    names: dict[str, object] = {
        "path": Path("silo.ledger"),
        "rows": Path("rows.csv"),
        "run": "7f3a",
        "server_round": 1,
        "request": "0" * 64,
        "noised": lambda: os.urandom(8),
    }
    block = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block is not None
    exec(compile(block[1], "docs/ledger.md", "exec"), names)
    seen = "".join(shown(line) for line in rest)
    assert "ward" in seen
    assert Ledger.open(Path("silo.ledger")).verify().number == 4  # created, registered, debited, allowed
    with pytest.raises(TreadleError) as raised:
        Ledger.open(Path("silo.ledger")).register("fresh", budget=names["Budget"](1.0, 1e-6), source=Path("rows.csv"))
    assert str(raised.value) == MESSAGES[0]


def test_the_page_shows_the_tables_that_are_there(tmp_path: Path) -> None:
    connection = sqlite3.connect(Ledger.create(tmp_path / "l").path)
    for (table,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] != "one"]
        assert f"| `{table}` | " + ", ".join(f"`{column}`" for column in columns) + " |" in PAGE
    connection.close()


def test_the_message_about_a_broken_row_is_the_real_one() -> None:
    rows = [linked(START, b"1")]
    for body in (b"2", b"3", b"4"):
        rows.append(linked(Head(rows[-1].number, rows[-1].hash), body))
    rows[3] = Row(4, b"changed", rows[3].hash)
    with pytest.raises(TreadleError) as raised:
        checked(rows, after=START, until=Head(4, rows[3].hash), where="silo.ledger")
    assert str(raised.value) == MESSAGES[1]
