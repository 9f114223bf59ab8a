"""How a task's answers are judged: the `[metric]` table of a task file."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from treadle.data.prompts import Row, value_of
from treadle.errors import FormatError, InputError

_FORBID = {"extra": "forbid"}  # read by pydantic, which makes these from a task file


@dataclass(frozen=True)
class LabelLikelihood:
    """The likeliest of a fixed set of labels, each written as its text (the verbaliser).

    Attributes:
        kind: "label-likelihood".
        labels: label → text.
        field: of a row, that holds its label.
    """

    kind: Literal["label-likelihood"]
    labels: dict[str, str]
    field: str = "label"
    __pydantic_config__: ClassVar = _FORBID

    def __post_init__(self) -> None:
        """Refuse what no likelihood can tell apart."""
        if len(self.labels) < 2 or len(set(self.labels.values())) < len(self.labels):
            raise ValueError("labels: give two or more, each with a text of its own")
        for text in self.labels.values():  # of two such, the shorter is never less likely
            if longer := [other for other in self.labels.values() if other != text and other.startswith(text)]:
                raise ValueError(f"labels: {longer[0]!r} begins with {text!r}, so that it could never win")


@dataclass(frozen=True)
class Choices:
    """The likeliest letter among those of the row's choices, which `{choices}` shows as lines `A. …`, `B. …`.

    Attributes:
        kind: "choices".
        field: of a row, that holds the right letter.
        choices: of a row, that holds the list of texts.
    """

    kind: Literal["choices"]
    field: str = "answer"
    choices: str = "choices"
    __pydantic_config__: ClassVar = _FORBID

    def options(self, row: Row, *, where: object = None) -> dict[str, str]:
        """Letter to text.

        Raises:
            FormatError: the row's choices are not a list of 2 to 26 texts.
        """
        listed = row.get(self.choices)
        if not isinstance(listed, list) or not 2 <= len(listed) <= 26:
            raise FormatError(f"{self.choices!r} is not a list of 2 to 26", where=where, remedy="mend the row")
        return {chr(ord("A") + index): str(text) for index, text in enumerate(listed)}


@dataclass(frozen=True)
class ExactMatch:
    """The generated text, up to the first of the `stop` strings, equals the row's `field`, both of them normalised.

    Attributes:
        kind: "exact-match".
        max_new_tokens: generated tokens at most.
        field: of a row, that holds its answer.
        first_line: whether the first line alone counts.
        ignore_case: whether case does not matter.
        ignore: characters that do not matter.
        extract: a regular expression with one group, whose last match counts.
        stop: texts that end the answer.
    """

    kind: Literal["exact-match"]
    max_new_tokens: int
    field: str = "answer"
    first_line: bool = True
    ignore_case: bool = False
    ignore: str = ""
    extract: str | None = None
    stop: tuple[str, ...] = ()
    __pydantic_config__: ClassVar = _FORBID

    def __post_init__(self) -> None:
        """Find a wrong pattern before any data are read."""
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens: give one or more")
        if self.extract is not None and compiled(self.extract).groups != 1:
            raise ValueError("extract: give exactly one group")

    def normalise(self, text: str) -> str:
        """The answer in `text`, stripped.

        In this order: the first line of the stripped text, the last match of `extract` ("" without one), without the
        characters of `ignore`, case-folded; each where the task asks for it.
        """
        text = text.strip()
        if self.first_line:
            text = text.partition("\n")[0]
        if self.extract is not None:
            found = compiled(self.extract).findall(text)
            text = found[-1] if found else ""
        text = text.translate({ord(character): None for character in self.ignore}).strip()
        return text.casefold() if self.ignore_case else text

    def agrees(self, generated: str, label: str) -> bool:
        """Whether the generated text answers `label`, an example's label, which is normalised already."""
        return bool(label) and self.normalise(_until(generated, self.stop)) == label


@dataclass(frozen=True)
class Code:
    """The generated function passes its unit tests.

    Attributes:
        kind: "code".
        max_new_tokens: generated tokens at most.
        stop: texts that end the function, as the next definition does.
        stub: of a row, that holds the function's beginning; "" where the completion is the whole of it.
        tests: of a row, that holds a function `check`, or statements that stand on their own, as a text or a list.
        entry_point: of a row, that holds the name of the function for `check`; "" where the tests need none.
    """

    kind: Literal["code"]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stub: str = "prompt"
    tests: str = "test"
    entry_point: str = "entry_point"
    __pydantic_config__: ClassVar = _FORBID

    def __post_init__(self) -> None:
        """Refuse a length that cannot be."""
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens: give one or more")

    def program(self, row: Row, *, where: object = None) -> tuple[str, str]:
        """What stands before and after a completion in the program that checks it."""
        listed = row.get(self.tests)
        places = range(len(listed)) if isinstance(listed, list) else (None,)
        tests = [value_of(row, self.tests, place=place, where=where) for place in places]
        if not tests:
            raise InputError(f"field {self.tests!r} holds no test", where=where, remedy="leave the row out")
        if self.entry_point:
            tests.append(f"check({value_of(row, self.entry_point, where=where)})")
        stub = value_of(row, self.stub, where=where) if self.stub else ""
        return stub, "\n".join(["", *tests, ""])

    def cut(self, generated: str) -> str:
        """The generated text up to the first of the `stop` strings."""
        return _until(generated, self.stop)


def _until(text: str, stop: tuple[str, ...]) -> str:
    ends = [index for mark in stop if (index := text.find(mark)) >= 0]
    return text[: min(ends, default=len(text))]


Metric = LabelLikelihood | Choices | ExactMatch | Code


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
