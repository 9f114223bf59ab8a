"""Errors are one line that names the place, the fault and the remedy."""

import pytest

from treadle import errors
from treadle.errors import InputError, TreadleError, UnavailableError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TreadleError)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TreadleError("broken"), "broken"),
        (TreadleError("broken", where="a.json"), "a.json: broken"),
        (TreadleError("broken", remedy="mend it"), "broken; mend it"),
        (TreadleError("broken\n  badly", where="a.json", remedy="mend\tit"), "a.json: broken badly; mend it"),
        (TreadleError("broken", where=0), "0: broken"),
    ],
)
def test_one_line(error: TreadleError, line: str) -> None:
    assert str(error) == line


def test_the_parts_stay_readable() -> None:
    error = InputError("broken", where="a.json", remedy="mend it")
    assert (error.what, error.where, error.remedy) == ("broken", "a.json", "mend it")


def test_bad_input_and_missing_things_are_told_apart() -> None:
    assert {kind.__name__ for kind in ALL if not issubclass(kind, InputError)} == {"TreadleError", "UnavailableError"}
    assert not issubclass(UnavailableError, InputError)


@pytest.mark.parametrize("kind", ALL)
def test_the_tree_in_the_docstring_names_every_error(kind: type[TreadleError]) -> None:
    assert kind.__name__ in str(errors.__doc__)
