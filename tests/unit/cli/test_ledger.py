"""`treadle ledger`: what people are shown, what programs are, and one line for whatever cannot be done."""

import contextlib
import json
import os
import resource
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from treadle.cli.app import app
from treadle.errors import UnavailableError
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.ledger import Budget, Ledger, ReleaseKey, release

EVENT = MechanismEvent(16.0, 1.0, 10)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ledger", *(str(argument) for argument in arguments)])


def parsed(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def filled(path: Path) -> Ledger:
    """Two rounds of a run for the ward, one of them paid twice, and a release of public data without noise."""
    ledger = Ledger.create(path)
    ledger.register("ward", budget=Budget(3.0, 1e-5), source=b"rows of the ward")
    ledger.register("public", budget=Budget(float("inf"), 1e-5), source=b"public rows")
    ledger.debit("ward", ReleaseKey("7f3a", 1, "q"), EVENT)  # and died
    release(ledger, "ward", ReleaseKey("7f3a", 1, "q"), EVENT, lambda: b"noised")
    release(ledger, "ward", ReleaseKey("7f3a", 2, "q"), EVENT, lambda: b"noised too")
    release(ledger, "public", ReleaseKey("7f3a", 1, "q"), None, lambda: b"bare")
    return ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return filled(tmp_path / "silo.ledger").path


def test_show_says_what_was_spent_by_whom(path: Path) -> None:
    found = parsed("show", path)
    ward, public = found["data"]
    spent = epsilon_of([MechanismEvent(16.0, 1.0, 30)], delta=1e-5)
    assert (ward["data"], ward["spent"], ward["budget"]) == ("ward", spent, {"epsilon": 3.0, "delta": 1e-5})
    assert ward["runs"] == [{"run": "7f3a", "releases": 3, "repeated": 1}]
    assert (ward["replies"], ward["reply_bytes"]) == (2, len(b"noisednoised too"))
    assert (public["spent"], public["budget"]["epsilon"], public["unaccounted"]) == ("none", "none", 1)
    assert found["rows"] == 7
    table = run("show", path)
    assert table.exit_code == 0
    assert all(word in table.stdout for word in ("ward", f"{spent:.4g}", "7f3a", "none", found["head"]))
    assert "an older copy put back" in table.stderr


def test_verify_prints_a_head_that_can_be_noted(path: Path) -> None:
    head = parsed("verify", path)["head"]
    assert head == str(Ledger.open(path).verify())
    assert head in run("verify", path).stdout
    Ledger.open(path).debit("ward", ReleaseKey("b", 1, "q"), EVENT)
    noted = run("verify", path, "--head", head)
    assert (noted.exit_code, noted.stderr) == (0, "")
    assert noted.stdout.startswith("8 rows, none broken")


def test_a_budget_is_changed_and_a_run_forgotten(path: Path) -> None:
    made = parsed("allow", path, "ward", "--epsilon", "8", "--delta", "1e-6", "--reason", "ethics board")
    assert made["data"][0]["budget"] == {"epsilon": 8.0, "delta": 1e-6}
    assert made["rows"] == 8
    assert parsed("forget", path, "7f3a")["replies"] == 3
    after = parsed("show", path)
    assert (after["data"][0]["replies"], after["rows"]) == (0, 8)
    assert after["data"][0]["spent"] == made["data"][0]["spent"]
    assert run("forget", path, "7f3a").stdout == "0 replies deleted\n"


def test_new_makes_one(tmp_path: Path) -> None:
    assert parsed("new", tmp_path / "a.ledger") == {"ledger": str(tmp_path / "a.ledger")}
    assert run("new", tmp_path / "b.ledger").stdout.strip() == str(tmp_path / "b.ledger")
    assert parsed("show", tmp_path / "b.ledger")["data"] == []


# bad input


def sql(statement: str) -> Callable[[Path], None]:
    def action(path: Path) -> None:
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(statement)
        connection.close()

    return action


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def replaced_by_text(path: Path) -> None:
    path.write_text("ward,3.0\n" * 200)


def nothing(path: Path) -> None:
    pass


ALLOW = ("allow", "LEDGER", "ward", "--delta", "1e-5", "--reason", "x")
NOTED = "7:" + "0" * 64

MISTAKES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "no ledger": (Path.unlink, ("show", "LEDGER"), "silo.ledger: no such ledger; check the path, or make one with"),
    "a folder": (lambda path: (path.unlink(), path.mkdir())[1], ("verify", "LEDGER"), "no such ledger"),
    "another kind of file": (replaced_by_text, ("show", "LEDGER"), "is damaged, or no ledger (file is not a database)"),
    "an empty file": (lambda path: path.write_bytes(b"") and None, ("verify", "LEDGER"), "is not a ledger"),
    "another database": (sql("PRAGMA application_id = 1"), ("show", "LEDGER"), "is not a ledger; name the file"),
    "a later format": (sql("PRAGMA user_version = 9"), ("show", "LEDGER"), "is not of format 1; use the treadle"),
    "a truncated file": (cut, ("verify", "LEDGER"), "is damaged, or no ledger (database disk image is malformed)"),
    "a tampered row": (sql("UPDATE chain SET body = x'7b7d' WHERE number = 4"), ("verify", "LEDGER"), "row 4 was chan"),
    "a deleted row": (sql("DELETE FROM chain WHERE number = 5"), ("show", "LEDGER"), "row 5 is missing; release noth"),
    "the last row deleted": (sql("DELETE FROM chain WHERE number = 7"), ("verify", "LEDGER"), "row 7 is missing"),
    "an older copy": (nothing, ("verify", "LEDGER", "--head", NOTED), "row 7 is not the one that was noted"),
    "no head": (nothing, ("verify", "LEDGER", "--head", "7"), "'7' is no head of a ledger; give NUMBER:HASH"),
    "a second ledger": (nothing, ("new", "LEDGER"), "silo.ledger: already exists; choose another file"),
    "an unknown data set": (
        nothing,
        ("allow", "LEDGER", "clinic", "--epsilon", "1", "--delta", "1e-5", "--reason", "x"),
        "no data set 'clinic'; register it; the ledger knows ward, public",
    ),
    "no epsilon": (nothing, (*ALLOW, "--epsilon", "0"), "budget: epsilon is 0.0; give a number above 0"),
    "an epsilon that is no number": (nothing, (*ALLOW, "--epsilon", "nan"), "budget: epsilon is nan"),
    "a delta out of range": (nothing, (*ALLOW, "--epsilon", "1", "--delta", "1"), "delta is 1.0; it must be"),
    "no reason": (nothing, (*ALLOW, "--epsilon", "1", "--reason", " "), "no reason; say why; it stays on record"),
    "a reason that is not given": (nothing, ALLOW[:-2], "Missing option '--epsilon'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_loses_nothing(name: str, path: Path) -> None:
    spoil, arguments, message = MISTAKES[name]
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    result = run(*(str(path) if argument == "LEDGER" else argument for argument in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("treadle: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert (path.read_bytes() if path.is_file() else None) == before


@contextlib.contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """A disk that is full, as the kernel tells it: every file ends there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_a_full_disk_debits_nothing_and_releases_nothing(path: Path, size: int) -> None:
    ledger = Ledger.open(path)
    before, spent = ledger.verify(), ledger.spent("ward")
    made: list[int] = []
    with files_no_longer_than(size), pytest.raises(UnavailableError, match="silo.ledger: cannot be used"):
        release(ledger, "ward", ReleaseKey("b", 1, "q"), EVENT, lambda: bytes(made))
    assert (made, ledger.verify(), ledger.spent("ward")) == ([], before, spent)
    assert release(ledger, "ward", ReleaseKey("b", 1, "q"), EVENT, lambda: b"x").payload == b"x"


def test_a_disk_that_fills_up_under_the_reply_leaves_the_debit(path: Path) -> None:
    ledger, big = Ledger.open(path), b"x" * 1_000_000
    room = path.stat().st_size + 20_000  # for the debit and its journal
    with files_no_longer_than(room), pytest.raises(UnavailableError, match="nothing may be released without it"):
        release(ledger, "ward", ReleaseKey("b", 1, "q"), EVENT, lambda: big)
    assert ledger.verify().number == 8
    assert not release(ledger, "ward", ReleaseKey("b", 1, "q"), EVENT, lambda: big).resent
    assert ledger.verify().number == 9


@pytest.fixture
def read_only(path: Path) -> Iterator[Path]:
    """A ledger in a folder that this process may read and not write; root gives up its rights for it."""
    folder = Path(tempfile.mkdtemp())
    ledger = Path(shutil.copy(path, folder / "silo.ledger"))
    ledger.chmod(0o444)
    folder.chmod(0o555)
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        yield ledger
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_shows_and_never_spends(read_only: Path) -> None:
    assert parsed("show", read_only)["rows"] == 7
    before = read_only.read_bytes()
    result = run("forget", read_only, "7f3a")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "silo.ledger: cannot be used (Permission denied)" in result.stderr
    with pytest.raises(UnavailableError, match="nothing may be released without it"):
        release(Ledger.open(read_only), "ward", ReleaseKey("b", 1, "q"), EVENT, lambda: b"never")
    made = run("new", read_only.with_name("other.ledger"))
    assert (made.exit_code, made.stderr.count("\n")) == (1, 1)
    assert read_only.read_bytes() == before
