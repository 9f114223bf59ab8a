"""Reading a run's TOML into a frozen configuration, with errors of one line; and writing one."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from treadle.errors import ConfigError, InputError


class RunConfig(BaseModel):
    """What every run configuration is: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Config = TypeVar("Config", bound=BaseModel)


def load_toml(path: Path, kind: type[Config]) -> Config:
    """The configuration of type `kind` in the TOML file `path`.

    Raises:
        ConfigError: no such file, not TOML, or a key that is unknown, missing, of a wrong type or out of range.
    """
    return checked(read_toml(path), kind, where=path)


def read_toml(path: Path) -> dict[str, object]:
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
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"not valid TOML ({error})", where=path, remedy="mend the file") from error


def checked(content: dict[str, object], kind: type[Config], *, where: object) -> Config:
    """The configuration of type `kind` with this content.

    Raises:
        ConfigError: names the first wrong key and what it should be.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        remedy = (
            "delete the key" if first["type"] == "extra_forbidden" else f"see the keys of {kind.__name__} in the docs"
        )
        raise ConfigError(f"key {key!r}: {first['msg']}", where=where, remedy=remedy) from error
    except InputError as error:  # of settings that check themselves; they name their own key
        raise ConfigError(error.what, where=where, remedy=error.remedy) from error


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
