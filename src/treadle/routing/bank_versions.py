"""The earlier versions of a bank's folder: `versions/NNNNNN.json`, each the `bank.json` of its time.

A version is written down before the next takes its place, so at any moment `bank.json` is whole and everything that
it and its last predecessors name is there. Numbers only grow; going back to a version makes a new one.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from treadle import files
from treadle.errors import FormatError, InputError

METADATA = "bank.json"
KEPT = 10
"""Versions whose files stay, the present one included."""

_FOLDER = "versions"
_HEX = "[0-9a-f]" * 16
_OWN_FILE = re.compile(f"(factors|calibration)-{_HEX}")


@dataclass(frozen=True)
class Version:
    """One version of a bank.

    Attributes:
        number: 1 for the first.
        digest: SHA-256 of its `bank.json`, which names every other file by its own digest.
        written: when, in UTC, ISO 8601.
        adapters: their names, in order.
        changes: what it changed in the version before, as far as that one is still kept.
    """

    number: int
    digest: str
    written: str
    adapters: tuple[str, ...]
    changes: tuple[str, ...]


def number_of(content: Mapping[str, object], *, where: Path) -> int:
    """The version that this `bank.json` is.

    Raises:
        FormatError: it is not a whole number from 1 on.
    """
    number = content.get("version")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise FormatError(f"key 'version' is {number!r}", where=where, remedy="restore the file")
    return number


def bank_digest(folder: Path) -> str:
    """SHA-256 of `bank.json`: two folders with one digest hold the same bank, bit for bit.

    Raises:
        InputError: there is no bank.
    """
    try:
        return files.sha256_of(folder / METADATA)
    except FileNotFoundError as error:
        raise InputError("no such file", where=folder / METADATA, remedy="give a bank folder") from error


def archive(folder: Path) -> int:
    """Keep the present `bank.json` under its number, which is returned."""
    path = folder / METADATA
    number, written = number_of(files.read_json(path), where=path), path.stat().st_mtime_ns
    files.write_bytes(_file(folder, number), path.read_bytes())
    os.utime(_file(folder, number), ns=(written, written))
    return number


def metadata_of(folder: Path, number: int) -> Path:
    """The file that describes this version of the bank.

    Raises:
        InputError: it is not kept, or never was.
    """
    if number_of(files.read_json(folder / METADATA), where=folder / METADATA) == number:
        return folder / METADATA
    path = _file(folder, number)
    if number not in dict(_earlier(folder)):
        raise InputError(f"no version {number}", where=folder, remedy="choose one of `treadle bank versions`")
    return path


def versions(folder: Path) -> tuple[Version, ...]:
    """The versions that are kept, the present one last.

    Raises:
        InputError: there is no bank.
        FormatError: a file of a version is damaged.
    """
    found: list[Version] = []
    before: Mapping[str, object] | None = None
    for number, path in (*_earlier(folder), (-1, folder / METADATA)):
        content = files.read_json(path)
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
        found.append(
            Version(
                number if number > 0 else number_of(content, where=path),
                hashlib.sha256(path.read_bytes()).hexdigest(),
                written,
                tuple(_entries(content, path)),
                () if before is None else tuple(_changes(before, content, path)),
            )
        )
        before = content
    return tuple(found)


def sweep(folder: Path, *, keep: int = KEPT) -> None:
    """Delete versions before the last `keep`, and every file that no kept version names."""
    earlier = [path for _, path in _earlier(folder)]
    kept = earlier[max(0, len(earlier) - keep + 1) :]
    named = set(_texts(files.read_json(folder / METADATA)))
    for path in earlier:
        if path not in kept:
            _unlink(path)
            continue
        with contextlib.suppress(FormatError):  # nobody can go back to a damaged version, so it keeps no file
            named |= set(_texts(files.read_json(path)))
    for file in tensor_files(folder):
        if file.relative_to(folder).as_posix() not in named:
            _unlink(file)
    for file in folder.glob(f"public-text-{_HEX}.json"):
        if not any(text.startswith(file.stem.removeprefix("public-text-")) for text in named):
            _unlink(file)


def tensor_files(folder: Path) -> list[Path]:
    """The files of tensors that look like a bank's own: whatever else somebody put there is not the bank's to touch.

    Raises:
        FormatError: `adapters` is a link out of the folder.
    """
    adapters = files.contained(folder, "adapters")
    found = [file for file in folder.glob("*.safetensors") if _OWN_FILE.fullmatch(file.stem)]
    return found + [folder / "adapters" / file.name for file in adapters.glob(f"*-{_HEX}.safetensors")]


def _unlink(file: Path) -> None:
    with contextlib.suppress(OSError):  # the bank is whole without it; some systems keep open files
        file.unlink()


def _file(folder: Path, number: int) -> Path:
    return folder / _FOLDER / f"{number:06d}.json"


def _earlier(folder: Path) -> Iterator[tuple[int, Path]]:
    """Number and file of every version before the present one, in order."""
    present = number_of(files.read_json(folder / METADATA), where=folder / METADATA)
    for path in sorted((folder / _FOLDER).glob("*.json")):
        if path.stem.isdigit() and int(path.stem) < present:  # a crash may have left the present one there too
            yield int(path.stem), path


def _texts(content: object) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in cast("dict[str, object]", content).values():
            yield from _texts(value)
    elif isinstance(content, list):
        for value in cast("list[object]", content):
            yield from _texts(value)


def _entries(content: Mapping[str, object], path: Path) -> dict[str, Mapping[str, object]]:
    """Adapter name → its entry."""
    try:
        return {str(row["name"]): row for row in cast("list[dict[str, object]]", content["adapters"])}
    except (KeyError, TypeError) as error:
        raise FormatError(f"key {error} is missing or wrong", where=path, remedy="restore the file") from error


def _changes(before: Mapping[str, object], after: Mapping[str, object], path: Path) -> Iterator[str]:
    """What was done between two versions, in words."""
    old, new = _entries(before, path), _entries(after, path)
    yield from (f"removed {name}" for name in old if name not in new)
    yield from (f"added {name}" for name in new if name not in old)
    both = [name for name in new if name in old]
    yield from (f"updated {name}" for name in both if old[name].get("file") != new[name].get("file"))
    yield from (f"labelled {name}" for name in both if old[name].get("labels") != new[name].get("labels"))
    if before.get("access") != after.get("access"):
        yield f"access {after.get('access')}"
    if _yardstick(before) != _yardstick(after):
        yield "calibrated"


def _yardstick(content: Mapping[str, object]) -> object:
    """What the statistics were taken on; their file changes with every adapter."""
    calibration = content.get("calibration")
    if not isinstance(calibration, dict):
        return None
    row = cast("dict[str, object]", calibration)
    return row.get("source"), row.get("digest"), row.get("tokens")
