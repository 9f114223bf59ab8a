"""The ledger pays before it releases, for every run ever made on the data, and refuses over budget."""

import math
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from treadle.errors import BudgetError, FormatError, InputError, MismatchError
from treadle.privacy import ledger_file
from treadle.privacy.accounting import MechanismEvent, epsilon_of
from treadle.privacy.chain import Head
from treadle.privacy.ledger import REPLIES_KEPT, Budget, Ledger, ReleaseKey, release

EVENT = MechanismEvent(16.0, 1.0, 10)
BUDGET = Budget(3.0, 1e-5)
OPEN = Budget(math.inf, 1e-5)  # costs no composition


def key(server_round: int, run: str = "run", request: str = "0" * 64) -> ReleaseKey:
    return ReleaseKey(run, server_round, request)


def cost(steps: int) -> float:
    return epsilon_of([MechanismEvent(16.0, 1.0, steps)], delta=1e-5)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger.create(tmp_path / "silo.ledger")
    made.register("ward", budget=BUDGET, source=b"rows of the ward")
    return made


@pytest.fixture
def unbounded(tmp_path: Path) -> Ledger:
    made = Ledger.create(tmp_path / "open.ledger")
    made.register("ward", budget=OPEN, source=b"rows of the ward")
    return made


def never() -> bytes:
    raise AssertionError("nothing may be made here")


# paying


def test_a_retry_gets_the_same_bytes_and_pays_nothing(ledger: Ledger) -> None:
    first = release(ledger, "ward", key(1), EVENT, lambda: os.urandom(1000))
    spent = ledger.spent("ward")
    assert spent == cost(10)
    again = release(Ledger.open(ledger.path), "ward", key(1), EVENT, never)
    assert (again.payload, again.resent, first.resent) == (first.payload, True, False)
    assert ledger.spent("ward") == spent


@pytest.mark.parametrize("other", [key(2), key(1, run="another"), key(1, request="1" * 64)])
def test_another_round_run_or_request_pays(ledger: Ledger, other: ReleaseKey) -> None:
    release(ledger, "ward", key(1), EVENT, lambda: b"one")
    assert release(ledger, "ward", other, EVENT, lambda: b"two").payload == b"two"
    assert ledger.spent("ward") == cost(20)


def test_the_debit_is_on_the_disk_before_anything_is_made(ledger: Ledger) -> None:
    def make() -> bytes:
        assert Ledger.open(ledger.path).spent("ward") == cost(10)
        return b"noised"

    assert release(ledger, "ward", key(1), EVENT, make).payload == b"noised"


def test_the_reply_is_kept_before_it_is_returned(ledger: Ledger) -> None:
    made = release(ledger, "ward", key(1), EVENT, lambda: b"noised")
    assert Ledger.open(ledger.path).reply("ward", key(1)) == made.payload


def test_what_fails_on_the_way_stays_paid(ledger: Ledger) -> None:
    def fails() -> bytes:
        raise MemoryError

    with pytest.raises(MemoryError):
        release(ledger, "ward", key(1), EVENT, fails)
    assert ledger.spent("ward") == cost(10)
    assert not release(ledger, "ward", key(1), EVENT, lambda: b"fresh").resent
    assert ledger.spent("ward") == cost(20)
    (ward,) = ledger.statements()
    assert [(run.releases, run.repeated) for run in ward.runs] == [(2, 1)]


def test_an_exhausted_budget_releases_nothing_and_still_resends(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "silo.ledger")
    ledger.register("ward", budget=Budget(cost(20), 1e-5), source=b"rows")
    sent = [release(ledger, "ward", key(number), EVENT, lambda: os.urandom(8)).payload for number in (1, 2)]
    with pytest.raises(BudgetError, match=r"^data set 'ward': 10 steps with noise 16 at rate 1 would make it ε = "):
        release(ledger, "ward", key(3), EVENT, never)
    assert ledger.spent("ward") == cost(20)
    assert release(ledger, "ward", key(2), EVENT, never).payload == sent[1]


def test_a_run_takes_no_more_steps_than_its_noise_is_for_whatever_the_budget_has_left(ledger: Ledger) -> None:
    for number in (1, 2):
        release(ledger, "ward", key(number), EVENT, lambda: b"x", at_most=25)
    said = r"run 'run' on data set 'ward': 20 of the 25 steps that its noise is for are paid, and it asks for 10 more"
    with pytest.raises(BudgetError, match=said):
        release(Ledger.open(ledger.path), "ward", key(3), EVENT, never, at_most=25)
    assert ledger.spent("ward") == cost(20)
    release(ledger, "ward", key(3, run="another"), EVENT, lambda: b"x", at_most=25)


def test_all_runs_families_and_restarts_add_up(ledger: Ledger) -> None:
    other = MechanismEvent(2.0, 0.02, 7)
    for place, (run, event) in enumerate([("a", EVENT), ("b", other), ("a", EVENT), ("c", other), ("d", EVENT)]):
        release(Ledger.open(ledger.path), "ward", key(place, run), event, lambda: b"x")
    assert ledger.spent("ward") == epsilon_of([EVENT, EVENT, EVENT, other, other], delta=1e-5)
    (ward,) = ledger.statements()
    assert {run.run: run.releases for run in ward.runs} == {"a": 2, "b": 1, "c": 1, "d": 1}


def test_data_sets_have_accounts_of_their_own(ledger: Ledger) -> None:
    ledger.register("clinic", budget=BUDGET, source=b"rows of the clinic")
    release(ledger, "ward", key(1), EVENT, lambda: b"of the ward")
    assert ledger.spent("clinic") == 0.0
    assert release(ledger, "clinic", key(1), EVENT, lambda: b"of the clinic").payload == b"of the clinic"


def test_a_release_without_noise_needs_a_silo_that_allows_it_and_leaves_no_bound(ledger: Ledger) -> None:
    with pytest.raises(BudgetError, match="ε = none"):
        release(ledger, "ward", key(1), None, never)
    ledger.allow("ward", OPEN, reason="the study is over and the data are published")
    release(ledger, "ward", key(1), None, lambda: b"bare")
    assert ledger.spent("ward") == math.inf
    ledger.allow("ward", Budget(100.0, 1e-5), reason="a mistake")
    with pytest.raises(BudgetError, match="spent ε = none"):
        release(ledger, "ward", key(2, "later"), EVENT, never)


@pytest.mark.parametrize("other", [MechanismEvent(32.0, 1.0, 10), MechanismEvent(16.0, 0.5, 10), None])
def test_a_run_keeps_the_noise_and_the_rate_that_it_began_with(unbounded: Ledger, other: MechanismEvent | None) -> None:
    release(unbounded, "ward", key(1), EVENT, lambda: b"x")
    with pytest.raises(MismatchError, match=r"^run 'run' on data set 'ward': began with noise 16 at rate 1; this"):
        release(Ledger.open(unbounded.path), "ward", key(2), other, never)
    unbounded.register("clinic", budget=OPEN, source=b"rows of the clinic")
    release(unbounded, "clinic", key(2), other, lambda: b"x")  # every data set's terms are its own
    release(unbounded, "ward", key(2, "another"), other, lambda: b"x")
    release(unbounded, "ward", key(2), MechanismEvent(16.0, 1.0, 3), lambda: b"x")  # fewer steps are the same noise
    (ward, _) = unbounded.statements()
    assert [(run.run, run.releases) for run in ward.runs] == [("run", 2), ("another", 1)]


def test_nothing_is_kept_that_was_not_paid_for(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="no debit stands for this reply"):
        ledger.keep("ward", key(1), b"free")
    ledger.debit("ward", key(1), EVENT)
    ledger.keep("ward", key(1), b"paid")
    with pytest.raises(InputError, match="another reply to this request is kept"):
        ledger.keep("ward", key(1), b"second")
    assert ledger.reply("ward", key(1)) == b"paid"


def test_an_unknown_data_set_is_named_with_those_that_are_known(ledger: Ledger) -> None:
    for ask in (
        lambda: release(ledger, "clinic", key(1), EVENT, never),
        lambda: ledger.spent("clinic"),
        lambda: ledger.allow("clinic", BUDGET, reason="x"),
    ):
        with pytest.raises(InputError, match="no data set 'clinic'; register it; the ledger knows ward"):
            ask()


# whose data


def test_the_name_stands_for_the_file_through_edits_and_moves(tmp_path: Path, unbounded: Ledger) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a\n")
    unbounded.register("clinic", budget=OPEN, source=file)
    unbounded.debit("clinic", key(1), None)
    before = unbounded.verify()
    unbounded.register("clinic", budget=OPEN, source=file)
    assert unbounded.verify() == before  # a start that changes nothing writes nothing
    with file.open("a") as stream:
        stream.write("b\n")
    unbounded.register("clinic", budget=OPEN, source=file)
    (tmp_path / "moved.csv").write_bytes(file.read_bytes())
    unbounded.register("clinic", budget=OPEN, source=tmp_path / "moved.csv")
    assert unbounded.verify().number == before.number + 2
    assert unbounded.spent("clinic") == math.inf


def test_the_same_file_under_another_name_is_refused(tmp_path: Path, unbounded: Ledger) -> None:
    file, copy, old = (tmp_path / name for name in ("rows.csv", "copy.csv", "old.csv"))
    for path in (file, old):
        path.write_text("a\n")
    unbounded.register("clinic", budget=OPEN, source=file)
    file.write_text("a\nb\n")
    unbounded.register("clinic", budget=OPEN, source=file)
    copy.write_text("a\nb\n")
    for same in (file, copy, old, b"a\nb\n"):
        with pytest.raises(MismatchError, match="these are the data of 'clinic'"):
            unbounded.register("fresh", budget=OPEN, source=same)
    file.write_text("c\n")  # edited since: it stands in the same place
    with pytest.raises(MismatchError, match="these are the data of 'clinic'"):
        unbounded.register("fresh", budget=OPEN, source=file)
    assert [statement.data for statement in unbounded.statements()] == ["ward", "clinic"]


def test_no_plain_digest_of_the_data_is_in_the_file(tmp_path: Path, ledger: Ledger) -> None:
    import hashlib

    content = ledger.path.read_bytes()
    assert hashlib.sha256(b"rows of the ward").hexdigest().encode() not in content
    assert b"rows of the ward" not in content


@pytest.mark.parametrize("name", ["", "../ward", "a b", ".hidden"])
def test_a_name_is_a_name(ledger: Ledger, name: str) -> None:
    with pytest.raises(InputError, match="cannot be a name"):
        ledger.register(name, budget=BUDGET, source=b"other rows")
    with pytest.raises(InputError, match="cannot be a name"):
        release(ledger, name, key(1), EVENT, never)


def test_a_budget_changes_only_on_the_record(ledger: Ledger) -> None:
    with pytest.raises(
        MismatchError, match="its budget in the ledger is ε = 3 at δ = 1e-05, in the configuration ε = 9"
    ):
        ledger.register("ward", budget=Budget(9.0, 1e-5), source=b"rows of the ward")
    with pytest.raises(InputError, match="no reason"):
        ledger.allow("ward", Budget(9.0, 1e-5), reason=" ")
    before = ledger.verify()
    ledger.allow("ward", Budget(9.0, 1e-5), reason="ethics board, 3 May")
    assert ledger.verify().number == before.number + 1
    ledger.register("ward", budget=Budget(9.0, 1e-5), source=b"rows of the ward")
    assert b"ethics board, 3 May" in ledger.path.read_bytes()


# replies


def test_replies_are_forgotten_and_the_spending_is_not(ledger: Ledger) -> None:
    for run in ("a", "b"):
        release(ledger, "ward", key(1, run), EVENT, lambda: b"x" * 100)
    head, spent = ledger.verify(), ledger.spent("ward")
    assert ledger.forget_replies("a") == 1
    assert ledger.forget_replies("a") == 0
    assert (ledger.verify(), ledger.spent("ward")) == (head, spent)
    assert (ledger.reply("ward", key(1, "a")), ledger.reply("ward", key(1, "b"))) == (None, b"x" * 100)
    (ward,) = ledger.statements()
    assert (ward.replies, ward.reply_bytes) == (1, 100)


def test_the_newest_replies_of_a_run_are_kept(unbounded: Ledger) -> None:
    rounds = [*range(100, 100 + REPLIES_KEPT), 1]  # a server that went back to an old checkpoint comes last
    release(unbounded, "ward", key(0, "other"), None, lambda: b"other")
    for number in rounds:
        release(unbounded, "ward", key(number), None, lambda: b"x")
    kept = [number for number in rounds if unbounded.reply("ward", key(number)) is not None]
    assert kept == rounds[1:]
    assert unbounded.reply("ward", key(0, "other")) == b"other"


def test_a_reply_that_was_changed_is_not_sent(ledger: Ledger) -> None:
    release(ledger, "ward", key(1), EVENT, lambda: b"noised")
    tamper(ledger.path, "UPDATE replies SET payload = x'00'")
    with pytest.raises(FormatError, match=r"round 1 of run 'run' was changed; `treadle ledger forget`"):
        release(ledger, "ward", key(1), EVENT, never)


# several at once

DEBITS = """
import sys
from pathlib import Path
from treadle.errors import BudgetError
from treadle.privacy.accounting import MechanismEvent
from treadle.privacy.ledger import Ledger, ReleaseKey
ledger, paid = Ledger.open(Path(sys.argv[1])), 0
for number in range(5):
    try:
        ledger.debit("ward", ReleaseKey(sys.argv[2], number, ""), MechanismEvent(16.0, 1.0, 10))
        paid += 1
    except BudgetError:
        pass
print(paid)
"""


def test_two_processes_cannot_spend_more_than_the_budget(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "silo.ledger")
    ledger.register("ward", budget=Budget(cost(70), 1e-5), source=b"rows")
    processes = [
        subprocess.Popen([sys.executable, "-c", DEBITS, str(ledger.path), run], stdout=subprocess.PIPE) for run in "ab"
    ]
    paid = [int(process.communicate()[0]) for process in processes]
    assert sum(paid) == 7
    assert ledger.spent("ward") == cost(70)
    assert ledger.verify().number == 2 + 7


def together(*actions: Callable[[], object]) -> None:
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_retry_that_overtakes_waits_and_gets_the_same_bytes(unbounded: Ledger) -> None:
    begun, found = threading.Event(), {}

    def slow() -> bytes:
        begun.set()
        assert not retried.wait(0.2)
        return os.urandom(8)

    retried = threading.Event()

    def retry() -> None:
        begun.wait()
        found["retry"] = release(Ledger.open(unbounded.path), "ward", key(1), None, never)
        retried.set()

    together(lambda: found.update(first=release(unbounded, "ward", key(1), None, slow)), retry)
    assert found["retry"].resent
    assert found["retry"].payload == found["first"].payload


def test_threads_share_a_ledger(unbounded: Ledger) -> None:
    def debits(run: str) -> None:
        for number in range(5):
            unbounded.debit("ward", key(number, run), EVENT)

    together(*(lambda run=run: debits(run) for run in "abc"))
    (ward,) = unbounded.statements()
    assert [run.releases for run in ward.runs] == [5, 5, 5]
    assert unbounded.verify().number == 2 + 15


# what is noticed


def tamper(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


@pytest.fixture
def five_rows(unbounded: Ledger) -> Ledger:
    for number in (1, 2, 3):
        unbounded.debit("ward", key(number), EVENT)
    return unbounded


TAMPERED = {
    "a changed row": (
        "UPDATE chain SET body = replace(body, 'steps\": 10', 'steps\": 1') WHERE number = 4",
        "row 4 was",
    ),
    "a deleted row": ("DELETE FROM chain WHERE number = 3", "row 3 is missing"),
    "a deleted first row": ("DELETE FROM chain WHERE number = 1", "row 1 is missing"),
    "a deleted last row": ("DELETE FROM chain WHERE number = 5", "row 5 is missing"),
    "all rows deleted": ("DELETE FROM chain", "row 1 is missing"),
    "a changed hash": ("UPDATE chain SET hash = zeroblob(32) WHERE number = 2", "row 2 was changed"),
    "another head": ("UPDATE head SET number = 4", "row 4 is not the last one that was written"),
    "no head": ("DELETE FROM head", "row 0 is not the last one that was written"),
    "another secret": ("UPDATE secret SET bytes = zeroblob(32)", "its secret was exchanged"),
    "no secret": ("DELETE FROM secret", "its secret was exchanged"),
    "a table less": ("DROP TABLE replies", "is damaged, or no ledger"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_ledger_releases_nothing(five_rows: Ledger, name: str) -> None:
    statement, message = TAMPERED[name]
    if "replace(" in statement:  # SQLite's replace() gives text
        statement = statement.replace("replace(body,", "CAST(replace(CAST(body AS TEXT),").replace(
            "') W", "') AS BLOB) W"
        )
    tamper(five_rows.path, statement)
    with pytest.raises(FormatError) as raised:
        release(Ledger.open(five_rows.path), "ward", key(9), EVENT, never)
    assert message in str(raised.value)
    assert str(five_rows.path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_older_copy_put_back_is_seen_by_whoever_watched_or_noted_the_head(five_rows: Ledger) -> None:
    older = five_rows.path.read_bytes()
    noted = Head.parse(str(five_rows.verify()))
    five_rows.debit("ward", key(4), EVENT)
    newer = five_rows.verify(noted)
    assert newer.number == noted.number + 1
    five_rows.path.write_bytes(older)
    with pytest.raises(FormatError, match="is not what it was a moment ago"):
        five_rows.debit("ward", key(5), EVENT)
    reopened = Ledger.open(five_rows.path)  # the file alone cannot tell
    assert reopened.verify(noted) == noted
    with pytest.raises(FormatError, match="row 6 is not the one that was noted, or is missing: an older copy"):
        reopened.verify(newer)
    reopened.debit("ward", key(6), EVENT)  # as many rows as there were, but other ones
    with pytest.raises(FormatError, match="row 6 is not the one that was noted"):
        reopened.verify(newer)


def test_a_truncated_file_is_noticed(five_rows: Ledger) -> None:
    content = five_rows.path.read_bytes()
    for size in (len(content) - 4096, len(content) // 2, 4096, 100, 0):
        five_rows.path.write_bytes(content[:size])
        with pytest.raises(FormatError, match="ledger"):
            Ledger.open(five_rows.path)


def test_other_files_are_no_ledgers(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("What was spent: nothing. " * 100)
    with pytest.raises(FormatError, match="is damaged, or no ledger"):
        Ledger.open(tmp_path / "text")
    tamper(tmp_path / "other.db", "CREATE TABLE chain (number, body, hash)")
    with pytest.raises(FormatError, match="is not a ledger"):
        Ledger.open(tmp_path / "other.db")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other.db", "text"]


def test_a_ledger_of_another_format_is_left_alone(ledger: Ledger) -> None:
    tamper(ledger.path, "PRAGMA user_version = 2")
    with pytest.raises(FormatError, match="is not of format 1"):
        ledger.spent("ward")


def test_a_missing_ledger_is_an_error_and_never_a_new_one(tmp_path: Path, ledger: Ledger) -> None:
    missing = tmp_path / "folder" / "silo.ledger"
    with pytest.raises(InputError, match="no such ledger"):
        Ledger.open(missing)
    assert not missing.parent.exists()
    ledger.path.unlink()
    for ask in (lambda: ledger.spent("ward"), lambda: release(ledger, "ward", key(1), EVENT, never)):
        with pytest.raises(InputError, match="no such ledger"):
            ask()
    assert not ledger.path.exists()


def test_a_ledger_is_made_once_and_for_its_owner(ledger: Ledger) -> None:
    with pytest.raises(InputError, match="already exists"):
        Ledger.create(ledger.path)
    assert ledger.spent("ward") == 0.0
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_every_commit_reaches_the_disk_and_the_folder(ledger: Ledger) -> None:
    with ledger_file.writing(ledger.path) as connection:
        settings = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["delete", 3]  # 3 is EXTRA: FULL, and the folder is synced after the journal is gone
