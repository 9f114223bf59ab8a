"""Templates: plain fields only, values never read as templates, errors that name what there is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.data.prompts import Template, fields_of, fill, value_of
from treadle.errors import ConfigError, InputError


def test_a_row_becomes_prompt_and_completion() -> None:
    template = Template("Classify.\n{text}\nAnswer:", " {label}")
    assert template.render({"text": "good", "label": 3, "other": None}) == ("Classify.\ngood\nAnswer:", " 3")


def test_doubled_braces_are_braces() -> None:
    assert fill("{{{a}}} {{b}}", {"a": "x"}) == "{x} {b}"
    assert fields_of("{{a}} {b} {b} {c}") == ("b", "c")


@settings(deadline=None)
@given(st.text(), st.text())
def test_what_a_field_holds_is_never_a_template(first: str, second: str) -> None:
    assert fill("{a}|{b}|{a}", {"a": first, "b": second}) == f"{first}|{second}|{first}"


@pytest.mark.parametrize(
    "text", ["{", "a } b", "{a.b}", "{a[x]}", "{a[-1]}", "{a[0].b}", "{a!r}", "{a:>4}", "{}", "{0}", "{ a }", "{a{b}}"]
)
def test_nothing_but_a_field_and_its_place_is_read(text: str) -> None:
    with pytest.raises(ConfigError, match="stray brace"):
        Template("{text}", text)
    with pytest.raises(ConfigError, match="stray brace"):
        Template(text, "{text}")


def test_a_missing_field_names_itself_the_place_and_the_fields() -> None:
    with pytest.raises(InputError) as caught:
        Template("{text}", " {label}").render({"txt": "a", "label": "b"}, where="rows.jsonl, row 7")
    assert str(caught.value) == "rows.jsonl, row 7: no field 'text'; the fields are: label, txt; name one of these"


def test_one_of_a_list() -> None:
    assert fill("{a[1]}, {a[0]}, {b}", {"a": ["x", 7], "b": "{a[0]}"}) == "7, x, {a[0]}"
    assert fields_of("{a[1]} {a[0]}") == ("a",)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["x"], r"field 'a' holds 1: none is a\[1\]"),
        ("xy", "field 'a' holds a str, not a list"),
        ([1, None], r"field 'a\[1\]' holds a NoneType"),
    ],
)
def test_a_place_that_is_not_there_is_named(value: object, said: str) -> None:
    with pytest.raises(InputError, match=f"rows, row 3: {said}"):
        fill("{a[1]}", {"a": value}, where="rows, row 3")


@pytest.mark.parametrize("value", [["a"], {"a": 1}, b"a"])
def test_a_field_is_text_or_a_number(value: object) -> None:
    with pytest.raises(InputError, match=f"field 'a' holds a {type(value).__name__}"):
        value_of({"a": value}, "a")


def test_none_is_a_missing_field() -> None:
    with pytest.raises(InputError, match="no field 'a'"):
        value_of({"a": None}, "a")
    assert value_of({"a": ""}, "a") == ""
