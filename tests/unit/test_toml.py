"""Errors say which key of a run's file they are about, and unknown keys which one was meant."""

import re
from pathlib import Path

import pytest

from treadle.configs.family import FamilyRun
from treadle.configs.plan import PlanRun
from treadle.errors import ConfigError, InputError, UnavailableError
from treadle.toml import checked, naming_keys

RUN = """
base = "smolm2-135m"
family = "families/wards"
seeds = [1, 2]

[data]
task = "sylogism"
files = ["rows/a.jsonl", "rows/b.jsonl"]
"""


@pytest.mark.parametrize(
    ("what", "where", "said"),
    [
        ("'smolm2-135m' is not in the catalogue", None, "run.toml, key 'base': 'smolm2-135m' is not in"),
        ("no such task", "sylogism", "run.toml, key 'data.task': sylogism: no such task"),
        ("not valid TOML", "task sylogism", "run.toml, key 'data.task': task sylogism: not valid TOML"),
        ("no such file", Path("families/wards/family.json"), "run.toml, key 'family': families/wards/family.json: no"),
        ("row 3 lacks 'text'", "rows/b.jsonl", "run.toml, key 'data.files': rows/b.jsonl: row 3 lacks"),
    ],
)
def test_an_error_about_what_a_file_names_says_by_which_key(
    what: str, where: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN, encoding="utf-8")
    with pytest.raises(InputError) as caught, naming_keys(Path("run.toml")):
        raise InputError(what, where=where, remedy="mend it")
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith("; mend it")


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("no such file", "families"),  # above a value, not below it
        ("the loss is NaN", None),
        ("key 'seed': too large", "run.toml"),  # says it already
    ],
)
def test_other_errors_stay_as_they_are(
    what: str, where: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN, encoding="utf-8")
    error = UnavailableError(what, where=where)
    with pytest.raises(UnavailableError) as caught, naming_keys(Path("run.toml")):
        raise error
    assert caught.value is error


def test_a_file_that_is_gone_hides_no_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^there is no text$"), naming_keys(tmp_path / "run.toml"):
        raise InputError("there is no text")


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        ({"mean_rnak": 8}, PlanRun, "unknown key 'mean_rnak'; did you mean 'mean_rank'?"),
        ({"colour": "red"}, FamilyRun, "unknown key 'colour'; the keys are "),
        ({"settle": {"maximun": 8}}, PlanRun, "unknown key 'settle.maximun'; did you mean 'maximum'?"),
        ({"text": {"sorce": "pydoc"}}, PlanRun, "unknown key 'text.sorce'; did you mean 'source'?"),
    ],
)
def test_an_unknown_key_says_which_one_was_meant(content: dict[str, object], kind: type, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"run.toml: {said}")):
        checked(content, kind, where="run.toml")
