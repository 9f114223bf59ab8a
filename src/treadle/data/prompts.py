"""Templates that turn a row of data into a prompt and its completion."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.errors import ConfigError, InputError

Row = Mapping[str, object]

# `{{` and `}}` stand for braces, `{name}` for a field, `{name[0]}` for one of a field's list; whatever else has a brace
# is a mistake in the template.
_PIECE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)(?:\[([0-9]{1,6})\])?\}|[{}]")


@dataclass(frozen=True)
class Example:
    """One prompt with the completion that answers it, as a model reads them: the text is `prompt + completion`.

    Attributes:
        prompt: what stands before the answer.
        completion: the answer, with the white space that joins it to the prompt.
        label: the right answer as data (a class, a letter, a normalised string); None where there is none.
        candidates: the completions to choose among by likelihood; empty where the answer is generated.
        program: for generated code, the text to put before and after it to make the program that checks it.
    """

    prompt: str
    completion: str
    label: str | None = None
    candidates: tuple[str, ...] = ()
    program: tuple[str, str] | None = None


@dataclass(frozen=True)
class Template:
    r"""A prompt and a completion with `{field}` marks; `{{` and `}}` are literal braces.

    A field is a plain name, `{field[0]}` the first of the list that it holds: there is no attribute access, no other
    index, no format specification, and what a field holds is never read as a template.

    >>> Template("Classify: {text}\nAnswer:", " {label}").render({"text": "so {good}", "label": 1})
    ('Classify: so {good}\nAnswer:', ' 1')

    Raises:
        ConfigError: a brace that is neither a `{field}`, a `{field[0]}` nor doubled.
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        """Find a template's mistakes before any data are read."""
        fields_of(self.prompt)
        fields_of(self.completion)

    def render(self, row: Row, *, where: object = None) -> tuple[str, str]:
        """The row's prompt and completion.

        Raises:
            InputError: the row lacks a field; names it, and the fields that there are.
        """
        return fill(self.prompt, row, where=where), fill(self.completion, row, where=where)


def fields_of(text: str) -> tuple[str, ...]:
    """The fields that a template names, in order of appearance, each once.

    Raises:
        ConfigError: a brace that is neither a `{field}`, a `{field[0]}` nor doubled.
    """
    found: dict[str, None] = {}
    for match in _PIECE.finditer(text):
        if match.group(1):
            found[match.group(1)] = None
        elif match.group() in "{}":
            excerpt = text[max(0, match.start() - 10) : match.end() + 20]
            raise ConfigError(
                f"the template has a stray brace near {excerpt!r}",
                remedy="write {name} for a field, {name[0]} for one of its list, {{ and }} for braces; no more is read",
            )
    return tuple(found)


def fill(text: str, row: Row, *, where: object = None) -> str:
    """The template with each `{field}` replaced by the row's value, once: braces in values stay what they are.

    Raises:
        InputError: the row lacks a field, or its list is too short; names it, and the fields that there are.
    """
    # A lambda, because the tests' type checker would compile a nested function anew at each call.
    return _PIECE.sub(
        lambda m: value_of(row, m[1], place=int(m[2]) if m[2] else None, where=where) if m[1] else m[0][0], text
    )


def value_of(row: Row, name: str, *, place: int | None = None, where: object = None) -> str:
    """The row's field, or what stands at this place, from 0, of the list that it holds, as text.

    Raises:
        InputError: there is no such field or place, or it is neither text nor a number.
    """
    value = row.get(name)
    if value is None:
        there = ", ".join(sorted(row)) or "none"
        raise InputError(f"no field {name!r}; the fields are: {there}", where=where, remedy="name one of these")
    if place is not None:
        if not isinstance(value, list):
            kind = type(value).__name__
            raise InputError(f"field {name!r} holds a {kind}, not a list", where=where, remedy=f"write {{{name}}}")
        if place >= len(value):
            raise InputError(
                f"field {name!r} holds {len(value)}: none is {name}[{place}]", where=where, remedy="places count from 0"
            )
        name, value = f"{name}[{place}]", value[place]
    if not isinstance(value, str | int | float):
        kind = type(value).__name__
        remedy = f"write {{{name}[0]}} for its first" if isinstance(value, list) else "flatten it"
        raise InputError(f"field {name!r} holds a {kind}, not text or a number", where=where, remedy=remedy)
    return str(value)


def cut_prompt(prompt: Sequence[int], special: Sequence[int], room: int) -> tuple[int, ...]:
    """The last `room` tokens of the prompt, but the special tokens at both ends are kept where they fit."""
    text = [i for i, is_special in enumerate(special) if not is_special]
    begin, end = (text[0], text[-1] + 1) if text else (0, len(prompt))
    kept = room - begin - (len(prompt) - end)
    if kept < 1:
        return tuple(prompt[-room:])
    return (*prompt[:begin], *prompt[end - kept : end], *prompt[end:])
