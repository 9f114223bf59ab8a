"""Killed at any point, a ledger never counts less than what was released.

The scripts run in processes of their own that fork for every life: a life ends by SIGKILL at one step, counted over
every statement that SQLite begins and every boundary of `release`. What a life has sent is appended to a file, as a
network would have it.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

LIVES = """
import json, os, random, signal, sqlite3, sys, time
from pathlib import Path
from treadle.privacy.ledger import Budget, Ledger, ReleaseKey, release

folder = Path(sys.argv[1])
EVENT = None  # nothing to compose: what counts here is rows
open_file = sqlite3.connect
left = float("inf")  # steps until this life ends

def step(*ignored):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def traced(*arguments, **options):
    connection = open_file(*arguments, **options)
    connection.set_trace_callback(step)
    return connection

sqlite3.connect = traced

def note(file, text):
    with open(folder / file, "a") as stream:
        stream.write(text + "\\n")

def notes(file):
    return (folder / file).read_text().splitlines() if (folder / file).exists() else []

def answered(number):
    def make():
        step()
        noise = os.urandom(8).hex()
        note("made", f"{number} {noise}")
        step()
        return noise.encode()
    step()
    made = release(Ledger.open(folder / "ledger"), "ward", ReleaseKey("run", number, "q"), EVENT, make)
    step()
    note("sent", f"{number} {made.payload.decode()}")
    step()

def life(steps, work):
    global left
    child = os.fork()
    if child == 0:
        left = steps
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]

def state():
    ledger = Ledger.open(folder / "ledger")  # walks the chain
    (ward,) = ledger.statements()
    debits = sum(run.releases for run in ward.runs)
    return {"debits": debits, "made": len(notes("made")), "payloads": len(set(notes("sent")))}

ledger = Ledger.create(folder / "ledger")
ledger.register("ward", budget=Budget(float("inf"), 1e-5), source=b"rows")
"""

EVERY_STEP = (
    LIVES
    + """
for number in range(10_000):
    before = state()
    died = life(number, lambda: answered(number)) != 0
    after_death = state()
    ended = life(float("inf"), lambda: answered(number))
    mine = {file: [line for line in notes(file) if line.startswith(f"{number} ")] for file in ("made", "sent")}
    print(json.dumps({"died": died, "ended": ended, "before": before, "dead": after_death, "after": state(), **mine}))
    if not died:
        break
"""
)

AT_RANDOM = (
    LIVES
    + """
def forever():
    number = 0
    while True:
        answered(number)
        number += 1

random.seed(0)
for _ in range(25):
    child = os.fork()
    if child == 0:
        try:
            forever()
        finally:
            os._exit(1)
    time.sleep(random.uniform(0.02, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    hot = (folder / "ledger-journal").exists()
    print(json.dumps({**state(), "hot": hot}))
"""
)


def lives(script: str, folder: Path) -> list[dict]:
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory where there is one: the kernel outlives the process, so a disk would prove nothing more."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def deaths() -> list[dict]:
    """One request a row: answered by a process that dies at a step, then by one that lives."""
    with in_memory() as folder:
        return lives(EVERY_STEP, folder)


def test_every_step_had_its_death(deaths: list[dict]) -> None:
    assert len(deaths) > 30
    assert [row["died"] for row in deaths] == [True] * (len(deaths) - 1) + [False]
    assert all(row["ended"] == 0 for row in deaths)


def test_nothing_was_ever_made_without_a_debit(deaths: list[dict]) -> None:
    for row in deaths:
        for state in (row["dead"], row["after"]):
            assert state["debits"] >= state["made"] >= state["payloads"]


def test_a_death_costs_a_second_debit_only_between_debit_and_kept_reply(deaths: list[dict]) -> None:
    paid_at_death = [row["dead"]["debits"] - row["before"]["debits"] for row in deaths]
    paid = [row["after"]["debits"] - row["before"]["debits"] for row in deaths]
    assert paid_at_death == sorted(paid_at_death)  # not yet, then once
    first, second = paid.index(2), len(paid) - paid[::-1].index(2)
    assert paid == [1] * first + [2] * (second - first) + [1] * (len(paid) - second)
    assert paid_at_death == [0] * first + [1] * (len(paid) - first)
    assert 3 <= second - first < len(paid) - 6


def test_a_second_debit_buys_fresh_noise_and_a_retry_sends_the_same_bytes(deaths: list[dict]) -> None:
    for row in deaths:
        noise = [line.split()[1] for line in row["made"]]
        assert len(set(noise)) == len(noise)
        assert {line.split()[1] for line in row["sent"]} == {noise[-1]}
    assert {len(row["made"]) for row in deaths} == {1, 2}
    assert {len(row["sent"]) for row in deaths} == {1, 2}


def test_killed_at_random_moments_the_ledger_opens_and_is_never_low() -> None:
    with in_memory() as folder:
        rows = lives(AT_RANDOM, folder)
    assert len(rows) == 25
    for row in rows:
        assert row["debits"] >= row["made"] >= row["payloads"]
    assert rows[-1]["payloads"] > 0
