"""Answers on disk."""

from pathlib import Path

import pytest

from treadle.errors import FormatError
from treadle.evaluation.voters.kept import KeptAnswers, kept_answers
from treadle.evaluation.voters.voter import Cost


def test_what_is_added_is_there_in_the_next_run(tmp_path: Path) -> None:
    with kept_answers(tmp_path / "a", {"model": "m"}, voter="v") as kept:
        kept.add("one", None, (0, 0))
        kept.add("one", "yes\n{}", (7, 2))
        kept.add("two", None, (5, 0))
    with kept_answers(tmp_path / "a", {"model": "m"}, voter="v") as kept:
        assert (kept.answer("one"), kept.answer("two"), kept.cost) == ("yes\n{}", None, Cost(3, 12, 2))
    with kept_answers(tmp_path / "a", {"model": "n"}, voter="v") as other:
        assert other.answer("one") is None


def test_a_line_that_a_kill_tore_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = KeptAnswers(path)
    whole.add("one", "yes", (1, 1))
    whole.add("two", "no", (1, 1))
    path.write_bytes(path.read_bytes()[:-9])
    torn = KeptAnswers(path)
    assert (torn.answer("one"), torn.answer("two")) == ("yes", None)
    torn.add("three", "no", (1, 1))
    again = KeptAnswers(path)
    assert [again.answer(key) for key in ("one", "two", "three")] == ["yes", None, "no"]


@pytest.mark.parametrize("line", ['{"key": 3}', "[]", '{"key": "a", "answer": "b", "tokens": [1]}', "7"])
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(FormatError, match=r"a\.jsonl, line 2: no exchange; delete the line"):
        KeptAnswers(tmp_path / "a.jsonl")
