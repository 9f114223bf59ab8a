"""Reading TOML into frozen settings, with errors of one line; and writing it."""

import contextlib
import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from treadle.errors import ConfigError, InputError, TreadleError


class TomlTable(BaseModel):
    """What every file of settings, and every table in one, is: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Config = TypeVar("Config", bound=BaseModel)

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # of models, of dataclasses


def load_toml(path: Traversable, kind: type[Config]) -> Config:
    """The settings of type `kind` in the TOML file `path`, one of a user's or one that comes with the package.

    Raises:
        ConfigError: no such file, not TOML, or a key that is unknown, missing, of a wrong type or out of range.
    """
    return checked(read_toml(path), kind, where=path)


def read_toml(path: Traversable) -> dict[str, object]:
    """What the TOML file holds.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=path, remedy="check the path") from error
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=path, remedy="name a TOML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8", where=path, remedy="convert the file to UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML ({error})", where=path, remedy="mend the file") from error


def checked(content: dict[str, object], kind: type[Config], *, where: object) -> Config:
    """The settings of type `kind` with this content.

    Raises:
        ConfigError: names the first wrong key and what it should be.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        # A mistyped key is one too many and one too few: the former tells more.
        first = next((fault for fault in faults if fault["type"] in _UNKNOWN), faults[0])
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        if first["type"] in _UNKNOWN:
            raise ConfigError(f"unknown key {key!r}", where=where, remedy=_instead(first, kind)) from error
        raise ConfigError(
            f"key {key!r}: {first['msg']}", where=where, remedy="docs/configuration.md names all keys"
        ) from error
    except InputError as error:  # of settings that check themselves; they name their own key
        raise ConfigError(error.what, where=where, remedy=error.remedy) from error


def _instead(unknown: ErrorDetails, kind: type[BaseModel]) -> str:
    """What to do about a key that its table does not know: the likely one, or all that there are."""
    *above, key = unknown["loc"]
    known = _keys(kind)
    for part in above:
        known = _keys(known.get(part)) if isinstance(part, str) else known  # a place in a list of such tables
    if not known:
        return "delete the key"
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"


def _keys(annotation: object) -> dict[str, object]:
    """The keys of the one table that a field of this type can hold, and their types; none where it may be several."""
    options: tuple[Any, ...] = getattr(annotation, "__args__", (annotation,))
    found: list[dict[str, object]] = []
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            found.append({name: field.annotation for name, field in option.model_fields.items()})
        elif isinstance(option, type) and dataclasses.is_dataclass(option):
            hints = get_type_hints(option)
            found.append({field.name: hints[field.name] for field in dataclasses.fields(option)})
    return found[0] if len(found) == 1 else {}


@contextlib.contextmanager
def naming_keys(path: Path) -> Iterator[None]:
    """A block whose errors about what the TOML file `path` names say which key named it.

    An error is about a value if its place is that value or below it, or if its text quotes the value.
    """
    try:
        yield
    except TreadleError as error:
        where = "" if error.where is None else str(error.where)
        key = None
        if str(path) not in where:
            with contextlib.suppress(ConfigError):  # the file may be gone by now
                key = _key_about(read_toml(path), error.what, where)
        if key is None:
            raise
        place = f"{path}, key {key!r}" + (f": {where}" if where else "")
        raise type(error)(error.what, where=place, remedy=error.remedy) from error


def _key_about(content: Mapping[str, object], what: str, where: str) -> str | None:
    """The key of the longest text in the file that the error is about."""
    found = [
        (len(value), key)
        for key, value in _texts(content)
        if value and (where in (value, f"task {value}") or _is_below(where, value) or f"'{value}'" in what)
    ]
    return max(found)[1] if found else None


def _is_below(where: str, value: str) -> bool:
    return bool(where) and Path(value) in Path(where).parents and value != "."


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the file with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, held in cast("Mapping[str, object]", value).items():
            yield from _texts(held, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for held in cast("list[object]", value):
            yield from _texts(held, key)


def toml_text(content: Mapping[str, object], table: str = "") -> str:
    """The TOML of these keys: texts, numbers, lists of them, and tables; None is left out.

    Args:
        content: key → value.
        table: the name of the table that they stand in; "" for the file itself.
    """
    lines = [f"{_key(key)} = {_value(value)}\n" for key, value in content.items() if _is_plain(value)]
    head = f"\n[{table}]\n" if table and lines else ""
    tables = [
        toml_text(cast("Mapping[str, object]", value), f"{table}.{_key(key)}" if table else _key(key))
        for key, value in content.items()
        if isinstance(value, Mapping)
    ]
    return head + "".join([*lines, *tables])


def _is_plain(value: object) -> bool:
    return value is not None and not isinstance(value, Mapping)


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").replace("-", "").isalnum() else _value(key)


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, cast('list[object]', value)))}]"
    text = json.dumps(value, ensure_ascii=False)  # of a text, a number or a boolean, TOML has JSON's form
    return text.replace("\x7f", "\\u007f")
