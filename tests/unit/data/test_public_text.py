"""Public text: passages that are a function of their arguments, and the check that no task is in them."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data.public_text import overlap, public_texts
from treadle.errors import FormatError, InputError


def test_pydoc_gives_prose_in_passages_of_whole_words() -> None:
    text = public_texts(limit=300, words=40)
    assert len(text.passages) == len(set(text.passages)) == 300
    assert all(20 <= len(passage.split()) <= 40 for passage in text.passages)
    assert not any("****" in passage or "::=" in passage for passage in text.passages[:50])
    assert text.source == "pydoc"


def test_passages_are_a_function_of_the_seed_and_a_limit_takes_the_first() -> None:
    assert public_texts(limit=20) == public_texts(limit=20)
    assert public_texts(limit=20).passages[:5] == public_texts(limit=5).passages
    assert set(public_texts(limit=20).passages) != set(public_texts(limit=20, seed=1).passages)


def test_the_digest_is_of_what_was_used() -> None:
    text = public_texts(limit=3)
    assert text.sha256 == hashlib.sha256(json.dumps(text.passages).encode()).hexdigest()
    assert text.sha256 != public_texts(limit=4).sha256


def test_a_text_file_is_cut_and_rows_are_passages(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four\n five six seven eight nine")
    assert set(public_texts(str(tmp_path / "a.txt"), words=4).passages) == {
        "one two three four",
        "five six seven eight",
    }
    (tmp_path / "a.jsonl").write_text('{"body": "one two three"}\n{"body": "four"}\n{"body": "four"}\n{"body": ""}\n')
    assert set(public_texts(str(tmp_path / "a.jsonl"), words=2, field="body").passages) == {"one two", "four"}
    assert len(public_texts("reasoning-gym:gcd?size=7", field="question").passages) == 7


def test_wrong_public_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.txt: no such file"):
        public_texts(str(tmp_path / "none.txt"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"body": "one"}\n')
    with pytest.raises(InputError, match=r"a.jsonl, row 2: no text in field 'text'; the fields are: body"):
        public_texts(str(tmp_path / "a.jsonl"))
    (tmp_path / "empty.txt").write_text(" \n ")
    with pytest.raises(FormatError, match="no passage"):
        public_texts(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(FormatError, match="not UTF-8"):
        public_texts(str(tmp_path / "latin.txt"))
    for limit, words in ((0, 5), (5, 0)):
        with pytest.raises(InputError, match="one or more"):
            public_texts(limit=limit, words=words)


TEN = "zero one two three four five six seven eight nine"


def test_overlap_counts_runs_of_eight_words() -> None:
    assert overlap([TEN], [TEN]) == 1.0
    assert overlap([f"before {TEN.upper()}, after"], [TEN]) == 1.0
    assert overlap(["one two three four five six seven eight"], [TEN]) == pytest.approx(1 / 3)  # one of three runs
    assert overlap(["one two three four five six seven"], [TEN]) == 0.0
    assert overlap(["too short"], ["Too short!"]) == 1.0
    assert overlap([TEN], []) == overlap([TEN], ["?!"]) == 0.0


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab ", max_size=60)), st.lists(st.text(alphabet="ab ", max_size=60)))
def test_overlap_is_a_share_and_grows_with_the_public_text(public: list[str], examples: list[str]) -> None:
    share = overlap(public, examples)
    assert 0 <= share <= overlap([*public, *examples], examples) <= 1
