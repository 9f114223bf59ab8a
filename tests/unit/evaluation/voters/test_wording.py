"""Templates in files, and the vote in a reply."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import ConfigError
from treadle.evaluation.voters import Poll
from treadle.evaluation.voters.wording import load_wording, reply_of, system_in, wording_names

NAMES = ("system1", "system2", "system10")


@pytest.mark.parametrize("name", wording_names())
def test_shipped_templates_show_the_question_the_systems_and_the_form(name: str, poll: Callable[[int], Poll]) -> None:
    made = poll(8)
    shown = "\n".join(message["content"] for message in load_wording(name, made).messages(made, 7))
    assert "what is 7 + 7" in shown
    assert all(f"- {system.name}: {system.description}" in shown for system in made.systems)
    assert '{"system": NAME}' in shown
    assert '"system1", "system2"' in shown
    assert ("SmolLM2" in shown) == name.startswith("role-play")
    assert ("\nyes\n" in shown) == name.endswith("with-answer")


def test_role_play_and_plain_are_there() -> None:
    assert {"role-play", "plain"} <= set(wording_names())


def test_a_users_template_is_a_file_and_braces_in_questions_are_text(
    poll: Callable[[int], Poll], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text('user = "{question} {{or}} {names}?"')
    one = poll(1)
    one = replace(one, questions=[replace(one.questions[0], question="is {target} {0} set")])
    messages = load_wording(str(tmp_path / "mine.toml"), one).messages(one, 0)
    assert messages == [{"role": "user", "content": 'is {target} {0} set {or} "system1", "system2"?'}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such template; give a .toml file or one of plain, role-play, role-play-with-answer"),
        (b'user = "{question}', "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b'user = "{question}"\ncolour = "red"', "unknown key 'colour'; the keys are summary, system, user"),
        (b"user = 3", "key 'user': Input should be a valid string"),
        (b'system = "be good"', "key 'user': Field required"),
        (b'user = "{question} {mood}"', "no field 'mood' for templates; choose among question, answer, target"),
        (b'user = "{question} { "', "stray brace"),
        (b'user = "sort this"', "the template does not show the {question}"),
        (b'user = "{question} {target}"', "plays a target model; name it with `target`"),
        (b'user = "{question} {answer}"', "the template shows the answer; set data.answer"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(
    poll: Callable[[int], Poll], tmp_path: Path, content: bytes | None, said: str
) -> None:
    one = poll(1)
    bare = replace(one, target=None, questions=[replace(one.questions[0], answer=None)])
    if content is not None:
        (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_wording(str(tmp_path / "mine.toml"), bare)
    assert said in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ('{"system": "system2"}', "system2"),
        ('```json\n{"system": "System 2", "why": "steps"}\n```', "system2"),
        ('I compared system1 and system2. {"system": "system1"}', "system1"),
        ('Not {"system": "system1"} but {"system": "system2"}', "system2"),
        ('{"system": "system9"} or system1', None),
        ('{"system": "system1 or system2"}', None),
        ('{"system": 2}', None),
        ("{broken system-1", "system1"),
        ("SYSTEM_2.", "system2"),
        ("system10", "system10"),
        ("<think>system1 is for recall</think>system2", "system2"),
        ("<think>\nIs this system1? The question asks for several", None),
        ('<think>\nIt could be {"system": "system1"} but', None),
        ("<think>system1</think>system2<think>or system1", "system2"),
        ("It could be system1 or system2.\n\nSo: System 1", "system1"),
        ("system1 and system2", None),
        ("subsystem1", None),
        ("", None),
        ("42", None),
    ],
)
def test_the_vote_in_a_reply(text: str, system: str | None) -> None:
    assert system_in(text, NAMES) == system


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ('{"system": "very-fast"}', "very-fast"),
        ('{"system": "fast"}', "fast"),
        ("Very fast.", "very-fast"),
        ("fast", "fast"),
        ("fast, not very fast", None),
    ],
)
def test_a_name_within_another_is_told_from_it(text: str, system: str | None) -> None:
    assert system_in(text, ["fast", "very-fast"]) == system


@given(st.text(), st.sampled_from(NAMES), st.text(alphabet=st.characters(blacklist_characters="{}<>")))
def test_the_demanded_form_is_always_read_whatever_stands_around_it(before: str, name: str, after: str) -> None:
    before = before.replace("<", "").replace("{", "(").replace("}", ")")
    assert system_in(before + reply_of(name) + after, NAMES) == name
    assert json.loads(reply_of(name)) == {"system": name}
