"""Rows and voters make labels, and what a user can get wrong on the way: one line, and nothing lost."""

import hashlib
import json
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from treadle import files
from treadle.cli.app import main
from treadle.configs.classify import ClassifyRun
from treadle.recipes.classify import classify
from treadle.toml import load_toml

RUN = """
out = "{root}/labelled.jsonl"
target = "SmolLM2"
[data]
source = "{root}/rows.jsonl"
question = "{{question}}"
[[voters]]
kind = "field"
name = "gold"
field = "kind"
labels = {{recall = "system1", steps = "system2"}}
[[voters]]
kind = "rule"
name = "length"
field = "steps"
thresholds = [2]
[[voters]]
kind = "random"
name = "lots"
seed = 1
"""

ENDPOINT = """
[[voters]]
kind = "endpoint"
name = "teacher"
url = "{url}"
model = "m"
attempts = 2
backoff = 0.001
parallel = 2
"""

ALONE = RUN[: RUN.index("[[voters]]")]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with seven rows: row i has i words of steps, and is recall up to 3."""
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    rows = [
        {"question": f"what is {i} + {i}", "steps": "a " * i, "kind": "recall" if i <= 3 else "steps"} for i in range(7)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(root: Path, text: str = RUN, **fields: str) -> ClassifyRun:
    (root / "run.toml").write_text(text.format(root=root, **fields))
    return load_toml(root / "run.toml", ClassifyRun)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_stand_beside_the_data(root: Path) -> None:
    before = (root / "rows.jsonl").read_bytes()
    found = classify(config(root))
    assert (root / "rows.jsonl").read_bytes() == before
    labelled, rows = lines(root / "labelled.jsonl"), lines(root / "rows.jsonl")
    assert [{key: row[key] for key in rows[0]} for row in labelled] == rows
    for i, row in enumerate(labelled):
        votes = list(row["system_votes"].values())
        assert row["system_votes"]["gold"] == ("system1" if i <= 3 else "system2")
        assert row["system_votes"]["length"] == ("system1" if i <= 2 else "system2")
        assert row["system"] == max(("system1", "system2"), key=votes.count)
        assert row["system_agreement"] == votes.count(row["system"]) / 3
    assert found.counts == {s: sum(row["system"] == s for row in labelled) for s in ("system1", "system2")}


def test_the_summary_says_who_agreed_and_lists_every_disagreement(root: Path) -> None:
    found = classify(config(root))
    summary = json.loads((root / "labelled.summary.json").read_text())
    assert summary == json.loads(json.dumps(found.to_json()))
    labelled = lines(root / "labelled.jsonl")
    disputed = [i + 1 for i, row in enumerate(labelled) if len(set(row["system_votes"].values())) > 1]
    assert [row["row"] for row in summary["disagreements"]] == disputed
    assert 4 in disputed
    assert summary["voters"]["gold"]["agreement_with_majority"] == pytest.approx(
        sum(row["system"] == row["system_votes"]["gold"] for row in labelled) / 7
    )
    assert summary["voters"]["length"]["remarks"] == ["limits in words: 2"]
    assert summary["kappa"]["rows"] == 7
    assert (summary["data"], summary["missing_votes"]) == ("rows.jsonl", [])
    assert str(root) not in json.dumps(summary)


def test_labels_are_never_without_their_summary(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.write_bytes
    for failing in ("labelled.summary.json", "labelled.jsonl"):

        def full(path: Path, content: bytes, failing: str = failing) -> None:
            if path.name == failing:
                raise KeyboardInterrupt
            write(path, content)

        with monkeypatch.context() as patched:
            patched.setattr(files, "write_bytes", full)
            with pytest.raises(KeyboardInterrupt):
                classify(config(root))
        assert not (root / "labelled.jsonl").exists()
    classify(config(root))
    assert (root / "labelled.jsonl").exists()


def test_where_the_truth_is_known_the_summary_says_who_is_right(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "truth": "system1" if i <= 3 else "system2"} for i, row in enumerate(lines(root / "rows.jsonl"))]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config(root, RUN.replace("[data]", '[data]\ntruth = "truth"'))
    with pytest.raises(SystemExit):
        main(["classify", str(root / "run.toml")])
    assert "panels of 3: " in capsys.readouterr().out
    accuracy = json.loads((root / "labelled.summary.json").read_text())["accuracy"]
    labelled = lines(root / "labelled.jsonl")
    right = sum(row["system"] == row["truth"] for row in labelled) / 7
    assert accuracy["voters"]["gold"]["estimate"] == 1.0
    assert accuracy["voters"]["length"]["estimate"] == pytest.approx(6 / 7)
    assert accuracy["labels"]["estimate"] == accuracy["panels"]["3"]["mean"] == pytest.approx(right)


def test_one_voter_has_no_kappa(root: Path) -> None:
    text = ALONE + '[[voters]]\nkind = "random"\nname = "lots"\nshares = [0.3, 0.7]\n'
    found = classify(config(root, text))
    assert found.kappa is None
    assert found.counts == {"system1": 2, "system2": 5}


def gapped(root: Path) -> None:
    """Take the label of row 1 away."""
    rows = lines(root / "rows.jsonl")
    rows[0]["kind"] = ""
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("undecided", "kept"), [("drop", 6), ("keep", 7)])
def test_rows_that_nobody_could_label_are_dropped_or_kept(root: Path, undecided: str, kept: int) -> None:
    gapped(root)
    text = RUN[: RUN.index('[[voters]]\nkind = "rule"')].replace("target", f'undecided = "{undecided}"\ntarget')
    found = classify(config(root, text))
    labelled = lines(root / "labelled.jsonl")
    assert (len(labelled), found.undecided) == (kept, (1,))
    assert [row["question"] for row in labelled if row["system"] is None] == ["what is 0 + 0"] * (kept - 6)
    assert found.to_json()["missing_votes"] == [{"row": 1, "voter": "gold", "reason": "no kind"}]


def test_three_systems_and_columns_of_another_name(root: Path) -> None:
    systems = "".join(f'[[systems]]\nname = "{name}"\ndescription = ""\n' for name in ("look", "think", "ask"))
    voters = '[[voters]]\nkind = "rule"\nname = "length"\nfield = "steps"\nquantiles = [0.3, 0.6]\n'
    text = ALONE.replace("target", 'label_field = "mind"\ntarget') + systems + voters
    found = classify(config(root, text))
    assert found.counts == {"look": 3, "think": 2, "ask": 2}
    assert {"mind", "mind_votes", "mind_agreement"} < set(lines(root / "labelled.jsonl")[0])


def test_an_endpoint_votes_with_the_others(root: Path, chat_server: SimpleNamespace, reply: SimpleNamespace) -> None:
    text = RUN[: RUN.index('[[voters]]\nkind = "random"')] + ENDPOINT
    chat_server.answer = lambda number, body: reply.voting("system2")
    found = classify(config(root, text, url=chat_server.url))
    assert found.counts == {"system1": 3, "system2": 4}
    assert found.verdicts[3].system == "system2"  # gold says 1, the rule and the teacher say 2
    assert json.loads((root / "labelled.summary.json").read_text())["voters"]["teacher"]["cost"]["requests"] == 7
    again = classify(config(root, text.replace("target", "overwrite = true\ntarget"), url=chat_server.url))
    assert again.counts == found.counts
    assert len(chat_server.bodies) == 7


def test_a_killed_run_keeps_its_answers_and_the_next_asks_what_it_lacks(
    root: Path, chat_server: SimpleNamespace, reply: SimpleNamespace
) -> None:
    waiting, killed = threading.Event(), threading.Event()

    def answer(number: int, body: dict) -> object:
        if number >= 4:
            waiting.set()
            killed.wait(120)
        return reply.voting("system2")

    chat_server.answer = answer
    config(root, ALONE + ENDPOINT, url=chat_server.url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the server's holds no lock
        child = os.fork()
    if child == 0:
        try:
            main(["classify", str(root / "run.toml")])
        finally:
            os._exit(1)  # never back into pytest
    assert waiting.wait(120)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    killed.set()
    assert not (root / "labelled.jsonl").exists()
    kept = [line for file in (root / ".labelled.answers").glob("*.jsonl") for line in lines(file)]
    asked = len(chat_server.bodies)
    assert 3 <= len(kept) <= 4  # the fourth may have been on its way
    found = classify(config(root, ALONE + ENDPOINT, url=chat_server.url))
    assert len(chat_server.bodies) - asked == 7 - len(kept)
    assert found.ballots["teacher"].cost.kept == len(kept)
    assert found.counts == {"system1": 0, "system2": 7}


Mistake = Callable[[Path], str]


def changed(old: str, new: str, text: str = RUN) -> Mistake:
    def mistake(root: Path) -> str:
        assert old in text
        return text.replace(old, new)

    return mistake


def endpoint(extra: str = "", url: str = "http://127.0.0.1:9/v1") -> Mistake:
    return lambda root: ALONE + ENDPOINT.replace("{url}", url) + extra


def rows(content: str, text: str = RUN) -> Mistake:
    def mistake(root: Path) -> str:
        (root / "rows.jsonl").write_text(content)
        return text

    return mistake


MISTAKES: dict[str, tuple[Mistake, int, str]] = {
    "two voters and no rule for ties": (
        lambda root: RUN[: RUN.index('[[voters]]\nkind = "random"')],
        2,
        "key 'tie': 2 voters on 2 systems can be split evenly; declare tie",
    ),
    "no voter": (lambda root: "voters = []\n" + ALONE, 2, "key 'voters'"),
    "no such kind of voter": (changed('"random"', '"oracle"'), 2, "key 'voters.2'"),
    "a key that voters lack": (changed("seed = 1", "sead = 1"), 2, "key 'voters.2.random.sead'"),
    "two voters of one name": (changed('name = "lots"', 'name = "gold"'), 2, "two voters are called 'gold'"),
    "one voter twice": (
        lambda root: RUN + '[[voters]]\nkind = "random"\nname = "more"\nseed = 1\n',
        2,
        "key 'tie'",
    ),
    "one voter three times": (
        lambda root: ALONE + "".join(f'[[voters]]\nkind = "random"\nname = "{name}"\n' for name in "abc"),
        2,
        "voters 'a' and 'b' are one voter, who would always agree",
    ),
    "a name that is no file name": (changed('"lots"', '"../lots"'), 2, "'../lots' cannot be a name"),
    "no such rule for ties": (changed("target", 'tie = "coin"\ntarget'), 2, "key 'tie'"),
    "a quorum above the voters": (changed("target", "quorum = 4\ntarget"), 2, "key 'quorum': 4 votes of 3 voters"),
    "labels that are no .jsonl": (changed("labelled.jsonl", "labelled.csv"), 2, "out must be a .jsonl file"),
    "labels over the data": (
        changed("target", "overwrite = true\ntarget", RUN.replace("labelled.jsonl", "rows.jsonl")),
        2,
        "rows.jsonl: the labels would replace the data",
    ),
    "labels that exist": (
        lambda root: (root / "labelled.jsonl").write_text("mine") and RUN,
        2,
        "labelled.jsonl: already exists; choose another out file or set overwrite = true",
    ),
    "no data": (changed("/rows.jsonl", "/none.jsonl"), 2, "none.jsonl: no such file"),
    "data without a row": (rows(""), 2, "rows.jsonl: holds no rows"),
    "data that are no JSON": (rows('{"question": "a"}\n{"quest'), 2, "rows.jsonl, line 2: not valid JSON"),
    "a question that the rows lack": (
        changed('question = "{{question}}"', 'question = "{{text}}"'),
        2,
        "rows.jsonl, row 1: no field 'text'; the fields are: kind, question, steps",
    ),
    "an empty question": (
        rows('{"question": " ", "steps": "a", "kind": "recall"}'),
        2,
        "row 1: its question is empty; drop it",
    ),
    "a stray brace": (changed('"{{question}}"', '"{{question}} <"'), 2, "stray brace"),
    "a column of the label's name": (
        rows('{"question": "a", "steps": "a", "kind": "recall", "system": "system1"}'),
        2,
        "row 1: it has a column 'system' already; choose another label_field",
    ),
    "a label that is no system": (
        rows('{"question": "a", "steps": "a", "kind": "guess"}'),
        2,
        "row 1: kind is 'guess', which is none of recall, steps",
    ),
    "a truth that is no system": (
        changed("[data]", '[data]\ntruth = "kind"'),
        2,
        "rows.jsonl, row 1: the truth 'recall' is none of system1, system2",
    ),
    "a truth that the rows lack": (
        changed("[data]", '[data]\ntruth = "gospel"'),
        2,
        "rows.jsonl, row 1: no field 'gospel'",
    ),
    "too few limits": (changed("thresholds = [2]", "thresholds = [2, 3]"), 2, "2 limits part 3 systems, not 2"),
    "a target that nobody named": (
        lambda root: (ALONE + ENDPOINT.replace("{url}", "http://h/v1")).replace('target = "SmolLM2"\n', ""),
        2,
        "role-play: the template plays a target model; name it with `target`",
    ),
    "no such template": (endpoint('template = "rolle"\n'), 2, "rolle: no such template; give a .toml file or one of"),
    "no key": (endpoint('api_key_env = "TEACHER_KEY"\n'), 2, "voter 'teacher': the environment has no TEACHER_KEY"),
    "a key in the address": (endpoint(url="http://me:geheim@h/v1"), 2, "url must hold no user, password"),
    "no such model": (
        lambda root: ALONE + '[[voters]]\nkind = "local"\nname = "small"\nmodel = "nosuchmodel"\n',
        2,
        "nosuchmodel",
    ),
    "a voter that is down": (endpoint(), 1, "voter 'teacher': the endpoint does not answer (no connection (Conn"),
    "a row that nobody labels and that must be": (
        lambda root: (
            (root / "rows.jsonl").write_text('{"question": "a", "kind": "steps"}\n{"question": "b", "kind": ""}\n')
            and RUN[: RUN.index('[[voters]]\nkind = "rule"')].replace("target", 'undecided = "fail"\ntarget')
        ),
        2,
        "1 of 2 rows get no label, row 2 first; set undecided",
    ),
    "rows that nobody labels": (
        lambda root: (
            (root / "rows.jsonl").write_text('{"question": "a", "kind": ""}\n{"question": "b", "kind": null}\n')
            and RUN[: RUN.index('[[voters]]\nkind = "rule"')]
        ),
        2,
        "no row gets a label, most often for: no kind",
    ),
}


def refused(root: Path, capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    """What the command says, in its one line."""
    before = snapshot(root)
    with pytest.raises(SystemExit) as stopped:
        main(["classify", str(root / "run.toml"), "--json"])
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("treadle: ")]
    assert (stopped.value.code, len(said), printed.out) == (code, 1, ""), printed.err
    assert "Traceback" not in printed.err
    assert snapshot(root) == before
    return said[0]


def snapshot(root: Path) -> dict[str, str]:
    """Every file with its digest, but for answers, which may only grow."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".labelled.answers" not in path.parts
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_loses_nothing(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake, code, message = MISTAKES[name]
    text = mistake(root)
    text = text.replace("{root}", str(root)).replace("{{", "{").replace("}}", "}").replace("<", "{")
    (root / "run.toml").write_text(text)
    line = refused(root, capsys, code=code)
    assert message in line
    assert "geheim" not in line


def test_a_server_that_talks_nonsense_is_one_line(
    root: Path, chat_server: SimpleNamespace, reply: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    config(root, ALONE + ENDPOINT, url=chat_server.url)
    for answer, code, said in [
        (reply.said("who knows"), 2, "no row gets a label, most often for: its reply names no system: 'who knows'"),
        (reply.raw(b"<html>"), 1, "the endpoint does not answer (an answer that is no JSON, 2 times); 0 of the 7"),
        (reply.raw(b"", status=401), 1, "the endpoint refuses (HTTP 401); 0 of the 7 answers that it lacked came"),
        (reply.raw(b"", status=429, headers={"Retry-After": "9999"}), 1, "asks to wait 9999 s (HTTP 429)"),
    ]:
        chat_server.answer = lambda number, body, answer=answer: answer
        assert said in refused(root, capsys, code=code)
        for file in (root / ".labelled.answers").glob("*.jsonl"):
            file.unlink()


def test_a_limit_stops_the_run_cleanly_and_the_next_goes_on(
    root: Path, chat_server: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    config(root, ALONE + ENDPOINT + "request_limit = 4\n", url=chat_server.url)
    line = refused(root, capsys, code=1)
    assert "voter 'teacher': request_limit = 4 is reached; 4 of the 7 answers" in line
    assert "raise it and run again" in line
    config(root, ALONE + ENDPOINT + "request_limit = 7\n", url=chat_server.url)
    with pytest.raises(SystemExit) as done:
        main(["classify", str(root / "run.toml"), "--json"])
    assert done.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)["counts"] == {"system1": 7, "system2": 0}
    assert len(chat_server.bodies) == 7


def test_the_command_prints_a_table_and_warns_of_a_system_without_rows(
    root: Path, chat_server: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, said, warned in [
        (RUN, ["7 rows:", "Fleiss' κ", "row 4 is disputed: gold system1, length system2"], "limits in words: 2"),
        (ALONE + ENDPOINT, ["7 rows: 7 system1, 0 system2"], "no row is system2: nothing can be trained"),
    ]:
        config(root, text.replace("target", "overwrite = true\ntarget"), url=chat_server.url)
        with pytest.raises(SystemExit):
            main(["classify", str(root / "run.toml")])
        printed = capsys.readouterr()
        assert all(part in printed.out for part in said), printed.out
        assert warned in printed.err


def test_a_full_disk_keeps_the_old_labels(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "labelled.jsonl").write_text("old")
    config(root, RUN.replace("target", "overwrite = true\ntarget"))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert "cannot write (No space left on device); free space" in refused(root, capsys, code=1)
    assert (root / "labelled.jsonl").read_text() == "old"
